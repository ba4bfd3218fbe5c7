"""Fleets by hand, to the nanosecond: speed, host time, and one queue before all (contract, rules 14 and 15)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import build_policy
from policies.routers import LeastWork, RoundRobin, build_router
from simulator import ClusterResult, simulate
from simulator.pieces import drawn
from synerdiff.config.cluster import cluster_of
from synerdiff.core import (
    GUIDED,
    ChunkLaunch,
    Decision,
    InputError,
    Request,
    View,
    WorkerInfo,
    controlnets_from,
    loras_from,
)
from synerdiff.experiments.run import RunSpec, prepare
from synerdiff.profile.tables import Profile, Spread
from tests.builders import Script, make_profile
from tests.reference_engine import reference_simulate
from tests.reference_fleet import reference_shared_queue
from tests.strategies import profiles, traces
from tests.swift_builders import serve, toy_profile

SERIAL = "continuous-serial"


def finishes(result: ClusterResult) -> list[int]:
    return [record.finished_ns for record in result.run.requests]


def pieces(result: ClusterResult) -> list[tuple[int, str, int, int]]:
    return [(w.gpu, w.kind, w.start_ns, w.end_ns) for w in result.run.work]


# --- speed ------------------------------------------------------------------------------------------------------------


def test_speed_divides_steps_and_chunks_rounded_up_and_no_overhead() -> None:
    overheads = {"step_dispatch": 10, "chunk_dispatch": 4, "text_encode": 5, "result_copy": 6, "sample_host": 7}
    profile = make_profile({1: 50, 2: 100}, {"whole": [50]}, overheads=overheads)
    found = serve([Request(0, 0, 2)], cluster_of({"workers": {"count": 1, "speed": 0.3}}), SERIAL, profile=profile)
    # ceil(100 / 0.3) = 334 and ceil(50 / 0.3) = 167, each after its dispatch.
    assert pieces(found) == [(0, "step", 5, 349), (0, "step", 349, 693), (0, "chunk", 693, 864)]
    assert finishes(found) == [864 + 7 + 6]


def test_speed_divides_after_the_interpolation_between_rows() -> None:
    profile = make_profile({2: 101, 4: 104}, {"whole": [3]}, eager=True)
    requests = [Request(0, 0, 1, guidance_scale=1.0, images=3)]
    described = cluster_of({"workers": {"count": 1, "speed": 0.5}})
    found = serve(requests, described, lambda: build_policy("dynamic", {"batch": 3}), profile=profile)
    # 3 rows: 102.5, rounded up to 103, then doubled. Doubled before, the ends' 202 and 208 would give 205.
    assert pieces(found)[0] == (0, "step", 0, 206)
    assert profile.on_worker(1_500_000).decode_ns() == 2


def test_speed_divides_a_drawn_time() -> None:
    spread = Spread(1000, 700, 1600, 9)
    profile = make_profile({2: 1000}, {"whole": [10]})
    profile.steps = {2: spread}
    found = serve(
        [Request(0, 0, 1)], cluster_of({"workers": {"count": 1, "speed": 0.7}}), SERIAL, profile=profile,
        dispersion_seed=5,
    )  # fmt: skip
    time_ns = drawn(spread, random.Random(5))
    assert pieces(found)[0] == (0, "step", 0, -(-time_ns * 10 // 7))


def test_speed_divides_controlnets_and_merges_but_not_what_is_read_or_copied() -> None:
    asked = Request(0, 0, 1, loras=loras_from(["x"]), controlnets=controlnets_from(["a"]))
    found = serve([asked], cluster_of({"workers": {"count": 1, "speed": 2}}), SERIAL)
    # Read 200 and copy 50 as ever; merge 20, ControlNet 30, step 100 and decode 40 at half.
    assert pieces(found) == [
        (0, "load", 0, 250),
        (0, "merge", 250, 260),
        (0, "controlnet", 260, 275),
        (0, "step", 275, 325),
        (0, "chunk", 325, 345),
        (0, "restore", 345, 349),  # ceil(7 / 2)
    ]


def test_a_step_in_two_halves_around_a_service_has_the_workers_speed_and_the_service_its_own() -> None:
    fields = {
        "workers": [{"denoise_gpu": 0, "speed": 2}],
        "controlnet_services": [{"gpu": 9, "controlnets": ["a"]}],
        "strategies": {"controlnets": "service"},
    }
    found = serve([Request(0, 0, 1, controlnets=controlnets_from(["a"]))], cluster_of(fields), SERIAL)
    # Encoder 20 (of 40). The call comes after 25 and takes 30, its residuals another 35; the decoder 30 (of 60).
    assert pieces(found)[:2] == [(0, "step", 0, 120), (9, "controlnet", 25, 55)]


def test_policies_and_routers_see_the_workers_own_times() -> None:
    class Watched(Script):
        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            told.append((worker.name, profile.step_ns(2), profile.decode_ns(), profile.overhead_ns("sample_host")))

    told: list[tuple[str, int, int, int]] = []
    described = cluster_of({"workers": [{"denoise_gpu": 0}, {"denoise_gpu": 1, "speed": 0.5, "sample_host_s": 1e-8}]})
    with pytest.raises(Exception, match="launched nothing"):
        serve([Request(0, 0, 1)], described, Watched)
    assert told == [("worker0", 100, 40, 0), ("worker1", 200, 80, 10)]


# --- host time --------------------------------------------------------------------------------------------------------


def hosted(*workers: dict[str, Any]) -> Any:
    return cluster_of({"workers": list(workers)})


def test_the_host_holds_all_lanes_after_each_sample_and_delays_its_finish() -> None:
    profile = make_profile({2: 100, 4: 100}, {"whole": [40]}, overheads={"sample_host": 13, "result_copy": 2})
    policy = build_policy("continuous-serial", {"batch": 2})
    result = simulate([Request(0, 0, 1), Request(1, 0, 1), Request(2, 150, 1)], policy, profile)
    assert [(w.kind, w.start_ns, w.end_ns) for w in result.work] == [
        ("step", 0, 100),
        ("chunk", 100, 140),
        ("chunk", 153, 193),  # not at 140
        ("step", 206, 306),  # though it waits since 150 and the lanes are free since 193
        ("chunk", 306, 346),
    ]
    assert [record.finished_ns for record in result.requests] == [155, 208, 361]
    assert result.requests[2].admitted_ns == 206


def test_holds_follow_each_other_in_the_order_of_ends() -> None:
    """Two decodes end at the same instant, a third during their holds; a running step goes on."""
    profile = make_profile({2: 100, 6: 100}, {"whole": [50]}, overheads={"sample_host": 30})
    policy = Script(
        Decision(admit=(0, 1, 2), step=((0, GUIDED), (1, GUIDED), (2, GUIDED))),
        Decision(chunks=(ChunkLaunch(0, 1, 0), ChunkLaunch(1, 1, 1))),
        Decision(admit=(3,), step=((3, GUIDED),)),
        Decision(chunks=(ChunkLaunch(2, 1, 0),)),
        Decision(chunks=(ChunkLaunch(3, 1, 1),)),
    )
    requests = [Request(0, 0, 1), Request(1, 0, 1), Request(2, 0, 1), Request(3, 120, 1)]
    result = simulate(requests, policy, profile, decode_gpus=(1, 1))
    assert [(w.lane, w.start_ns, w.end_ns) for w in result.work] == [
        ("denoise", 0, 100),
        ("decode0", 100, 150),
        ("decode1", 100, 150),
        ("denoise", 120, 220),
        ("decode0", 210, 260),
        ("decode1", 220, 270),
    ]
    # Lane 0 first: 150 + 30, then 180 + 30. The fourth sample's end falls into the third's hold: 260 + 30, then + 30.
    assert [record.finished_ns for record in result.requests] == [180, 210, 290, 320]
    assert policy.asked == [0, 100, 120, 210, 220]


def test_a_launch_under_way_on_another_lane_starts_its_next_chunk_after_the_hold() -> None:
    profile = make_profile({2: 100, 4: 100}, {"whole": [50], "cut": [20, 20]}, overheads={"sample_host": 30})
    policy = Script(
        Decision(admit=(0, 1), step=((0, GUIDED), (1, GUIDED))),
        Decision(chunks=(ChunkLaunch(0, 1, 0), ChunkLaunch(1, 2, 1))),
        Decision(chunks=(ChunkLaunch(0, 1, 0),)),
        chunking="cut",
    )
    # Lane 1's first chunk ends with lane 0's at 120; at 140 lane 0 ends sample 0, then lane 1 sample 1.
    result = simulate([Request(0, 0, 1), Request(1, 0, 1)], policy, profile, decode_gpus=(1, 1))
    assert [record.finished_ns for record in result.requests] == [170, 200]
    late = Script(
        Decision(admit=(0, 1), step=((0, GUIDED), (1, GUIDED))),
        Decision(chunks=(ChunkLaunch(0, 2, 0),)),
        Decision(chunks=(ChunkLaunch(1, 2, 1),)),
        chunking="cut",
    )
    result = simulate([Request(0, 0, 1), Request(1, 0, 1)], late, profile, decode_gpus=(1, 1))
    # Sample 1's first chunk ends at 140, with sample 0's last one on the lane before: its second waits until 170.
    assert [(w.lane, w.start_ns, w.end_ns) for w in result.work if w.kind == "chunk"] == [
        ("decode0", 100, 120),
        ("decode0", 120, 140),
        ("decode1", 120, 140),
        ("decode1", 170, 190),
    ]
    assert [record.finished_ns for record in result.requests] == [170, 220]
    assert late.asked == [0, 100, 120, 170]


def test_each_worker_has_the_host_time_that_its_entry_gives_else_the_profiles() -> None:
    profile = toy_profile(overheads={"sample_host": 5})
    described = hosted({"denoise_gpu": 0}, {"denoise_gpu": 1, "sample_host_s": 0.0}, {"denoise_gpu": 2, "speed": 2})
    found = serve([Request(n, 0, 1) for n in range(3)], described, SERIAL, profile=profile)
    assert finishes(found) == [145, 140, 75]


# --- files, load ------------------------------------------------------------------------------------------------------


def test_equal_workers_are_a_list_of_them() -> None:
    described = cluster_of({"workers": {"count": 2, "speed": 1.5, "sample_host_s": 0.013}})
    entry = {"speed": 1.5, "sample_host_s": 0.013}
    assert described == cluster_of({"workers": [{"denoise_gpu": 0, **entry}, {"denoise_gpu": 1, **entry}]})
    assert (described.workers[0].speed_ppm, described.workers[0].sample_host_ns) == (1_500_000, 13_000_000)


def test_load_counts_each_worker_with_its_speed_and_host_time() -> None:
    profile = make_profile({2: 1_000_000, 16: 8_000_000}, {"whole": [1_000_000]})
    requests = tuple(Request(n, n * 10**6, 1) for n in range(100))

    def load(*workers: dict[str, Any]) -> float:
        found = prepare(RunSpec(profile=profile, source=requests, policy=SERIAL, cluster=hosted(*workers))).load
        assert found is not None
        return found

    one, fast = load({"denoise_gpu": 0}), load({"denoise_gpu": 0, "speed": 2.0})
    assert fast == pytest.approx(one / 2)
    assert load({"denoise_gpu": 0}, {"denoise_gpu": 1, "speed": 2.0}) == pytest.approx(one / 3)
    # A step of 8 ms for 8 samples and a decode of 1 ms: 2 ms each, and 1 ms of host time.
    assert load({"denoise_gpu": 0, "sample_host_s": 0.001}) == pytest.approx(one * 1.5)


# --- shared queue -----------------------------------------------------------------------------------------------------


def shared(workers: int, **router: Any) -> Any:
    fields = {"kind": "shared-queue", **router}
    return cluster_of({"workers": {"count": workers}, "router": fields})


def pulled(requests: list[Request], described: Any, policy: Any = "static", **more: Any) -> ClusterResult:
    """Served from the cluster's shared queue; `static` would wait an hour for its batch of 4."""
    entry = described.router
    factory = (lambda: build_policy("static", {"batch": 4, "max_wait_s": 3600.0})) if policy == "static" else policy
    return serve(requests, described, factory, router=build_router(entry.kind, **entry.parameters), **more)


def steps_of(result: ClusterResult) -> list[tuple[int, int, tuple[int, ...]]]:
    """(gpu, start, samples) of each step."""
    return [(w.gpu, w.start_ns, w.samples) for w in result.run.work if w.kind == "step"]


def ns(count: int) -> float:
    """As seconds."""
    return count / 1e9


def one(number: int, arrival_ns: int, images: int = 1, **fields: Any) -> Request:
    return Request(number, arrival_ns, 1, images, **fields)


def test_a_full_group_goes_at_once_and_static_does_not_wait_again() -> None:
    found = pulled([one(0, 0), one(1, 10), one(2, 500)], shared(1, batch=2, max_wait_s=ns(100)))
    # Full at 10: a step of 4 rows takes 200, two decodes 80. The last one is complete at once: none is left to arrive.
    assert steps_of(found) == [(0, 10, (0, 1)), (0, 500, (2,))]
    assert finishes(found) == [250, 290, 640]


def test_a_group_is_complete_when_its_oldest_has_waited_with_the_arrivals_of_that_instant() -> None:
    found = pulled([one(0, 0), one(1, 100), one(2, 101), one(3, 900)], shared(2, batch=4, max_wait_s=ns(100)))
    assert steps_of(found) == [(0, 100, (0, 1)), (1, 201, (2,)), (1, 900, (3,))]
    # At 900 worker 1 has been idle since 341, worker 0 since 380.
    assert found.worker_of == [0, 0, 1, 1]


def test_a_request_that_does_not_fit_closes_the_group_and_a_larger_one_is_a_group_alone() -> None:
    requests = [one(0, 0), one(1, 1, 2), one(2, 2), one(3, 3, 4), one(4, 900)]
    found = pulled(requests, shared(4, batch=2, max_wait_s=ns(50)))
    # 1 closes 0 and is full; 3 closes 2 and is larger than the batch.
    assert steps_of(found) == [(0, 1, (0,)), (1, 1, (1, 2)), (2, 3, (3,)), (3, 3, (4, 5, 6, 7)), (0, 900, (8,))]


def test_each_batch_key_has_its_own_group_and_ties_go_to_the_older_request() -> None:
    fields: dict[str, Any] = {"base_model": "b"}
    requests = [one(0, 0, **fields), one(1, 0), one(2, 60), one(3, 60, **fields)]
    found = pulled(requests, shared(1, batch=2, max_wait_s=ns(100)))
    # Both are full at 60, the plain one first; that of request 0 is older.
    assert steps_of(found) == [(0, 60, (0, 3)), (0, 340, (1, 2))]


def test_nothing_left_to_arrive_completes_all_groups() -> None:
    found = pulled([one(0, 0), one(1, 7, base_model="b")], shared(1, batch=8, max_wait_s=1.0))
    assert steps_of(found) == [(0, 7, (0,)), (0, 147, (1,))]


def test_groups_go_in_order_of_completion_not_of_arrival() -> None:
    requests = [one(0, 0, 4), one(1, 1, base_model="b"), one(2, 2), one(3, 3), one(4, 2000)]
    found = pulled(requests, shared(1, batch=2, max_wait_s=ns(50)))
    # 2 and 3 are full at 3, the group of 1 is complete at 51; the worker is free at 560.
    assert [samples for _, _, samples in steps_of(found)] == [(0, 1, 2, 3), (5, 6), (4,), (7,)]


def test_the_worker_that_is_idle_longest_takes_the_next_group_then_the_lower_index() -> None:
    requests = [one(0, 0, 2), one(1, 0), one(2, 300), one(3, 310), one(4, 900)]
    found = pulled(requests, shared(2, batch=1, max_wait_s=0.0))
    # Worker 0 is busy until 280 (4 rows and two decodes), worker 1 until 140, so that one is idle longer at 300.
    assert found.worker_of[:4] == [0, 1, 1, 0]
    # At 900 worker 1 has been idle since 440, worker 0 since 450.
    assert found.worker_of[4] == 1
    assert pulled([one(0, 0), one(1, 500)], shared(3, batch=1, max_wait_s=0.0)).worker_of == [0, 1]


def test_a_worker_is_idle_only_when_nothing_holds_it() -> None:
    profile = toy_profile(overheads={"sample_host": 30, "result_copy": 500})
    found = pulled([one(0, 0), one(1, 145), one(2, 900)], shared(1, batch=1, max_wait_s=0.0), profile=profile)
    # The step ends at 100, the decode at 140, the hold at 170; the copy of the result holds nothing.
    assert steps_of(found)[1] == (0, 170, (1,))
    assert finishes(found)[:2] == [670, 840]
    # Idle since the end of the hold: worker 0 since 180 (speed 2: 70 + 110), worker 1 since 170.
    described = cluster_of(
        {
            "workers": [{"denoise_gpu": 0, "speed": 2, "sample_host_s": 1.1e-7}, {"denoise_gpu": 1}],
            "router": {"kind": "shared-queue", "batch": 1, "max_wait_s": 0.0},
        }
    )
    assert pulled([one(0, 0), one(1, 0), one(2, 300)], described, profile=profile).worker_of == [0, 1, 1]


def test_entry_is_dispatch_plus_text_encoding_and_closes_the_view() -> None:
    profile = toy_profile(overheads={"text_encode": 25})
    views: list[tuple[int, int, bool]] = []

    class Watching:
        NAME, chunking = "watching", "whole"

        def __init__(self) -> None:
            self.inner = build_policy("static", {"batch": 4, "max_wait_s": 3600.0})

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.inner.reset(worker, profile)

        def decide(self, view: View) -> Decision:
            if view.waiting:
                views.append((view.now_ns, next(iter(view.waiting)).entered_ns, view.closed))
            return self.inner.decide(view)

    requests = [one(0, 0), one(1, 20), one(2, 600)]
    found = pulled(requests, shared(1, batch=1, max_wait_s=0.0), Watching, profile=profile)
    # Dispatched at 0, at 165 (the end of the first) and at 600.
    assert views == [(25, 25, True), (190, 190, True), (625, 625, True)]
    assert finishes(found) == [165, 330, 765]


def test_a_worker_whose_samples_were_all_rejected_takes_the_next_group_at_the_same_instant() -> None:
    class Picky(Script):
        def __init__(self) -> None:
            serve_next = Decision(admit=(1,), step=((1, GUIDED),))
            super().__init__(Decision(reject=(0,)), serve_next, Decision(chunks=(ChunkLaunch(1, 1),)))

    found = pulled([one(0, 0), one(1, 0)], shared(1, batch=1, max_wait_s=0.0), Picky)
    assert [record.status for record in found.run.requests] == ["rejected", "done"]
    assert steps_of(found) == [(0, 0, (1,))]


def test_slots_let_a_worker_take_while_it_holds_fewer_samples() -> None:
    requests = [one(n, 0) for n in range(5)]
    factory: Any = lambda: build_policy("continuous-serial", {"batch": 2})  # noqa: E731
    found = pulled(requests, shared(2, slots=2), factory)
    # The idle workers first, then the lower index until it holds two; the fifth when worker 0's first sample has ended.
    assert found.worker_of == [0, 1, 0, 1, 0]
    assert finishes(found) == [240, 240, 280, 280, 420]
    # A request counts its samples, and is taken whole.
    assert pulled([one(0, 0, 3), one(1, 0), one(2, 1)], shared(2, slots=2), factory).worker_of == [0, 1, 1]


def test_with_slots_the_view_closes_when_the_queue_is_empty() -> None:
    found = pulled([one(0, 0), one(1, 50)], shared(1, slots=4))
    # `static` would wait for four samples, until the last has arrived.
    assert steps_of(found) == [(0, 50, (0, 1))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_groups_and_workers_are_those_of_the_plain_loop(data: Any) -> None:
    draw = data.draw
    arrival, requests = 0, []
    for number in range(draw(st.integers(1, 14))):
        arrival += draw(st.sampled_from((0, 0, 1, 40, 100, 700)))
        requests.append(
            Request(
                number,
                arrival,
                draw(st.integers(1, 3)),
                draw(st.sampled_from((1, 1, 1, 2, 3, 7))),
                draw(st.sampled_from((7.5, 1.0))),
                base_model=draw(st.sampled_from(("", "", "b"))),
            )
        )
    names = ("step_dispatch", "chunk_dispatch", "text_encode", "result_copy")
    overheads = {name: draw(st.sampled_from((0, 0, 1, 60))) for name in names}
    profile = make_profile({rows: 40 + 9 * rows for rows in range(1, 13)}, {"whole": [30]}, overheads=overheads)
    workers = [
        {
            "denoise_gpu": n,
            "speed": draw(st.sampled_from((1.0, 0.7, 3.0))),
            "sample_host_s": ns(draw(st.integers(0, 40))),
        }
        for n in range(draw(st.integers(1, 3)))
    ]
    batch, wait = draw(st.integers(1, 6)), draw(st.sampled_from((0, 1, 40, 300, 5000)))
    fields = {"workers": workers, "router": {"kind": "shared-queue", "batch": batch, "max_wait_s": ns(wait)}}
    described = cluster_of(fields)
    found = pulled(
        requests, described, lambda: build_policy("static", {"batch": batch, "max_wait_s": 3600.0}), profile=profile
    )
    pairs = [(entry.speed_ppm, entry.sample_host_ns or 0) for entry in described.workers]
    finished, worker_of = reference_shared_queue(requests, profile, pairs, batch, wait)
    assert finishes(found) == [finished[request.request_id] for request in requests]
    assert found.worker_of == [worker_of[request.request_id] for request in requests]


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"kind": "shared-queue"}, "needs batch and max_wait_s, or slots"),
        ({"kind": "shared-queue", "batch": 8}, "needs batch and max_wait_s, or slots"),
        ({"kind": "shared-queue", "batch": 8, "max_wait_s": 1, "slots": 2}, "needs batch and max_wait_s, or slots"),
        ({"kind": "shared-queue", "slots": 0}, "router.slots is 0; it must be greater than or equal to 1"),
        ({"kind": "least-work", "slots": 2}, "router 'least-work' has no slots; it has no parameters"),
        ({"kind": "nearest"}, "there is no router 'nearest'; known are round-robin, shortest-queue"),
        ({"batch": 8}, "router.kind is missing"),
    ],
)
def test_a_wrong_router_is_told_in_a_sentence(router: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(
            RunSpec(
                profile=toy_profile(),
                source=(one(0, 0),),
                policy="static",
                cluster=cluster_of({"workers": {"count": 1}, "router": router}),
            )
        )


def test_a_cluster_names_its_router_which_an_option_replaces() -> None:
    described = cluster_of({"workers": {"count": 2}, "router": "least-work"})
    spec = RunSpec(profile=toy_profile(), source=(one(0, 0),), policy="static", cluster=described)
    assert isinstance(prepare(spec).router(), LeastWork)
    assert isinstance(prepare(replace(spec, router="round-robin")).router(), RoundRobin)
    assert prepare(spec).described()["router"] == "least-work"
    queue = replace(spec, cluster=shared(2, batch=4, max_wait_s=0.5))
    assert prepare(queue).described()["router"] == {"kind": "shared-queue", "batch": 4, "max_wait_s": 0.5}


def test_least_work_counts_steps_at_each_workers_speed() -> None:
    described = cluster_of({"workers": [{"denoise_gpu": 0}, {"denoise_gpu": 1, "speed": 3}], "router": "least-work"})
    found = serve([Request(n, 0, 2) for n in range(4)], described, SERIAL, router=LeastWork())
    # After one request each 2 steps are left on both, which the second does in a third of the time.
    assert found.worker_of == [0, 1, 1, 1]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    traces(), profiles((0, 0, 3, 90)), st.sampled_from(("continuous-serial", "continuous-parallel", "load-skip")),
    st.sampled_from((0.3, 0.7, 1.0, 2.5)), st.sampled_from((None, 0, 17)),
)  # fmt: skip
def test_each_worker_of_a_fleet_is_the_plain_engine_at_its_speed(
    requests: list[Request], profile: Profile, policy: str, speed: float, host_ns: int | None
) -> None:
    """These policies do not look at ``closed``, which a fleet's worker sees later than a lone one."""

    def rows(request: Request) -> int:
        return 2 if request.guidance_scale > 1 else 1

    second = {"denoise_gpu": 1, "speed": speed, "sample_host_s": None if host_ns is None else ns(host_ns)}
    described = cluster_of({"workers": [{"denoise_gpu": 0}, second], "router": "round-robin"})
    factory: Any = lambda: build_policy(policy)  # noqa: E731
    found = serve(requests, described, factory, profile=profile, router=RoundRobin(), adapters=None)
    for index, entry in enumerate(described.workers):
        own = requests[index::2]
        # A worker's full batch is one of the whole trace's rows.
        if not own or max(map(rows, own)) != max(map(rows, requests)):
            continue
        stages = reference_simulate(own, build_policy(policy), entry.served(profile, {}))[1]
        for request in own:
            images = [stages[f"{request.request_id}.{image}"] for image in range(request.images)]
            last = max(images, key=lambda image: image[3])
            record = found.run.requests[request.request_id]
            assert (record.finished_ns, record.status) == (last[3], last[5])
