"""A contest's results on disk: rows.csv, tables in Markdown, and figures, in this order."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.config.contest import Contest
from synerdiff.experiments.contest_tables import (
    Results,
    Winner,
    cell_text,
    collect,
    headline_lines,
    shortfalls,
    winners,
)
from synerdiff.files import atomic
from synerdiff.results.intervals import PairedRatio

if TYPE_CHECKING:
    import pandas

TOLERANCE = 0.02
WATCHED = "synerdiff-feedback"
"""Whose gain over the best baseline the map over contention and load shows."""


def write_report(contest: Contest, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Write everything; the lines to print."""
    _write(folder / "rows.csv", _csv(rows))
    results = collect(rows)
    policies = [entry.name for entry in contest.policies]
    lines = [f"{folder}: {len(rows)} runs in {len(results.values)} cells"]
    if contest.report == "headline":
        table = headline_lines(results, policies, contest.baselines)
        _write(folder / "headline.md", "\n".join(table) + "\n")
        return [*table, *lines]
    if contest.report == "ablation":
        return [*_ablation(contest, results, policies, folder), *lines]
    return [*_winners(contest, results, policies, folder), *lines]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _caption(contest: Contest) -> str:
    budget = contest.skip_budget.budget
    generated = any(workload.generator is not None for workload in contest.workloads)
    text = f"{contest.requests:,} requests a run, seeds {', '.join(str(seed) for seed in contest.seeds)}."
    windows = sum(max(1, len(workload.windows)) for workload in contest.workloads if workload.trace is not None)
    if windows:
        text = (f"{text} " if generated else "") + f"{windows} windows of the trace, stretched in time to the load."
    text += " Every policy at its best batch size in every cell, on the same requests."
    if budget.fraction_ppm:
        text += f" At most {budget.fraction_ppm / 10_000:g}% of an image's steps may skip guidance."
    if any(entry.steps_scale < 1 for entry in contest.policies):
        text += " Fewer steps, all guided, are the rival of skipping: what both do to images is known for digits only."
    return text


def _winners(contest: Contest, results: Results, policies: Sequence[str], folder: Path) -> list[str]:
    from synerdiff.figures.comparison import best_policy_map, gain_map
    from synerdiff.figures.style import save

    found = winners(results, policies, contest.baselines, contest.focus)
    pairs = [results.gain(w.cell, w.measure, w.load, w.policy, w.baseline) for w in found]
    frame = _frame(
        [{**w.cell._asdict(), **_flat(asdict(w)), **_gain(pair)} for w, pair in zip(found, pairs, strict=True)], results
    )
    at = contest.loads[len(contest.loads) // 2]
    figure = best_policy_map(
        frame[frame["measure"].isin(["saturation", "mean"])],
        [("saturation", None), ("mean", at)],
        title="Which policy is best where",
        caption=_caption(contest),
    )
    save(figure, folder / "figures", "best-policy")
    if WATCHED in policies:
        gains = []
        for winner in found:
            if winner.measure in ("saturation", "mean") and "0" in winner.cell.decode_gpus.split(","):
                pair = results.gain(winner.cell, winner.measure, winner.load, WATCHED, winner.baseline)
                place = {"measure": winner.measure, "load": winner.load, **_gain(pair)}
                gains.append({**winner.cell._asdict(), **place})
        figure = gain_map(
            _frame(gains, results), policy=WATCHED, title="Where SynerDiff pays", caption=_caption(contest)
        )
        save(figure, folder / "figures", "where-synerdiff-pays")
    return _focus_lines(contest, found, at) if contest.focus else []


def _focus_lines(contest: Contest, found: Sequence[Winner], at: float) -> list[str]:
    """How often the focus is within the tolerance of the best of the others, and where it is not."""
    judged = [w for w in found if (w.measure, w.load) in (("saturation", None), ("mean", at))]
    behind = shortfalls(judged, TOLERANCE)
    good = len(judged) - len(behind)
    lines = [
        f"{contest.focus} is within {TOLERANCE:.0%} of the best of the others, or better, in {good} of {len(judged)} "
        f"cells ({good / len(judged):.1%}; saturation throughput and mean latency at load {at:g})."
    ]
    for winner in behind:
        gap = 1 - (winner.focus_gain or 0.0)
        lines.append(f"  behind {winner.policy} by {gap:.1%} in {winner.measure}: {cell_text(winner.cell)}")
    return lines


def _ablation(contest: Contest, results: Results, policies: Sequence[str], folder: Path) -> list[str]:
    from synerdiff.figures.comparison import paired_comparison
    from synerdiff.figures.style import save

    base = contest.baselines[0]
    records, lines = [], []
    for cell, measures in results.values.items():
        for measure, load in measures:
            if measure == "goodput":
                continue
            for policy in policies:
                found = results.gain(cell, measure, load, policy, base)
                ends = (found.ratio, found.low, found.high)
                if measure != "saturation":
                    ends = (1 / found.ratio, 1 / found.high, 1 / found.low)
                change, low, high = (end - 1 for end in ends)
                skip = results.skips[cell, load, policy]
                text = cell_text(cell)
                records.append(
                    {"cell": text, "policy": policy, "measure": measure, "load": load, "change": change, "low": low}
                    | {"high": high, "skip_fraction": skip}
                )
                lines.append(
                    f"| {text} | {measure} | {policy} | {change:+.1%} [{low:+.1%}, {high:+.1%}] | {skip:.0%} |"
                )
    table = [f"| cell | measure | policy | against {base} | skipped |", "|---|---|---|---|---|", *lines]
    _write(folder / "ablation.md", "\n".join(table) + "\n")
    frame = _frame(records, results)
    shares = {name: 1 + frame[old] for name, old in (("ratio", "change"), ("low", "low"), ("high", "high"))}
    names = {"saturation": "throughput at saturation", "mean": "mean latency", "p99": "P99 latency"}
    figure = paired_comparison(
        frame.assign(**shares, measure=frame["measure"].map(names), larger=frame["measure"] == "saturation"),
        baseline=base,
        title="What each part adds",
        caption=f"Latencies at load {contest.loads[0]:g}. {_caption(contest)}",
    )
    save(figure, folder / "figures", "ablation")
    return table


def _gain(pair: PairedRatio) -> dict[str, float]:
    return {"gain": pair.ratio, "low": pair.low, "high": pair.high}


def _flat(winner: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in winner.items() if name != "cell"}


def _frame(records: Sequence[Mapping[str, Any]], results: Results) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame([{**record, "estimated": results.estimated} for record in records])
