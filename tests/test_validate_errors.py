"""Refreshed profiles, errors of predictions, verdicts and the report, on runs whose truth is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from policies.registry import build_policy
from real_runner.dispatch import Dispatch
from simulator import simulate
from synerdiff.core import InputError
from synerdiff.profile_files import load_profile
from synerdiff.studies.prediction_errors import TOLERANCES, case_errors, checks
from synerdiff.studies.refresh import Solo, all_times_scaled, cells_for, refreshed
from synerdiff.studies.validate import SATURATION, Case, Observation, OtherLoad, Plan, Session
from synerdiff.studies.validation_report import as_json, require_validation_folder, write_report
from tests.builders import affine_profile, requests_at

FACTS = {
    "model": "digits",
    "device": "a processor",
    "software": "torch 9",
    "date": "2026-01-02",
    "trace": "t.csv",
    "requests": 60,
    "warm_up_s": 1.5,
}


def solo_of(profile, factor: float = 1.0, spread: int = 0) -> Solo:
    """Cells that say exactly what the profile does, times a factor, or ``spread`` ns around it."""

    def samples(ns: int) -> list[int]:
        return [round(ns * factor) + offset for offset in (-spread, 0, spread)]

    return Solo(
        {rows: samples(cell.median) for rows, cell in profile.steps.items()},
        {name: [samples(cell.median) for cell in cells] for name, cells in profile.chunks.items()},
        {name: [cell.median] for name, cell in profile.overheads.items()},
    )


def coruns_of(profile):
    return {
        (name, chunk, rows): ([cell.step.median], [cell.chunk.median])
        for (name, chunk), cells in profile.corun.items()
        for rows, cell in cells.items()
    }


def contended():
    slowdowns = {1: (1_500_000, 1_400_000), 32: (1_300_000, 1_200_000)}
    return affine_profile(slowdowns=slowdowns, overheads={"step_dispatch": 200_000})


def make_session(
    truth, loads=(0.5, 0.8), policies=("continuous-serial", "continuous-parallel"), repeats=3, factor=0.02
):
    """A session whose hardware is the simulator with the profile ``truth``."""
    profile = contended()
    plan = Plan(policies, loads, repeats, range_factors=(1 - factor, 1 + factor))
    solos, coruns = [solo_of(profile)], [coruns_of(profile)]
    cells = cells_for(profile, 16, ["whole"])
    session = Session(plan, profile, cells, refreshed(profile, solos, coruns), dict.fromkeys(loads, 1.0), solos, coruns)
    for case in plan.cases:
        gap_ms = 0 if case.saturated else 30 / case.load
        requests = requests_at(*(gap_ms * i for i in range(60)), steps=5)
        session.observations[case] = []
        for repeat in range(repeats):
            dispatch = Dispatch()
            dispatch.step_ns, dispatch.chunk_ns = [300_000, 500_000], [100_000]

            def run(times, requests=requests, case=case):
                return simulate(requests, build_policy(case.policy), times)

            solos.append(solo_of(profile))
            seen = Observation(
                repeat, len(solos) - 2, requests, SimpleNamespace(result=run(truth), faults=[], dispatch=dispatch)
            )
            now = session.profile_of(seen)
            seen.predicted = run(now)
            seen.low, seen.high = (run(all_times_scaled(now, f)) for f in plan.range_factors)
            session.observations[case].append(seen)
    coruns.extend(coruns_of(profile) for _ in range(repeats))
    return session


def test_refreshed_cells_are_the_medians_of_all_passes():
    profile = contended()
    new = refreshed(profile, [solo_of(profile, 1.1, spread=1000), solo_of(profile, 1.3)], [coruns_of(profile)])
    pooled = sorted([round(profile.step_ns(4) * 1.1) + offset for offset in (-1000, 0, 1000)])
    pooled += [round(profile.step_ns(4) * 1.3)] * 3
    assert new.steps[4].median == round((pooled[2] + pooled[3]) / 2)
    assert new.steps[4].n == 6
    assert new.overhead_ns("step_dispatch") == 200_000
    assert new.slowdown_ppm(32, "whole", 0) == profile.slowdown_ppm(32, "whole", 0)
    assert profile.step_ns(4) == affine_profile().step_ns(4), "the profile itself is untouched"
    assert new.step_ns(4) == new.steps[4].median, "no lookup of the old profile is remembered"


def test_scaled_profiles_scale_times_and_not_slowdowns():
    profile = contended()
    profile.step_ns(4), profile.slowdown_ppm(4, "whole", 0)
    double = all_times_scaled(profile, 2.0)
    assert double.step_ns(4) == 2 * profile.step_ns(4)
    assert double.decode_ns("c4") == 2 * profile.decode_ns("c4")
    assert double.slowdown_ppm(4, "whole", 0) == profile.slowdown_ppm(4, "whole", 0)


def test_cells_are_those_that_the_runs_can_meet():
    cells = cells_for(contended(), 10, ["whole", "c4", "whole"])
    assert cells.rows == (1, 2, 3, 4, 6, 8, 12)
    assert cells.chunkings == ("whole", "c4")
    assert cells.corun_rows == (1, 32), "the measured point above the largest bucket is needed to interpolate"


def test_a_true_prediction_has_no_error_and_passes_strictly():
    session = make_session(contended(), loads=(0.5, 0.8, SATURATION))
    for case in session.plan.cases:
        found = case_errors(session, case)
        assert {metric.error.value for metric in found.metrics.values() if metric.error is not None} == {0.0}
        assert all(check.passed for check in checks(found, TOLERANCES["strict"]))
        assert found.dispatch_s == {"step": 0.0004, "chunk": 0.0001, "decide": 0.0}
        assert all(predicted == measured for _, predicted, measured in found.latencies)
        assert len(found.latencies) == 60


def test_slower_steps_are_found_named_and_judged():
    truth = contended()
    truth.steps = all_times_scaled(truth, 1.1).steps
    session = make_session(truth)
    found = case_errors(session, Case("continuous-serial", 0.5))
    assert found.metrics["step_time_s"].error.value == pytest.approx(0.1, abs=0.002)
    assert found.metrics["decode_time_s"].error.value == 0
    assert found.metrics["request_latency_mean_s"].error.value > 0.05
    assert "most of it in the stage denoise" in found.blame
    verdicts = {check.what: check.passed for check in checks(found, TOLERANCES["strict"])}
    assert verdicts == {
        "step time": False,
        "decode time": True,
        "throughput": True,
        "mean latency": False,
        "faults": True,
    }
    assert found.range_s[1] > 1, "beyond what 2% slower times explain"
    wide = make_session(truth, factor=0.15)
    found = case_errors(wide, Case("continuous-serial", 0.5))
    assert all(check.passed for check in checks(found, TOLERANCES["cpu"]))


def test_slower_decodes_are_named():
    truth = contended()
    truth.chunks = all_times_scaled(truth, 1.5).chunks
    found = case_errors(make_session(truth), Case("continuous-parallel", 0.5))
    assert found.metrics["decode_time_s"].error.value == pytest.approx(0.5, abs=0.05)
    assert "most of it in the stage decode" in found.blame


def test_the_mix_of_steps_that_was_measured_weighs_both_runs():
    """Twice as fast hardware makes other batches; equal steps are still compared with equal steps."""
    found = case_errors(make_session(all_times_scaled(contended(), 0.5)), Case("continuous-serial", 0.8))
    assert found.metrics["step_time_s"].error.value == pytest.approx(-0.5, abs=0.02)


def test_faults_fail_a_case():
    session = make_session(contended())
    case = Case("continuous-serial", 0.5)
    session.observations[case][1].run.faults.append("x")
    failed = [check.what for check in checks(case_errors(session, case), TOLERANCES["strict"]) if not check.passed]
    assert failed == ["faults"]


def test_only_complete_repeats_count():
    session = make_session(contended())
    session.observations[Case("continuous-parallel", 0.8)].pop()
    assert session.repeats == 2
    assert len(case_errors(session, Case("continuous-serial", 0.5)).metrics["step_time_s"].repeats) == 2
    session.coruns = session.coruns[:2]
    assert session.repeats == 1


def test_the_report_says_what_failed_and_where(tmp_path):
    truth = contended()
    truth.steps = all_times_scaled(truth, 1.1).steps
    session = make_session(truth, loads=(0.5, SATURATION))
    limits = TOLERANCES["strict"]
    errors = [case_errors(session, case) for case in session.plan.cases]
    verdicts = [check for one in errors for check in checks(one, limits)]
    text = write_report(tmp_path / "o", session, errors, verdicts, limits, FACTS)
    data = json.loads((tmp_path / "o" / "validation.json").read_text())
    assert data["passed"] is False
    assert data == json.loads(json.dumps(as_json(session, errors, verdicts, limits, FACTS)))
    assert data["drift"] == {"step_time": 1, "chunk_time": 1, "step_slowdown": 1, "chunk_slowdown": 1}
    assert (tmp_path / "o" / "report.md").read_text() == text
    failed = sum(not check.passed for check in verdicts)
    assert f"# Prediction against hardware: failed ({failed} of {len(verdicts)} checks)" in text
    assert "- continuous-serial at load 0.5: step time +10.0%; allowed: within 3%." in text
    assert "- continuous-parallel, load 0.5: mean latency +" in text
    assert "## Saturation (all requests at once)" in text
    lines = (tmp_path / "o" / "requests.csv").read_text().splitlines()
    assert lines[0] == "policy,load,request_id,predicted_s,measured_s"
    assert len(lines) == 1 + 4 * 60
    assert load_profile(tmp_path / "o" / "profile").step_ns(4) == contended().step_ns(4)
    for name in ("prediction-errors", "requests", "timelines"):
        assert (tmp_path / "o" / f"{name}.png").stat().st_size > 10_000
    require_validation_folder(tmp_path / "o")
    (tmp_path / "o" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"holds mine\.txt, which is no file of a validation"):
        require_validation_folder(tmp_path / "o")


def test_a_run_is_predicted_from_the_passes_beside_it():
    session = make_session(contended(), repeats=2)
    case = session.plan.cases[-1]
    seen = session.observations[case][1]
    session.solos[seen.place] = solo_of(session.profile, 1.2)
    session.solos[seen.place + 1] = solo_of(session.profile, 1.2)
    assert session.profile_of(seen).step_ns(4) == round(1.2 * session.profile.step_ns(4))
    other = session.observations[session.plan.cases[0]][0]
    assert session.profile_of(other).step_ns(4) == session.profile.step_ns(4)


def test_others_on_the_machine_are_noticed():
    watch = OtherLoad()
    assert watch.cores() is None or 0 <= watch.cores() < 1024


def test_plans_are_checked():
    with pytest.raises(InputError, match="--repeats is 0"):
        Plan(("static",), (0.5,), 0)
    with pytest.raises(InputError, match="--load is 3; a number above 0 and up to 2"):
        Plan(("static",), (0.5, 3.0))
