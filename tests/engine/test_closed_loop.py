"""The closed loop (contract, rule 17): hand-computed on every engine, and what it must come to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import POLICIES, build_policy
from policies.shared_queue import SharedQueue
from simulator import simulate, simulate_cluster
from synerdiff.config.cluster import cluster_of
from synerdiff.core import GUIDED, NS_PER_S, REUSE, ChunkLaunch, ContractError, Decision, InputError, SkipBudget, View
from synerdiff.experiments.run import RunSpec, execute, prepare
from synerdiff.profile.capacity import serial_capacity_samples_per_s
from synerdiff.profile.tables import Profile
from tests.builders import Script, affine_profile, make_profile, requests_at
from tests.exact_lanes import rehearse
from tests.strategies import Whim, budgets, profiles, traces

PLAIN = make_profile({2: 100, 4: 100, 16: 100}, {"whole": [50]})
FLEET = cluster_of({"workers": [{"denoise_gpu": 0, "decode_gpus": [0]}, {"denoise_gpu": 1, "decode_gpus": [1]}]})
MS = 1_000_000


def at_ns(*arrivals: int, **fields: Any) -> Any:
    return requests_at(*(arrival / MS for arrival in arrivals), **fields)


def sent(result: Any) -> list[int]:
    return [record.request.arrival_ns for record in result.requests]


def finished(result: Any) -> list[int]:
    return [record.finished_ns for record in result.requests]


def test_a_request_is_sent_when_the_copy_before_it_ends_and_never_before_its_arrival() -> None:
    profile = make_profile({2: 100}, {"whole": [50]}, overheads={"text_encode": 5, "result_copy": 7})
    requests = at_ns(0, 10, 500, steps=1, slo_ns=200)
    policy = build_policy("continuous-serial")
    result = simulate(requests, policy, profile, max_concurrency=1)
    # Encode 5, step 100, decode 50, copy 7.
    assert sent(result) == [0, 162, 500]
    assert finished(result) == [162, 324, 662]
    assert [record.request.intended_ns for record in result.requests] == [0, 10, 500]
    assert [record.admitted_ns for record in result.requests] == [5, 167, 505]


def test_deadlines_count_from_the_sending() -> None:
    seen: list[Any] = []

    def look(view: View) -> Decision:
        seen.extend((sample.request.arrival_ns, sample.deadline_ns) for sample in view.arrived)
        first = next(iter([*view.waiting, *view.active, *view.decoding]))
        if first.phase == "decoding":
            return Decision(chunks=(ChunkLaunch(first.id, 1, exclusive=True),))
        return Decision(admit=(first.id,), step=((first.id, GUIDED),))

    requests = at_ns(0, 0, steps=1, slo_ns=200)
    simulate(requests, Script(look, look, look, look, look), PLAIN, max_concurrency=1)
    assert seen == [(0, 200), (150, 350)]


@pytest.mark.parametrize("hardware", [False, True])
def test_a_batch_that_cannot_fill_starts_at_once(hardware: bool) -> None:
    requests = at_ns(0, 0, 0, steps=1)
    policy = build_policy("static", {"batch": 4})
    if hardware:
        real = rehearse(requests, policy, PLAIN, max_concurrency=2)
        assert real.error is None
        result = real.result
    else:
        result = simulate(requests, policy, PLAIN, max_concurrency=2)
    # Two are sent, both places are taken, nothing runs: nothing can arrive, so the batch of two is not held back. The
    # third is sent when the first decode ends, and starts when both have.
    assert sent(result) == [0, 0, 150]
    assert finished(result) == [150, 200, 350]


def test_a_place_that_a_decision_frees_is_taken_in_a_further_round_of_that_instant() -> None:
    policy = Script(
        Decision(reject=(0,)),
        Decision(admit=(1,), step=((1, GUIDED),)),
        Decision(chunks=(ChunkLaunch(1, 1),)),
    )
    result = simulate(at_ns(0, 0, steps=1), policy, PLAIN, max_concurrency=1)
    assert policy.asked == [0, 0, 100]
    assert sent(result) == [0, 0]
    assert [record.status for record in result.requests] == ["rejected", "done"]


def test_a_request_keeps_its_place_until_its_last_image_has_ended() -> None:
    requests = at_ns(0, 0, steps=1, images=2)
    result = simulate(requests, build_policy("continuous-serial"), PLAIN, max_concurrency=1)
    # Both images in one step of 100; decodes end at 150 and 200.
    assert sent(result) == [0, 200]


def test_holding_back_what_nothing_can_join_is_a_broken_contract() -> None:
    with pytest.raises(ContractError, match="nothing runs, nothing can arrive"):
        simulate(at_ns(0, 0, 0), Script(Decision(), Decision()), PLAIN, max_concurrency=2)


def test_a_fleet_shares_its_places() -> None:
    result = simulate_cluster(
        at_ns(0, 0, 0, steps=1), lambda: build_policy("static", {"batch": 2}), PLAIN, FLEET, max_concurrency=2
    )
    # Worker 0 is asked first, while nothing runs: it starts. Worker 1 holds its one back, for worker 0 runs, until the
    # last request is sent, at 150, to worker 0.
    assert result.worker_of == [0, 1, 0]
    assert sent(result.run) == [0, 0, 150]
    assert [record.admitted_ns for record in result.run.requests] == [0, 150, 150]
    assert finished(result.run) == [150, 300, 300]


def test_a_group_of_the_shared_queue_that_cannot_fill_is_complete() -> None:
    queue = SharedQueue(batch=4, max_wait_s=1)
    static = lambda: build_policy("static", {"batch": 4})  # noqa: E731
    result = simulate_cluster(at_ns(0, 0, 0, steps=1), static, PLAIN, FLEET, router=queue, max_concurrency=2)
    # Two are sent; no more can come, so their group goes to worker 0. The third is sent at 150 and is the last: a group
    # of its own, for worker 1.
    assert result.worker_of == [0, 0, 1]
    assert sent(result.run) == [0, 0, 150]
    assert finished(result.run) == [150, 200, 300]


def test_a_worker_of_a_fleet_hears_that_nothing_can_arrive() -> None:
    class Patient:
        """Holds a request back until nothing can arrive, and sets no wake."""

        chunking = "whole"

        def __init__(self) -> None:
            self.inner = build_policy("continuous-serial")

        def reset(self, worker: Any, profile: Profile) -> None:
            self.inner.reset(worker, profile)

        def decide(self, view: View) -> Decision:
            return self.inner.decide(view) if view.closed or view.active or view.decoding else Decision()

    # Both places are taken by worker 1, whose second request waits there alone from 150 on: no event asks anybody.
    class Second:
        def reset(self, workers: int) -> None: ...

        def route(self, request: Any, states: Any) -> int:
            return 1

    result = simulate_cluster(at_ns(0, 0, 0, 0, steps=1), Patient, PLAIN, FLEET, router=Second(), max_concurrency=2)
    assert {record.status for record in result.run.requests} == {"done"}
    assert sent(result.run)[:2] == [0, 0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), profiles(), st.integers(0, 10**6), st.sampled_from(((0,), (0, 0))), budgets, st.integers(1, 4))
def test_one_plain_worker_of_a_fleet_is_the_plain_engine(
    requests: Any, profile: Profile, seed: int, gpus: Any, budget: SkipBudget, most: int
) -> None:
    plain, policy = Whim(seed, "cut"), Whim(seed, "cut")
    expected = simulate(requests, plain, profile, decode_gpus=gpus, budget=budget, max_concurrency=most)
    one = cluster_of({"workers": [{"denoise_gpu": 0, "decode_gpus": list(gpus)}]})
    assert simulate_cluster(requests, lambda: policy, profile, one, budget=budget, max_concurrency=most).run == expected
    assert policy.asked == plain.asked


@pytest.mark.parametrize("name", POLICIES)
def test_the_runner_makes_the_same_run(name: str) -> None:
    steps, chunks = {1: 100, 2: 130, 4: 200, 8: 350, 16: 600}, {"whole": [170], "c3": [50, 70, 50]}
    profile = make_profile(steps, chunks, overheads={"result_copy": 20})
    requests = at_ns(*(60 * i for i in range(20)), steps=3)
    budget = SkipBudget(400_000, 1, 1, REUSE)
    simulated = simulate(requests, build_policy(name), profile, budget=budget, max_concurrency=3)
    real = rehearse(requests, build_policy(name), profile, budget=budget, max_concurrency=3)
    assert real.error is None
    assert real.result.work == simulated.work
    assert real.result.requests == simulated.requests


def closed_run(most: int, **fields: Any) -> Any:
    requests = tuple(at_ns(*([0] * 600), steps=10))
    spec = RunSpec(
        profile=affine_profile(), source=requests, policy="continuous-serial", max_concurrency=most, **fields
    )
    return execute(prepare(spec))


def test_saturation_is_the_closed_form() -> None:
    outcome = closed_run(24, parameters={"batch": 8})
    capacity = serial_capacity_samples_per_s(affine_profile(), 10, 8)
    assert outcome.summary["request_throughput"] == pytest.approx(capacity, rel=0.01)
    assert outcome.described["run"]["max_concurrency"] == 24
    assert outcome.described["run"]["load"] is None


def test_one_at_a_time_takes_the_latency_alone() -> None:
    outcome = closed_run(1)
    alone_s = (10 * affine_profile().step_ns(2) + affine_profile().decode_ns()) / NS_PER_S
    assert outcome.summary["request_latency_mean_s"] == pytest.approx(alone_s)
    assert outcome.summary["request_throughput"] == pytest.approx(1 / alone_s, rel=0.01)
    table = outcome.frames[0]
    assert set(table["intended_arrival_s"]) == {0.0}
    assert table["arrival_s"].is_monotonic_increasing
    assert "closed loop 1 requests in the system at a time" in "\n".join(outcome.lines())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"load": 0.5}, "--max-concurrency and --load exclude each other"), ({}, "a whole number from 1 to 1000000")],
)
def test_bad_input_is_one_sentence(fields: Any, sentence: str) -> None:
    spec = RunSpec(
        profile=affine_profile(), source=tuple(at_ns(0, 10)), policy="dynamic", max_concurrency=len(fields), **fields
    )
    with pytest.raises(InputError, match=sentence):
        prepare(spec)
