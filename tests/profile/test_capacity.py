"""Capacity, offered load and solo latency: by hand on a tiny profile, and against the simulator."""

from __future__ import annotations

import pandas as pd
import pytest

from policies.registry import build_policy
from profiler.estimate import estimate_profile
from simulator.engine import simulate
from synerdiff.core import InputError, Request
from synerdiff.profile import capacity
from synerdiff.profile.capacity import (
    Mix,
    default_batch,
    mix_of,
    offered_load,
    serial_capacity_samples_per_s,
    solo_latencies_ns,
    solo_latency_ns,
)
from synerdiff.profile.tables import Corun, Profile, Spread
from synerdiff.results.metrics import saturation_throughput
from synerdiff.results.records import work_table
from tests.theory import parallel_capacity_samples_per_s

MS = 1_000_000


def exactly(value: int) -> Spread:
    return Spread(value, value, value, 1)


def cell(step_ppm: int, chunk_ppm: int) -> Corun:
    return Corun(exactly(step_ppm), exactly(chunk_ppm), False)


@pytest.fixture
def profile() -> Profile:
    """T = 10, 20, 30, 40 ms for 1 to 4 rows; decode 8 ms; slowdowns 1.25 and 2.0 at every row count."""
    rows = (1, 2, 3, 4)
    return Profile(
        name="hand",
        provenance="measured",
        row_buckets=rows,
        steps={r: exactly(10 * MS * r) for r in rows},
        chunks={"whole": (exactly(8 * MS),), "c2": (exactly(5 * MS), exactly(3 * MS))},
        corun={
            (name, i): {r: cell(1_250_000, 2_000_000) for r in rows} for name, i in (("whole", 0), ("c2", 0), ("c2", 1))
        },
        overheads={},
    )


def with_overheads(profile: Profile, **overheads_ns: int) -> Profile:
    profile.overheads = {name: exactly(value) for name, value in overheads_ns.items()}
    return profile


def test_default_batch_is_8_or_what_the_rows_hold(profile: Profile) -> None:
    assert capacity.DEFAULT_BATCH == 8
    assert (default_batch(profile), default_batch(profile, 1)) == (2, 4)
    assert default_batch(estimate_profile("h200", "sdxl")) == 8


def test_serial_capacity_by_hand(profile: Profile) -> None:
    """5 steps * 40 ms / 2 samples + 8 ms = 108 ms a sample."""
    assert serial_capacity_samples_per_s(profile, 5, 2) == pytest.approx(1 / 0.108)
    with_overheads(profile, step_dispatch=2 * MS, chunk_dispatch=MS)
    assert serial_capacity_samples_per_s(profile, 5, 2) == pytest.approx(1 / (0.105 + 0.009))
    assert serial_capacity_samples_per_s(profile, 5, 2, chunking="c2") == pytest.approx(1 / (0.105 + 0.010))


def test_skipping_follows_the_affine_formula(profile: Profile) -> None:
    """For affine T the mean is T(2B) - sigma * B * dT/dR: 40 - 0.25 * 2 * 10 = 35 ms."""
    assert serial_capacity_samples_per_s(profile, 5, 2, two_row_share=0.75) == pytest.approx(
        1 / (5 * 0.035 / 2 + 0.008)
    )


def test_parallel_capacity_by_hand(profile: Profile) -> None:
    """delta = 8 * 2.0 * (1 - 1/1.25) = 3.2 ms; the decode lane alone would give 1 / 16 ms."""
    assert parallel_capacity_samples_per_s(profile, 5, 2) == pytest.approx(1 / 0.1032)
    assert parallel_capacity_samples_per_s(profile, 1, 4, two_row_share=0.0) == pytest.approx(1 / 0.016)
    assert parallel_capacity_samples_per_s(profile, 1, 4, two_row_share=0.0, lanes=2) == pytest.approx(1 / 0.0132)


def test_mix_and_load_by_hand(profile: Profile) -> None:
    requests = [Request(0, 0, 4, images=2), Request(1, 0, 2, images=1, guidance_scale=1.0)]
    mix = mix_of(requests)
    assert mix == Mix(images=3, sample_steps=10, two_row_steps=8)
    assert (mix.two_row_share, mix.sample_rows) == (0.8, 2)
    # Batch 2; mean T = 0.64 * 40 + 0.32 * 30 + 0.04 * 20 = 36 ms; 10/3 steps * 36 / 2 + 8 = 68 ms a sample.
    assert offered_load(requests, profile, window_s=0.204) == pytest.approx(1.0)
    assert offered_load(requests, profile, window_s=0.204, workers=2) == pytest.approx(0.5)


def test_load_messages(profile: Profile) -> None:
    with pytest.raises(InputError, match="the trace has no requests"):
        offered_load([], profile, 1.0)
    with pytest.raises(InputError, match="must be longer than 0"):
        offered_load([Request(0, 0, 4)], profile, 0.0)


def test_solo_latency_by_hand(profile: Profile) -> None:
    """Three guided images with at most two a wave: 4 * 42 + 2 * 9, then 4 * 22 + 9, text 5 before and copy 3 after."""
    with_overheads(profile, step_dispatch=2 * MS, chunk_dispatch=MS, text_encode=5 * MS, result_copy=3 * MS)
    request = Request(0, 0, 4, images=3)
    assert solo_latency_ns(request, profile) == (5 + 4 * 42 + 2 * 9 + 4 * 22 + 9 + 3) * MS
    assert solo_latency_ns(request, profile, batch=1) == (5 + 3 * (4 * 22 + 9) + 3) * MS
    assert solo_latencies_ns([request, request], profile) == [291 * MS] * 2


@pytest.mark.parametrize("lead_ns", [0, 5 * MS])
def test_idle_launches_are_in_the_latency_alone_as_the_simulator_has_them(profile: Profile, lead_ns: int) -> None:
    with_overheads(profile, step_dispatch=2 * MS, decision_lead=lead_ns)
    profile.step_launch = {rows: exactly(rows * MS) for rows in profile.steps}
    request = Request(0, 0, 4, images=3)
    record = simulate([request], build_policy("continuous-serial", {"batch": 2}), profile).requests[0]
    assert record.finished_ns == solo_latency_ns(request, profile, batch=2)


@pytest.mark.parametrize("images", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("batch", [None, 3])
def test_solo_latency_is_what_the_simulator_finds(images: int, guidance_scale: float, batch: int | None) -> None:
    profile = estimate_profile("h200", "sdxl")
    request = Request(0, 123_456_789, 7, images=images, guidance_scale=guidance_scale)
    policy = build_policy("continuous-serial", {} if batch is None else {"batch": batch})
    record = simulate([request], policy, profile).requests[0]
    assert record.finished_ns - request.arrival_ns == solo_latency_ns(request, profile, batch)


def measured_rate(policy: str, requests: list[Request], profile: Profile) -> float:
    result = simulate(requests, build_policy(policy, {}), profile)
    work: pd.DataFrame = work_table(result.work, result.sample_names).to_pandas()
    return saturation_throughput(work)


@pytest.mark.parametrize("steps", [4, 20])
def test_serial_capacity_is_what_the_simulator_sustains(steps: int) -> None:
    profile = estimate_profile("h200", "sdxl")
    rate = measured_rate("continuous-serial", [Request(i, 0, steps) for i in range(160)], profile)
    assert rate == pytest.approx(serial_capacity_samples_per_s(profile, steps, 8), rel=0.01)


@pytest.mark.parametrize(("contention", "steps"), [("0.3", 20), ("1.5", 20), ("0.8", 4), ("1.5", 1)])
def test_parallel_capacity_is_what_the_simulator_sustains(contention: str, steps: int) -> None:
    profile = estimate_profile("h200", "sdxl", contention)
    rate = measured_rate("continuous-parallel", [Request(i, 0, steps) for i in range(320)], profile)
    assert rate == pytest.approx(parallel_capacity_samples_per_s(profile, steps, 8), rel=0.01)
