"""Clusters: the plain worker is unchanged, nothing is lost, capacities are what they must be, errors are plain."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import build_policy
from policies.routers import ROUTERS, RoundRobin, WorkerState, build_router
from simulator import simulate, simulate_cluster
from synerdiff.config.cluster import cluster_of
from synerdiff.core import (
    NS_PER_S,
    ContractError,
    Decision,
    InputError,
    Request,
    SkipBudget,
    View,
    WorkerInfo,
    controlnets_from,
    loras_from,
)
from synerdiff.profile.capacity import serial_capacity_samples_per_s
from synerdiff.profile.tables import Profile
from tests.strategies import Whim, budgets, profiles, traces
from tests.swift_builders import cluster, serve, toy_adapters, toy_profile

SERIAL = "continuous-serial"
HOST = (0, 0, 3, 90)
"""sample_host, ns."""
SLOW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def worker_on(gpus: tuple[int, ...], **fields: Any) -> Any:
    return cluster_of({"workers": [{"denoise_gpu": 0, "decode_gpus": list(gpus), **fields}]})


@SLOW
@given(
    traces(), profiles(HOST), st.sampled_from(("whole", "cut")), st.integers(0, 10**6),
    st.sampled_from(((0,), (0, 0), (1,), (0, 1))), budgets, st.booleans(),
)  # fmt: skip
def test_one_plain_worker_of_a_cluster_is_the_plain_engine(
    requests: Any, profile: Profile, chunking: str, seed: int, gpus: Any, budget: SkipBudget, shared: bool
) -> None:
    """Behind a router, and behind a shared queue from which it takes whatever arrives."""
    plain_policy, policy = Whim(seed, chunking), Whim(seed, chunking)
    expected = simulate(requests, plain_policy, profile, decode_gpus=gpus, budget=budget)
    router = build_router("shared-queue", slots=1000) if shared else None
    found = simulate_cluster(requests, lambda: policy, profile, worker_on(gpus), budget=budget, router=router)
    assert found.run == expected
    assert policy.asked == plain_policy.asked


@SLOW
@given(
    traces(), profiles(HOST), st.sampled_from(("whole", "cut")), st.integers(0, 10**6),
    st.sampled_from(((0,), (0, 0), (1,), (0, 1))),
)  # fmt: skip
def test_a_plan_of_one_segment_is_the_plain_step(
    requests: Any, profile: Profile, chunking: str, seed: int, gpus: Any
) -> None:
    # Unguided samples have no second half, so every step is planned and consists of one segment.
    requests = [Request(r.request_id, r.arrival_ns, r.steps, r.images, 1.0, base_model=r.base_model) for r in requests]
    plain_policy, policy = Whim(seed, chunking), Whim(seed, chunking)
    expected = simulate(requests, plain_policy, profile, decode_gpus=gpus)
    described = cluster_of(
        {
            "workers": [{"denoise_gpu": 0, "decode_gpus": list(gpus), "guidance_gpu": 9}],
            "strategies": {"guidance": "two-gpus"},
        }
    )
    found = simulate_cluster(requests, lambda: policy, profile, described, adapters=toy_adapters())
    assert found.run == expected
    assert policy.asked == plain_policy.asked


def test_dispersion_of_the_first_worker_is_that_of_the_plain_engine() -> None:
    from synerdiff.profile.folder import find_profile, load_profile

    profile = load_profile(find_profile("h200-sd15-estimated"))
    requests = [Request(i, i * 10**8, 5) for i in range(10)]
    expected = simulate(requests, build_policy("continuous-serial"), profile, dispersion_seed=3)
    found = simulate_cluster(
        requests, lambda: build_policy("continuous-serial"), profile, worker_on((0,)), dispersion_seed=3
    )
    assert found.run == expected


@st.composite
def adapter_traces(draw: Any) -> Any:
    arrival, requests = 0, []
    for number in range(draw(st.integers(1, 10))):
        arrival += draw(st.sampled_from((0, 1, 60, 400, 3000)))
        requests.append(
            Request(
                number,
                arrival,
                draw(st.integers(1, 6)),
                draw(st.sampled_from((1, 1, 2))),
                draw(st.sampled_from((7.5, 7.5, 1.0))),
                loras=loras_from(draw(st.sampled_from(((), (), ("x@2",), ("x@0.5",), ("x", "y"), ("z",))))),
                controlnets=controlnets_from(draw(st.sampled_from(((), (), ("a",), ("b", "a"), ("c",))))),
            )
        )
    return requests


@st.composite
def clusters(draw: Any) -> Any:
    fields = {
        "workers": [
            {"denoise_gpu": w, "guidance_gpu": 100 + w, "controlnet_slots": draw(st.sampled_from((None, 1, 2)))}
            for w in range(draw(st.integers(1, 3)))
        ],
        "controlnet_services": [{"gpu": 200, "controlnets": ["a", "b", "c"]}, {"gpu": 201, "slots": 1}],
        "strategies": {
            "controlnets": draw(st.sampled_from(("inline", "service"))),
            "loras": draw(st.sampled_from(("synchronous", "asynchronous"))),
            "lora_bound_steps": draw(st.integers(0, 4)),
            "guidance": draw(st.sampled_from(("one-gpu", "two-gpus"))),
        },
        "loras": {
            "loaders": draw(st.integers(1, 2)),
            "host_cache_mib": draw(st.sampled_from((0, 400, 800))),
            "device_cache_mib": draw(st.sampled_from((0, 400))),
            "cache": draw(st.sampled_from(("lru", "lfu"))),
        },
    }
    return cluster_of(fields)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    adapter_traces(),
    clusters(),
    st.sampled_from(sorted(ROUTERS)),
    st.sampled_from(("continuous-serial", "continuous-parallel", "static", "dynamic", "load-skip", "whim")),
    st.sampled_from((0, 13)),
    st.booleans(),
)
def test_nothing_is_lost_and_no_lane_does_two_things_at_once(
    requests: Any, described: Any, router: Any, name: str, lead: Any, dispersed: Any
) -> None:
    def policy() -> Any:
        return Whim(5, "whole") if name == "whim" else build_policy(name)

    profile = toy_profile(overheads={"decision_lead": lead, "text_encode": 3, "step_dispatch": 2})
    result = serve(
        requests,
        described,
        policy,
        profile=profile,
        router=build_router(router),
        dispersion_seed=1 if dispersed else None,
    )
    statuses = {record.status for record in result.run.requests}
    assert statuses <= ({"done", "rejected"} if name == "whim" else {"done"})
    for record in result.run.requests:
        if record.status == "done":
            assert [len(modes) for modes in record.modes] == [record.request.steps] * record.request.images
            assert record.request.arrival_ns < record.admitted_ns <= record.denoised_ns < record.finished_ns
    lanes: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for work in result.run.work:
        assert work.end_ns >= work.start_ns >= 0
        lanes.setdefault((work.gpu, work.lane), []).append((work.start_ns, work.end_ns))
        for sample in work.samples:
            # Work belongs to the worker of its request; shared services have GPUs from 200.
            owner = result.worker_of[int(result.run.sample_names[sample].split(".")[0])]
            assert work.gpu in (owner, 100 + owner) or work.gpu >= 200
    for lane, found in lanes.items():
        # Waiting inline ControlNet loads share the name of the loader lane with LoRA files that come meanwhile.
        if lane[1] != "loader":
            for (_, before), (after, _) in zip(sorted(found), sorted(found)[1:], strict=False):
                assert after >= before, lane
    again = serve(
        requests,
        described,
        policy,
        profile=profile,
        router=build_router(router),
        dispersion_seed=1 if dispersed else None,
    )
    assert again == result


@settings(max_examples=100, deadline=None)
@given(adapter_traces(), st.integers(0, 5))
def test_every_sample_has_its_loras_from_the_bound_on(requests: Any, bound: int) -> None:
    # One sample at a time: its steps from the bound on all come after the merges of its LoRAs.
    described = cluster(loras="asynchronous", lora_bound_steps=bound)
    result = serve(requests, described, "continuous-serial")
    taken = dict.fromkeys(range(len(result.run.sample_names)), 0)
    weights = 0
    for work in sorted((w for w in result.run.work if w.lane == "denoise"), key=lambda w: (w.start_ns, w.end_ns)):
        if work.kind == "merge":
            weights += 1
        elif work.kind == "restore":
            # One record per adapter between steps, one for all of them on an idle lane; all here leave together.
            weights = 0
        elif work.kind == "step":
            (sample,) = work.samples
            wanted = result.run.requests[int(result.run.sample_names[sample].split(".")[0])].request.loras
            assert weights <= 2
            if taken[sample] >= bound:
                assert weights >= len(wanted)
            taken[sample] += 1


@pytest.mark.parametrize("workers", [1, 3])
def test_plain_workers_sustain_their_number_times_the_capacity_of_one(workers: int) -> None:
    requests = [Request(i, 0, 10) for i in range(60 * workers)]
    result = serve(requests, cluster(workers), lambda: build_policy("continuous-serial", {"batch": 1}))
    rate = len(requests) * NS_PER_S / result.run.end_ns
    assert rate == pytest.approx(workers * serial_capacity_samples_per_s(toy_profile(), 10, 1), rel=1e-9)
    assert result.gpu_seconds_per_image * rate == pytest.approx(workers)  # type: ignore[operator]
    assert result.busy_gpu_seconds_per_image == pytest.approx(result.gpu_seconds_per_image)


def test_a_shared_service_is_the_bottleneck_when_its_workers_ask_for_more() -> None:
    # Ten workers, one replica: a call of two rows takes 30, so 10 steps a sample cost the service 300.
    described = cluster(10, [{"controlnets": ["a"]}], controlnets="service")
    requests = [Request(i, 0, 10, controlnets=controlnets_from(("a",))) for i in range(400)]
    result = serve(requests, described, "continuous-serial")
    assert len(requests) / result.run.end_ns == pytest.approx(1 / 300, rel=0.02)


def test_a_policy_that_waits_for_more_is_told_when_none_can_come() -> None:
    class Patient:
        """Starts only when it sees that all are there."""

        chunking = "whole"

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.serial = build_policy("continuous-serial")
            self.serial.reset(worker, profile)

        def decide(self, view: View) -> Any:
            return self.serial.decide(view) if view.closed else Decision()

    requests = [Request(0, 0, 1), Request(1, 500, 1)]
    result = serve(requests, cluster(2), Patient)
    assert [record.admitted_ns for record in result.run.requests] == [500, 500]


def test_a_worker_that_never_starts_is_refused() -> None:
    class Idle:
        chunking = "whole"

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            pass

        def decide(self, view: View) -> Any:
            return Decision()

    with pytest.raises(ContractError, match="launched nothing while nothing runs"):
        serve([Request(0, 0, 1)], cluster(2), Idle)


def test_within_an_instant_ends_come_before_routing_and_routing_before_decisions() -> None:
    # Worker 0's sample ends at 140, as request 1 arrives: the shortest queue is worker 0's again.
    requests = [Request(0, 0, 1), Request(1, 140, 1)]
    assert serve(requests, cluster(2), SERIAL, router=build_router("shortest-queue")).worker_of == [0, 0]
    # Both requests of an instant are routed before a policy is asked, then workers are asked by index.
    events: list[tuple[str, int]] = []

    class Watched:
        def __init__(self) -> None:
            self.serial = build_policy(SERIAL, {"batch": 1})
            self.chunking = "whole"

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.serial.reset(worker, profile)
            self.index = int(worker.name.removeprefix("worker"))

        def decide(self, view: View) -> Decision:
            events.append(("asked", self.index))
            return self.serial.decide(view)

    class Backwards(RoundRobin):
        def route(self, request: Request, workers: list[WorkerState]) -> int:
            events.append(("routed", request.request_id))
            return 1 - super().route(request, workers)

    serve([Request(0, 0, 1), Request(1, 0, 1)], cluster(2), Watched, router=Backwards())
    assert events[:4] == [("routed", 0), ("routed", 1), ("asked", 0), ("asked", 1)]


def test_sample_ids_are_the_run_s_and_another_worker_s_sample_is_refused() -> None:
    requests = [Request(i, 0, 1, images=2) for i in range(2)]
    asked: list[list[int]] = []

    class Grabbing:
        chunking = "whole"

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.other = worker.name == "worker1"

        def decide(self, view: View) -> Decision:
            asked.append([sample.id for sample in view.waiting])
            return Decision(admit=(0 if self.other else 1,), wake_at_ns=view.now_ns + 5)

    with pytest.raises(ContractError, match=r"sample 0\.0 cannot be admitted: it is another worker's"):
        serve(requests, cluster(2), Grabbing)
    assert asked == [[0, 1], [2, 3]]


X, Q = loras_from("x"), controlnets_from("q")


@pytest.mark.parametrize(
    ("request_", "fields", "changed", "message"),
    [
        (Request(4, 0, 1, loras=X), {}, {"adapters": None}, "request 4 asks for LoRAs, and profile 'test' has no"),
        (Request(4, 0, 1, controlnets=Q), {}, {"adapters": None}, "request 4 asks for ControlNets, and profile"),
        (Request(4, 0, 1), {"guidance": "two-gpus"}, {"adapters": None}, "guidance runs on two GPUs, and profile"),
        (
            Request(4, 0, 1, controlnets=Q), {"services": [{"controlnets": ["a"]}], "controlnets": "service"}, {},
            "no ControlNet service serves 'q', which a request asks for; they serve a",
        ),
        (Request(4, 0, 1, loras=X), {"storage": {"mib": 5}}, {}, "knows lora_merge from 419430400 to 419430400"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_plain_sentence(
    request_: Any, fields: dict[Any, Any] | dict[str, Any], changed: dict[Any, Any] | dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        serve([request_], cluster(**fields), "continuous-serial", **changed)


def test_a_router_of_the_user_s_own_is_checked() -> None:
    class Lost:
        def reset(self, workers: Any) -> None:
            pass

        def route(self, request: Any, workers: Any) -> int:
            return 7

    with pytest.raises(InputError, match="the router sent request 0 to worker 7; there are workers 0 to 1"):
        serve([Request(0, 0, 1)], cluster(2), "continuous-serial", router=Lost())
