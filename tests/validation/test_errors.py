"""Refreshed profiles, errors of predictions, verdicts and the report, on runs whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import InputError
from synerdiff.experiments.run import RunSpec
from synerdiff.profile.folder import load_profile
from synerdiff.profile.scaling import all_times_scaled
from synerdiff.profile.tables import Profile
from synerdiff.results.intervals import percentile_interval
from synerdiff.validation.calibration import CellTimes, Overlap, cells_for, handed_over, refreshed
from synerdiff.validation.errors import TOLERANCES, MetricError, case_errors, checks, judged, tally
from synerdiff.validation.report import as_json, write_report
from synerdiff.validation.session import SATURATION, MachineLoad, Validation, ValidationCase, ValidationPlan
from tests.builders import affine_profile, requests_at
from tests.validation.recorded import DISPATCH_NS, contended, recorded, recorded_session, times_of

FACTS = {
    "model": "digits",
    "device": "a processor",
    "software": "torch 9",
    "date": "2026-01-02",
    "trace": "t.csv",
    "requests": 60,
    "warm_up_s": 1.5,
}


def make_session(truth: Profile, **more: Any) -> Validation:
    """A session whose hardware is the simulator with the profile ``truth``."""
    profile = contended()
    return recorded_session(profile, truth, lambda repeat: times_of(profile), **more)


def test_refreshed_cells_are_the_means_of_their_passes() -> None:
    profile = contended()
    passes = [times_of(profile, 1.1, (DISPATCH_NS - 1000, DISPATCH_NS, DISPATCH_NS + 1000)), times_of(profile, 1.3)]
    new = refreshed(profile, passes, passes)
    assert new.steps[4].median == pytest.approx(1.2 * profile.step_ns(4), abs=1)
    assert new.steps[4].n == 6
    assert new.steps[4].p10 < new.steps[4].median < new.steps[4].p90
    assert new.chunks["whole"][0].median == pytest.approx(1.2 * profile.decode_ns(), abs=1)
    assert new.overhead_ns("step_dispatch") == 200_000
    assert new.slowdown_ppm(32, "whole", 0) == profile.slowdown_ppm(32, "whole", 0)
    assert profile.step_ns(4) == affine_profile().step_ns(4), "the profile itself is untouched"
    assert new.step_ns(4) == new.steps[4].median, "no lookup of the old profile is remembered"


def test_a_long_tail_is_paid_for() -> None:
    profile = contended()
    one = times_of(profile)
    steps = dict(one.steps) | {4: [10_200_000] * 9 + [110_200_000]}
    new = refreshed(profile, [replace(one, steps=steps)], [one])
    assert new.step_ns(4) == 20_000_000, "the median would leave out what one step in ten costs"


def test_slowdowns_are_summed_before_they_are_divided_and_bounded() -> None:
    profile = contended()
    one = times_of(profile)

    def with_cell(step: Overlap, chunk: Overlap) -> CellTimes:
        return replace(one, beside=dict(one.beside) | {("whole", 0, 32): (step, chunk)})

    first = with_cell(Overlap(1_000, 900.0, 1), Overlap(500, 500.0, 1))
    second = with_cell(Overlap(2_000, 1_100.0, 2), Overlap(1_000, -400.0, 2))
    new = refreshed(profile, [first, second], [first, second])
    assert new.slowdown_ppm(32, "whole", 0) == (1_500_000, 10_000_000)
    assert new.corun["whole", 0][32].step.n == 3


def test_scaled_profiles_scale_times_and_not_slowdowns() -> None:
    profile = contended()
    profile.step_ns(4), profile.slowdown_ppm(4, "whole", 0)
    double = all_times_scaled(profile, 2.0)
    assert double.step_ns(4) == 2 * profile.step_ns(4)
    assert double.decode_ns("c4") == 2 * profile.decode_ns("c4")
    assert double.slowdown_ppm(4, "whole", 0) == profile.slowdown_ppm(4, "whole", 0)


def test_cells_are_those_that_the_runs_can_meet() -> None:
    cells = cells_for(contended(), 10, ["whole", "c4", "whole"])
    assert cells.rows == (1, 2, 3, 4, 6, 8, 12)
    assert cells.chunkings == ("whole", "c4")
    assert cells_for(contended(), 10, ["whole"], even_only=True).rows == (2, 4, 6, 8, 12)


def test_a_true_prediction_has_no_error_and_passes_strictly() -> None:
    session = make_session(contended(), loads=(0.5, 0.8, SATURATION))
    for case in session.plan.cases:
        found = case_errors(session, case)
        assert {metric.error.value for metric in found.metrics.values() if metric.error is not None} == {0.0}
        assert all(check.verdict == "passed" for check in checks(found, TOLERANCES["strict"]))
        assert found.dispatch_s == {"step": 0.0002, "chunk": 0.0002, "decide": 0.0}
        assert all(predicted == measured for _, predicted, measured in found.latencies)
        assert len(found.latencies) == 60


def test_slower_steps_are_found_named_and_judged() -> None:
    truth = contended()
    truth.steps = all_times_scaled(truth, 1.1).steps
    session = make_session(truth)
    found = case_errors(session, ValidationCase("continuous-serial", 0.5))
    assert found.metrics["step_time_s"].error.value == pytest.approx(0.1, abs=0.002)  # type: ignore[union-attr]
    assert found.metrics["decode_time_s"].error.value == 0  # type: ignore[union-attr]
    assert found.metrics["request_latency_mean_s"].error.value > 0.05  # type: ignore[union-attr]
    assert "most of it in the stage denoise" in found.blame
    verdicts = {check.what: check.verdict for check in checks(found, TOLERANCES["strict"])}
    assert verdicts == {
        "step time": "failed",
        "decode time": "passed",
        "throughput": "passed",
        "mean latency": "failed",
        "faults": "passed",
    }
    assert checks(found, TOLERANCES["cpu"])[0].verdict == "passed"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.03, 0.03, "passed"),
        (0.0, 0.0, "passed"),
        (-0.031, 0.02, "unclear"),
        (0.02, 0.05, "unclear"),
        (-0.5, 0.5, "unclear"),
        (-math.inf, math.inf, "unclear"),
        (0.031, 0.2, "failed"),
        (-0.2, -0.031, "failed"),
        (0.03, 0.2, "unclear"),
    ],
)
def test_an_interval_is_judged_as_a_whole(low: float, high: float, verdict: str) -> None:
    assert judged(low, high, 0.03) == verdict


def test_few_repeats_are_judged_by_students_interval_of_the_mean() -> None:
    """Mean 2%, deviation 1%, 3 repeats: 2% +- 4.303 * 1% / sqrt(3)."""
    few = MetricError(1.0, 1.0, percentile_interval([0.01, 0.02, 0.03], 0.5), (), (0.01, 0.02, 0.03))
    assert few.interval is not None
    assert (few.interval.low, few.interval.high) == pytest.approx((0.02 - 0.02484, 0.02 + 0.02484), abs=1e-5)
    one = MetricError(1.0, 1.0, percentile_interval([0.01], 0.5), (), (0.01,))
    assert one.interval is not None
    assert judged(one.interval.low, one.interval.high, 0.5) == "unclear", "one repeat says nothing about its spread"
    six = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
    many = MetricError(1.0, 1.0, percentile_interval(six, 0.5), (), six)
    assert many.interval == many.error
    assert tally(["passed", "unclear", "passed"]) == "2 passed, 1 unclear, 0 failed"


def test_slower_decodes_are_named() -> None:
    truth = contended()
    truth.chunks = all_times_scaled(truth, 1.5).chunks
    found = case_errors(make_session(truth), ValidationCase("continuous-parallel", 0.5))
    assert found.metrics["decode_time_s"].error.value == pytest.approx(0.5, abs=0.05)  # type: ignore[union-attr]
    assert "most of it in the stage decode" in found.blame


def test_the_mix_of_steps_that_was_measured_weighs_both_runs() -> None:
    """Twice as fast hardware makes other batches; equal steps are still compared with equal steps."""
    found = case_errors(make_session(all_times_scaled(contended(), 0.5)), ValidationCase("continuous-serial", 0.8))
    assert found.metrics["step_time_s"].error.value == pytest.approx(-0.5, abs=0.02)  # type: ignore[union-attr]


def test_faults_fail_a_case() -> None:
    session = make_session(contended())
    case = ValidationCase("continuous-serial", 0.5)
    session.observations[case][1].run.faults.append("x")  # type: ignore[arg-type]
    verdicts = checks(case_errors(session, case), TOLERANCES["strict"])
    failed = [check.what for check in verdicts if check.verdict != "passed"]
    assert failed == ["faults"]


def test_only_complete_repeats_count() -> None:
    session = make_session(contended())
    session.observations[ValidationCase("continuous-parallel", 0.8)].pop()
    assert session.repeats == 2
    assert len(case_errors(session, ValidationCase("continuous-serial", 0.5)).metrics["step_time_s"].repeats) == 2


def test_the_report_says_what_failed_and_where(tmp_path: Path) -> None:
    truth = contended()
    truth.steps = all_times_scaled(truth, 1.1).steps
    session = make_session(truth, loads=(0.5, SATURATION))
    limits = TOLERANCES["strict"]
    errors = [case_errors(session, case) for case in session.plan.cases]
    verdicts = [check for one in errors for check in checks(one, limits)]
    text = write_report(tmp_path / "o", session, errors, verdicts, limits, FACTS)
    data = json.loads((tmp_path / "o" / "validation.json").read_text())
    assert data["cells_not_measured"] == ""
    assert data["cells_looked_up"] == len(session.lookups) > 0
    assert data == json.loads(json.dumps(as_json(session, errors, verdicts, limits, FACTS)))
    assert data["drift"] == {"step_time": 1, "chunk_time": 1, "step_slowdown": 1, "chunk_slowdown": 1}
    assert (tmp_path / "o" / "report.md").read_text() == text
    assert f"# Prediction against hardware: {tally(check.verdict for check in verdicts)}" in text
    assert "- failed: continuous-serial at load 0.5: step time +10.0% [" in text
    assert "allowed: within 3%." in text
    assert "- continuous-parallel, load 0.5: mean latency +" in text
    assert "## Saturation (all requests at once)" in text
    lines = (tmp_path / "o" / "requests.csv").read_text().splitlines()
    assert lines[0] == "policy,load,request_id,predicted_s,measured_s"
    assert len(lines) == 1 + 4 * 60
    assert load_profile(tmp_path / "o" / "profile").step_ns(4) == contended().step_ns(4)
    for name in ("prediction-errors", "requests", "timelines"):
        assert (tmp_path / "o" / f"{name}.png").stat().st_size > 10_000


def test_a_run_is_predicted_from_the_passes_around_it() -> None:
    session = make_session(contended())
    case = session.plan.cases[1]
    one = session.observations[case][0]
    assert one.place == 4
    for place in (2, 3, 4, 5):
        session.passes[place] = times_of(session.profile, 1.2)
    assert session.profile_of(one).step_ns(4) == round(1.2 * session.profile.step_ns(4))
    other = session.observations[session.plan.cases[3]][1]
    assert session.profile_of(other).step_ns(4) == session.profile.step_ns(4)


def test_pieces_are_compared_with_their_hand_over() -> None:
    """A lane's record leaves out what the simulator counts as a part of the piece."""
    result = simulate(requests_at(0, 1, 2), build_policy("continuous-parallel"), contended())
    assert handed_over(recorded(result)) == result.work


def test_others_on_the_machine_are_noticed() -> None:
    found = MachineLoad().load()
    assert found.others is None or 0 <= found.others < 1024
    assert found.stolen is None or 0 <= found.stolen < 1024


def test_plans_are_checked() -> None:
    spec = RunSpec(profile=contended(), source=(), policy="static")
    with pytest.raises(InputError, match="--repeats is 0"):
        ValidationPlan(spec, ("static",), (0.5,), 0)
    with pytest.raises(InputError, match="--load is 3; a number above 0 and up to 2"):
        ValidationPlan(spec, ("static",), (0.5, 3.0))
