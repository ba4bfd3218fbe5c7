"""A validation as files: JSON, a table to read, one line per request, and the pictures last."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from synerdiff.experiments.page import Page, Part, profile_table, write_page
from synerdiff.figures.lanes import lane_chart
from synerdiff.figures.style import save
from synerdiff.figures.validation import prediction_errors, request_scatter
from synerdiff.files import write_rows, write_text
from synerdiff.profile.folder import write_profile
from synerdiff.profile.tables import Profile
from synerdiff.validation.errors import (
    JUDGED,
    METRICS,
    POINTS,
    CaseErrors,
    Check,
    Tolerance,
    case_errors,
    checks,
    tally,
)
from synerdiff.validation.lookups import sentence
from synerdiff.validation.session import Validation

FIGURES = ("prediction-errors", "requests", "timelines")
SHOWN_STEPS = 25
PICTURED = (*JUDGED, "request_latency_p99_s")


def conclude(out: Path, session: Validation, tolerance: Tolerance, facts: Mapping[str, Any]) -> tuple[str, bool]:
    """(the report's text, whether no check failed and every cell that was looked up was measured); everything is
    written into the folder."""
    errors = [case_errors(session, case) for case in session.plan.cases]
    verdicts = [check for case in errors for check in checks(case, tolerance)]
    text = write_report(out, session, errors, verdicts, tolerance, facts)
    return text, not session.unmeasured and all(check.verdict != "failed" for check in verdicts)


def write_report(
    out: Path,
    session: Validation,
    cases: Sequence[CaseErrors],
    verdicts: Sequence[Check],
    tolerance: Tolerance,
    facts: Mapping[str, Any],
) -> str:
    """Write the data, then the pictures and the page; returns the report's text."""
    data = as_json(session, cases, verdicts, tolerance, facts)
    text = report_text(data)
    write_text(out / "validation.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    rows = [
        (one.case.policy, _load_text(one.case.load), i, f"{predicted:.6f}", f"{measured:.6f}")
        for one in cases
        for i, predicted, measured in one.latencies
    ]
    write_rows(out / "requests.csv", ("policy", "load", "request_id", "predicted_s", "measured_s"), rows)
    write_profile(out / "profile", session.pooled)
    write_text(out / "report.md", text)
    _draw(out, session, cases, tolerance, facts)
    write_page(out, page_of(data, text, session.profile))
    return text


def page_of(data: Mapping[str, Any], text: str, profile: Profile) -> Page:
    """The report's text as a page: its first part is the setting, every heading a section."""
    first, *others = text.split("\n## ")
    parts = [Part(title="Predicted against measured", figures=FIGURES)]
    parts += [Part(title=title, lines=lines) for title, *lines in (section.split("\n") for section in others)]
    parts.append(Part(title="Setting", lines=[*first.split("\n")[1:], profile_table([profile])]))
    verdict = tally(check["verdict"] for check in data["checks"])
    limits = data["tolerance"]
    gaps = [f"One machine, one trace, loads {', '.join(data['loads'])}: others are not said anything about."]
    if unclear := sum(check["verdict"] == "unclear" for check in data["checks"]):
        gaps.append(f"{unclear} checks are unclear: their intervals are too wide for the tolerance.")
    if missing := data.get("cells_not_measured"):
        gaps.append(f"Cells that were not measured here: {missing}.")
    if data["repeats"] < data["repeats_wanted"]:
        gaps.append(f"{data['repeats']} of {data['repeats_wanted']} repeats were run.")
    return Page(
        kind="validate",
        name=profile.name,
        question=f"How far is the simulator from {data['model']} on {data['device']}?",
        answer=[
            f"Of {len(data['checks'])} checks {verdict}: stage times within {limits['stage_times']:.0%}, throughput "
            f"within {limits['throughput']:.0%}, mean latency within {limits['mean_latency']:.0%}, whole 95% intervals."
        ],
        parts=parts,
        gaps=gaps,
    )


def as_json(
    session: Validation,
    cases: Sequence[CaseErrors],
    verdicts: Sequence[Check],
    tolerance: Tolerance,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the report says, and the repeats behind it."""
    plan = session.plan
    return {
        **facts,
        "profile": session.profile.name,
        "policies": list(plan.policies),
        "loads": [_load_text(load) for load in plan.loads],
        "repeats": session.repeats,
        "repeats_wanted": plan.repeats,
        "time_scales": {_load_text(load): scale for load, scale in session.time_scales.items()},
        "tolerance": {
            "name": tolerance.name,
            "stage_times": tolerance.stage,
            "throughput": tolerance.throughput,
            "mean_latency": tolerance.latency,
        },
        "cores_busy_with_others": session.load.others,
        "cores_stolen_by_host": session.load.stolen,
        "drift": drift(session.profile, session.pooled, session),
        "cases": [_case_json(one) for one in cases],
        "checks": [
            {"case": c.case.label, "what": c.what, "found": c.value, "allowed": c.allowed, "verdict": c.verdict}
            for c in verdicts
        ],
        "cells_looked_up": len(session.lookups),
        "cells_not_measured": sentence(session.unmeasured),
    }


def drift(before: Profile, now: Profile, session: Validation) -> dict[str, float]:
    """Median over the measured cells of now / as shipped, per table."""
    cells = session.passes[0]
    corun = [(now.corun[key[:2]][key[2]], before.corun.get(key[:2], {}).get(key[2])) for key in cells.beside]
    known = [(new, old) for new, old in corun if old is not None]
    tables = {
        "step_time": [now.steps[r].median / before.step_ns(r) for r in cells.steps],
        "chunk_time": [
            new.median / old.median
            for name in cells.chunks
            for new, old in zip(now.chunks[name], before.chunks[name], strict=True)
        ],
        "step_slowdown": [new.step.median / old.step.median for new, old in known],
        "chunk_slowdown": [new.chunk.median / old.chunk.median for new, old in known],
    }
    return {name: median(ratios) for name, ratios in tables.items() if ratios}


def _case_json(one: CaseErrors) -> dict[str, Any]:
    metrics = {}
    for key, metric in one.metrics.items():
        ends = (None,) * 3 if (e := metric.error) is None else (e.value, _finite(e.low), _finite(e.high))
        metrics[key] = {
            "measured": metric.measured,
            "predicted": metric.predicted,
            **dict(zip(("error", "error_low", "error_high"), ends, strict=True)),
            "judged_by": None if (by := metric.interval) is None or math.isinf(by.low) else [by.low, by.high],
            "error_is": METRICS[key][1],
            "repeats": [list(pair) for pair in metric.repeats],
        }
    return {
        "policy": one.case.policy,
        "load": _load_text(one.case.load),
        "metrics": metrics,
        "where": one.blame,
        "faults": one.faults,
        "dispatch_p50_s": one.dispatch_s,
    }


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def report_text(data: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    limits = data["tolerance"]
    others, stolen = data["cores_busy_with_others"], data["cores_stolen_by_host"]
    busy = ""
    if others is not None and stolen is not None:
        busy = f"Meanwhile other processes kept {others:.2f} cores busy and the host took {stolen:.2f} cores. "
    not_passed = [check for check in data["checks"] if check["verdict"] != "passed"]
    verdict = tally(check["verdict"] for check in data["checks"])
    lines = [
        f"# Prediction against hardware: {verdict}",
        "",
        f"Model {data['model']} on {data['device']} ({data['date']}; {data['software']}). Trace {data['trace']}, "
        f"{data['requests']} requests. {data['repeats']} of {data['repeats_wanted']} repeats; profile cells "
        f"and runs in turn, in one process. Warm-up {data['warm_up_s']:.1f} s, not part of any number."
        + (f" Execution: {data['execution']}." if "execution" in data else ""),
        "",
        *([f"**Another execution**: {why}.", ""] if (why := data.get("not_as_measured")) else []),
        "Errors are measured / predicted - 1 (stages: as a share of the predicted mean latency; lanes and skipping: "
        "points); medians over repeats with 95% intervals. "
        f"Tolerances '{limits['name']}': stage times {limits['stage_times']:.0%}, throughput "
        f"{limits['throughput']:.0%}, mean latency {limits['mean_latency']:.0%}. A check passes when the whole 95% "
        "interval of its error lies inside, fails when all of it lies outside, and is unclear otherwise; with fewer "
        "than 6 repeats the interval is Student's of the mean.",
        "",
        *_cells_lines(data),
        busy
        + "Against the shipped profile, the cells measured here are: "
        + ", ".join(f"{name.replace('_', ' ')} x {ratio:.2f}" for name, ratio in data["drift"].items())
        + " (medians).",
        "",
    ]
    for load in data["loads"]:
        lines += _load_table(load, [case for case in data["cases"] if case["load"] == load])
    lines += ["## Where prediction and reality part", ""]
    lines += [f"- {case['policy']}, load {case['load']}: {case['where']}." for case in data["cases"] if case["where"]]
    lines += ["", "## Checks that did not pass" if not_passed else "All checks passed.", ""]
    lines += [f"- {c['verdict']}: {c['case']}: {c['what']} {c['found']}; allowed: {c['allowed']}." for c in not_passed]
    return "\n".join(lines).rstrip() + "\n"


def _cells_lines(data: Mapping[str, Any]) -> list[str]:
    if data.get("cells_not_measured"):
        return [f"**Predictions looked up cells that were not measured here**: {data['cells_not_measured']}.", ""]
    looked_up = data.get("cells_looked_up")
    return [f"All {looked_up} cells that predictions looked up were measured here.", ""] if looked_up else []


def _load_table(load: str, cases: Sequence[Mapping[str, Any]]) -> list[str]:
    title = "Saturation (all requests at once)" if load == "saturation" else f"Load {load}"
    names = [case["policy"] for case in cases]
    lines = [f"## {title}", "", "| metric | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, (label, kind) in METRICS.items():
        if load == "saturation" and ("latency" in key or key.endswith("_mean_s")):
            continue
        cells = [_cell(case["metrics"].get(key), key, kind) for case in cases]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    idle = ["{:.2f} / {:.2f}".format(*(1e3 * case["dispatch_p50_s"][k] for k in ("step", "chunk"))) for case in cases]
    lines.append("| lane idle before a step / chunk, ms | " + " | ".join(idle) + " |")
    return [*lines, ""]


def _cell(metric: Mapping[str, Any] | None, key: str, kind: str) -> str:
    """``measured (error, interval)``."""
    if metric is None:
        return ""
    if kind == POINTS:
        value = f"{metric['measured']:.1%}"
    elif key == "request_throughput":
        value = f"{metric['measured']:.3g}/s"
    else:
        seconds = metric["measured"]
        value = f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    if metric["error"] is None:
        return value
    ends = [metric["error_low"], metric["error_high"]]
    interval = "" if None in ends else " [{:+.1%}, {:+.1%}]".format(*ends)
    return f"{value} ({metric['error']:+.1%}{interval})"


def _draw(
    out: Path, session: Validation, cases: Sequence[CaseErrors], tolerance: Tolerance, facts: Mapping[str, Any]
) -> None:
    import pandas as pd

    made_on = f"{facts['model']} on {facts['device']}, {session.repeats} repeats."
    rows = []
    for one in cases:
        for key in PICTURED:
            metric = one.metrics.get(key)
            if metric is None or metric.error is None or (one.case.saturated and "latency" in key):
                continue
            limit, error = tolerance.limit(key), metric.error
            band = math.nan if limit is None else limit
            rows.append((one.case.label, METRICS[key][0], error.value, error.low, error.high, band))
    errors = pd.DataFrame(rows, columns=["case", "metric", "error", "low", "high", "limit"])
    save(prediction_errors(errors, caption=made_on), out, "prediction-errors")
    points = [
        (f"load {_load_text(one.case.load)}", one.case.policy, predicted, measured)
        for one in cases
        if not one.case.saturated
        for _, predicted, measured in one.latencies
    ]
    if points:
        table = pd.DataFrame(points, columns=["load", "policy", "predicted_s", "measured_s"])
        save(request_scatter(table, caption=made_on), out, "requests")
    case = max((one.case for one in cases), key=lambda case: (not case.saturated, case.load, case.policy))
    observed = session.observations[case][session.repeats // 2]
    assert observed.predicted is not None
    predicted, measured = observed.predicted.frames[1], observed.measured.frames[1]
    begin_s, end_s = _shown_window(measured)
    figure = lane_chart(
        {"predicted": predicted, "measured": measured},
        (begin_s, end_s),
        estimated=False,
        title=f"The same {end_s - begin_s:.2g} s, predicted and measured: {case.label}",
        caption=f"Repeat {observed.repeat + 1}. {made_on}",
    )
    save(figure, out, "timelines")


def _shown_window(work: Any) -> tuple[float, float]:
    """About 25 steps from the middle of the run."""
    steps = work[work["kind"] == "step"].reset_index(drop=True)
    middle = len(steps) // 2
    last = min(len(steps) - 1, middle + SHOWN_STEPS)
    return float(steps["start_ns"][middle]) / 1e9, float(steps["end_ns"][last]) / 1e9


def _load_text(load: float) -> str:
    return "saturation" if math.isinf(load) else f"{load:g}"
