"""At saturation every policy with a closed form sustains what the formula says, within 1%."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest

from policies.registry import build_policy
from profiler.estimate import estimate_profile
from simulator import simulate
from synerdiff.core import Request, RunResult, SkipBudget
from synerdiff.profile.capacity import binomial_rows, serial_capacity_samples_per_s
from synerdiff.profile.tables import Profile
from synerdiff.results.metrics import saturation_throughput
from synerdiff.results.records import work_table
from tests.theory import parallel_capacity_samples_per_s

BUDGET = SkipBudget(300_000)


def saturated(name: str, profile: Profile, steps: int, count: int = 200, **parameters: object) -> RunResult:
    requests = [Request(i, 0, steps) for i in range(count)]
    return simulate(requests, build_policy(name, parameters), profile, budget=BUDGET)


def rate(result: RunResult) -> float:
    work: pd.DataFrame = work_table(result.work, result.sample_names).to_pandas()
    return saturation_throughput(work)


def row_mix(result: RunResult, batch: int = 8) -> dict[int, float]:
    """Rows -> share of the full steps, the first fifth dropped as for the rate."""
    rows = [w.rows for w in result.work if w.kind == "step" and len(w.samples) == batch]
    rows = rows[len(rows) // 5 :]
    return {count: times / len(rows) for count, times in Counter(rows).items()}


@pytest.mark.parametrize("name", ["static", "dynamic", "continuous-serial", "skip-cfg"])
@pytest.mark.parametrize("steps", [4, 20])
def test_policies_with_serial_decodes(name: str, steps: int) -> None:
    profile = estimate_profile("h200", "sdxl")
    result = saturated(name, profile, steps)
    mix = row_mix(result)
    assert (len(mix) > 1) is (name == "skip-cfg")
    assert rate(result) == pytest.approx(serial_capacity_samples_per_s(profile, steps, 8, rows=mix), rel=0.01)


@pytest.mark.parametrize(("contention", "steps"), [("0.3", 20), ("0.8", 8), ("1.5", 20)])
@pytest.mark.parametrize(("name", "chunking"), [("continuous-parallel", "whole"), ("chunked", "c4"), ("chunked", "c8")])
def test_policies_with_decodes_beside(name: str, chunking: str, contention: str, steps: int) -> None:
    profile = estimate_profile("h200", "sdxl", contention)
    parameters = {"chunking": chunking} if name == "chunked" else {}
    expected = parallel_capacity_samples_per_s(profile, steps, 8, chunking=chunking)
    assert rate(saturated(name, profile, steps, 320, **parameters)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("contention", ["0.3", "1.5"])
@pytest.mark.parametrize(
    ("name", "parameters"), [("load-skip", {}), ("load-skip", {"skip_queue": 10_000}), ("edf", {}), ("auto", {})]
)
def test_placement_by_cost_takes_the_better_formula(name: str, parameters: dict[str, int], contention: str) -> None:
    """Low contention: beside; severe: exclusive. The rows are those that skipping leaves."""
    profile = estimate_profile("h200", "sdxl", contention)
    result = saturated(name, profile, 20, 320, **parameters)
    mix = row_mix(result)
    assert (min(mix) < 16) is (name != "edf" and not parameters)
    cut = "c8" if name == "auto" and contention == "0.3" else "whole"
    parallel = parallel_capacity_samples_per_s(profile, 20, 8, rows=mix, chunking=cut)
    serial = serial_capacity_samples_per_s(profile, 20, 8, rows=mix)
    exclusive = {w.exclusive for w in result.work if w.kind == "chunk"}
    assert (contention == "1.5") in exclusive
    assert rate(result) == pytest.approx(max(parallel, serial), rel=0.01)


@pytest.mark.parametrize("name", ["synerdiff", "synerdiff-feedback"])
def test_synerdiff_while_the_threshold_does_not_bind(name: str) -> None:
    """30 steps, low contention, short decodes: every chunk runs beside, and nothing is forced or skipped."""
    profile = estimate_profile("h200", "sdxl", "low", decode_scale=0.5)
    parameters = {"theta": 0.75} if name == "synerdiff" else {"theta_low": 0.75, "theta_high": 0.75}
    result = saturated(name, profile, 30, 240, **parameters)
    assert not any(w.forced or w.exclusive for w in result.work)
    assert row_mix(result) == {16: 1.0}
    expected = parallel_capacity_samples_per_s(profile, 30, 8, chunking="c4")
    assert rate(result) == pytest.approx(expected, rel=0.01)


def test_auto_reaches_the_formula_of_held_steps() -> None:
    """One step and a decode of 29 ms: X = 1 / (c + D * s_u * (1 - 1/s_v)), D = T/B."""
    profile = estimate_profile("h200", "sdxl")
    requests = [Request(i, 0, 1, guidance_scale=1.0) for i in range(800)]
    result = simulate(requests, build_policy("auto", {"batch": 16}), profile)
    assert not any(w.exclusive for w in result.work)
    c = profile.decode_ns() + profile.overhead_ns("chunk_dispatch")
    s_u, s_v = (ppm / 1e6 for ppm in profile.slowdown_ppm(16, "whole", 0))
    step = (profile.step_ns(16) + profile.overhead_ns("step_dispatch")) / 16
    assert rate(result) == pytest.approx(1e9 / (c + step * s_u * (1 - 1 / s_v)), rel=0.01)


def test_binomial_rows_by_hand() -> None:
    assert binomial_rows(2, 0.25) == pytest.approx({2: 0.5625, 3: 0.375, 4: 0.0625})
    assert binomial_rows(3, 1.0) == {6: 1.0}
