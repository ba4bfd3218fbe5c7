"""What the page of a sweep says: who is best by how much, on what it rests, and what was not looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from synerdiff.config.experiment import Experiment
from synerdiff.experiments.compare import MEASURES, At, Best, GridCell, PairedRuns, best_of_cells, compare, tied
from synerdiff.experiments.page import Page, Part, Printed, profile_table, provenance
from synerdiff.experiments.sweep import Results
from synerdiff.results.intervals import PairedRatio
from synerdiff.results.metrics import STAGES

SHOWN_LOAD = 0.8
"""At the load nearest to it policies are compared in sentences and tables."""
_MOST_ANSWERS = 3
_SAME_IMAGES = 0.005
"""A policy that skips a smaller share of the guided steps counts as one that never does."""
_GROUPS = {
    "The trade-off": ("tradeoff", "concurrency", "throughput-load"),
    "Paired ratios": ("latency-load", "comparison", "sizes", "ablation", "best-policy", "where-synerdiff-pays"),
    "Stage times": ("stages",),
    "Timelines": ("lanes-", "backlog-"),
    "Fidelity": (),
}
"""Section -> its figures, by how their names begin."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """The cells and the load that sentences are about."""

    paired: PairedRuns
    best: list[Best]
    load: float | None


def sweep_page(
    experiment: Experiment, results: Results, parts: Sequence[Printed], figures: Sequence[str], caption: str
) -> Page:
    """``parts``: the tables that the sweep prints; ``figures``: those that were drawn; ``caption``: how it was run."""
    shown, rows = _shown(experiment, results), _in_order(experiment, results, results.rows)
    at_load = [row for row in rows if shown.load is not None and row["load"] == shown.load]
    stages = {f"{stage.replace('_', ' ')}, s": f"{stage}_mean_s" for stage in STAGES}
    tables = {
        "Paired ratios": _ratio_table(shown),
        "Stage times": _means(at_load, {**stages, "all, s": "request_latency_mean_s"}),
        "Fidelity": _means(at_load, {"mean SSIM against full guidance": "ssim"}),
    }
    rest = [
        name for name in figures if not any(name.startswith(start) for starts in _GROUPS.values() for start in starts)
    ]
    sections = []
    for title, starts in {**_GROUPS, "Figures": rest}.items():
        own = [name for start in starts for name in figures if name.startswith(start)]
        table = tables.get(title)
        if own or table:
            lines = [f"At load {shown.load:g}:", table] if table else []
            sections.append(Part(title=title, lines=lines, figures=own))
    return Page(
        kind="sweep",
        name=experiment.name,
        question=_question(experiment, results),
        answer=_answer(experiment, shown),
        setting=_in_a_line(experiment, results),
        parts=[
            *sections,
            Part(title="All results", lines=parts, folded=True),
            Part(title="Setting", lines=_setting(experiment, results, caption)),
        ],
        gaps=_gaps(experiment, results, shown, tables["Fidelity"] is not None),
        versions=results.versions,
    )


def _shown(experiment: Experiment, results: Results) -> _Shown:
    rows, fleets = results.rows, experiment.report == "adapters"
    replayed = {workload.name for workload in experiment.workloads if workload.backlog}
    kept = _in_order(experiment, results, [row for row in rows if row["workload"] not in replayed] or rows)
    paired = compare(kept, by="fleet" if fleets else "policy")
    loads = {row["load"] for row in kept} - {None}
    load = min(loads, key=lambda load: abs(load - SHOWN_LOAD), default=None)
    names = [fleet.name for fleet in experiment.fleets] if fleets else experiment.policy_names
    best = best_of_cells(paired, names, experiment.baselines or (experiment.reference,))
    return _Shown(paired, [row for row in best if load is not None and row.load == load], load)


def _in_order(experiment: Experiment, results: Results, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By profile, then by policy, as the experiment lists them; else as they are."""
    profiles, policies = [profile.name for profile in results.profiles], experiment.policy_names
    return sorted(rows, key=lambda row: (profiles.index(row["profile"]), policies.index(row["policy"])))


def _question(experiment: Experiment, results: Results) -> str:
    fleets = experiment.report == "adapters"
    what = f"{len(experiment.fleets)} fleets" if fleets else f"{len(experiment.policies)} policies"
    machines = _listed([profile.name for profile in results.profiles])
    work = _listed([workload.name for workload in experiment.workloads])
    if experiment.max_concurrency:
        return f"What do {what} bring on {machines} when {work} keeps a number of requests in the system?"
    return f"Which of {what} is fastest on {machines} under {work}, at which load?"


def _in_a_line(experiment: Experiment, results: Results) -> str:
    profiles = ", ".join(f"{profile.name} ({profile.provenance})" for profile in results.profiles)
    works = ", ".join(
        f"{work.name} (generated)" if work.trace is None else f"{work.name} (trace {work.trace})"
        for work in experiment.workloads
    )
    return f"Profiles: {profiles}. Workloads: {works}. {len(results.rows):,} simulated runs."


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _answer(experiment: Experiment, shown: _Shown) -> list[str]:
    """A sentence per cell on the mean latency; of many cells how often each policy is best."""
    rows = [row for row in shown.best if row.measure == "mean"]
    if not rows:
        return ["The tables and figures below answer it; no two policies are compared at one load here."]
    at = ("mean", shown.load)
    if len(rows) > _MOST_ANSWERS:
        wins = ", ".join(f"{name} in {count}" for name, count in Counter(row.policy for row in rows).most_common())
        untold = sum(bool(row.ties) for row in rows)
        return [
            f"By mean latency at load {shown.load:g} the best of {len(rows)} cells is {wins}; in {untold} of them the "
            "interval does not tell it from another."
        ]
    lines, notes = [], []
    for row in rows:
        lines.append(_best_sentence(shown.paired, row, at))
        skips = shown.paired.skips
        same = [
            name
            for name in experiment.policy_names
            if skips.get((row.cell, shown.load, name), 0.0) < _SAME_IMAGES and name not in _fewer_steps(experiment)
        ]
        unchanged = shown.paired.best(row.cell, at, same)
        if row.policy not in same and unchanged is not None:
            notes.append(
                f"With {row.policy} images change; of the policies that change none, {unchanged} is the fastest."
            )
    return [*lines, *dict.fromkeys(notes)]


def _fewer_steps(experiment: Experiment) -> set[str]:
    return {entry.name for entry in experiment.policies if entry.steps_scale < 1}


def _best_sentence(paired: PairedRuns, row: Best, at: At) -> str:
    seeds, mean = row.gain.seeds, fmean(paired.values[row.cell][at][row.policy].values())
    text = f"On {row.cell.machine} under {row.cell.asked} at load {row.load:g} the lowest mean latency is that of "
    text += f"{row.policy}: {mean:.3g} s"
    if row.policy != row.baseline:
        told = ", which the interval does not tell apart" if tied(row.gain) else ""
        text += f", {_change(row.gain)} of {row.baseline}'s{told}"
    if row.ties:
        text += f"; not told from it: {', '.join(row.ties)}"
    return f"{text} ({seeds} paired runs)." if seeds > 1 else f"{text} (one run, so no interval)."


def _change(gain: PairedRatio) -> str:
    """``71% [63%, 80%]``: a latency as a share of another's, from how much better it is."""
    if gain.seeds < 2:
        return f"{1 / gain.ratio:.0%}"
    return f"{1 / gain.ratio:.0%} [{1 / gain.high:.0%}, {1 / gain.low:.0%}]"


def _ratio_table(shown: _Shown) -> Printed | None:
    """Per cell and policy: how much better than the best baseline, by each measure."""
    paired, headers, rows = shown.paired, ["cell", "policy", "against"], []
    measures = [
        name for name in ("mean", "p99", "goodput") if any((name, shown.load) in at for at in paired.values.values())
    ]
    if shown.load is None or not measures:
        return None
    for cell, values in paired.values.items():
        base = next((row.baseline for row in shown.best if row.cell == cell and row.measure == "mean"), None)
        if base is None:
            continue
        for name in values["mean", shown.load]:
            gains = [_ratio(paired, cell, (measure, shown.load), name, base) for measure in measures]
            skip = f"{paired.skips[cell, shown.load, name]:.0%}"
            rows.append([cell.text, name, base, *("1" if name == base else gain for gain in gains), skip])
    titles = [f"{MEASURES[measure].title}, ratio [95%]" for measure in measures]
    return [*headers, *titles, "guidance skipped"], rows


def _ratio(paired: PairedRuns, cell: GridCell, at: At, name: str, base: str) -> str:
    """A policy's value over the baseline's."""
    better = MEASURES[at[0]].larger_is_better
    gain = paired.gain(cell, at, name, base) if better else paired.gain(cell, at, base, name)
    return "-" if gain is None else str(gain)


def _means(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Printed | None:
    """Per cell and policy the means over runs of these columns; None where no run has them all."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if all(row.get(column) is not None for column in columns.values()):
            found.setdefault((GridCell.of(row).text, row["policy"]), []).append(row)
    lines = [
        [*place, *(f"{fmean(run[column] for run in runs):.4g}" for column in columns.values())]
        for place, runs in found.items()
    ]
    return (["cell", "policy", *columns], lines) if lines else None


def _setting(experiment: Experiment, results: Results, caption: str) -> list[Any]:
    works = []
    for workload in experiment.workloads:
        given = ", ".join(f"{name} {value}" for name, value in workload.parameters.items())
        source = workload.generator or f"trace {workload.trace}"
        loads = ", ".join(f"{load:g}" for load in experiment.loads_of(workload))
        works.append(
            [workload.name, f"{source} ({given})" if given else source, "-" if experiment.max_concurrency else loads]
        )
    libraries = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return [profile_table(results.profiles), (["workload", "source", "loads"], works), caption, f"{libraries}."]


def _gaps(experiment: Experiment, results: Results, shown: _Shown, judged: bool) -> list[str]:
    rows = results.rows
    gaps = [provenance(profile) for profile in results.profiles if profile.provenance != "measured"]
    if any(profile.estimated for profile in results.profiles):
        gaps.append("On an estimated profile compare policies; seconds and rates are as good as the estimate.")
    lost = sum(row["error_request_count"] for row in rows)
    if lost:
        runs = sum(bool(row["error_request_count"]) for row in rows)
        gaps.append(f"{lost:,} requests of {runs} runs were not served; latencies are of those that were.")
    missing = sum(row["request_latency_mean_s"] is None for row in rows)
    if missing:
        gaps.append(f"{missing} runs have no latency, since none of their measured requests was served.")
    loads = sorted({row["load"] for row in rows} - {None})
    if loads:
        between = f"Loads tried: {', '.join(f'{load:g}' for load in loads)}. Nothing is known between and beyond them"
        gaps.append(
            f"{between}{'; at 1 and above latency grows with the length of the run' if loads[-1] >= 1 else ''}."
        )
    alone = {row.cell.text for row in shown.best if row.gain.seeds < 2}
    if alone:
        gaps.append(f"No intervals, since there is one run a cell: {_listed(sorted(alone))}.")
    unclaimed = sum(not row["p99_claimable"] for row in rows)
    if unclaimed:
        gaps.append(f"{unclaimed:,} of {len(rows):,} runs are too short to claim a P99 at 99% confidence alone.")
    skipping = any((row["skip_fraction"] or 0) > 0 for row in rows) or _fewer_steps(experiment)
    if skipping and not judged:
        gaps.append("What skipping guidance or fewer steps do to the images was not measured here.")
    replayed = [workload.name for workload in experiment.workloads if workload.backlog]
    if replayed:
        gaps.append(f"{_listed(replayed)}: replayed as a history, one seed a picture; no policy is judged by it.")
    return gaps
