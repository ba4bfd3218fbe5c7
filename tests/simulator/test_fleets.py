"""Fleets by hand, to the nanosecond: speed and host time of a worker (contract, rule 19)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from policies.registry import build_policy
from simulator import ClusterResult, simulate
from simulator.pieces import drawn
from synerdiff.config.cluster import cluster_of
from synerdiff.core import (
    GUIDED,
    ChunkLaunch,
    Decision,
    Request,
    WorkerInfo,
    controlnets_from,
    loras_from,
)
from synerdiff.experiments.run import RunSpec, prepare
from synerdiff.profile.tables import Profile, Spread
from tests.builders import Script, make_profile
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
