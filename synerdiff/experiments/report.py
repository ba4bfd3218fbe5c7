"""What a sweep shows: lines to print, tables in files, figures. Data comes first: figures are drawn from it at the end,
and only those whose data changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from synerdiff.config.experiment import Experiment, Slo, Workload, load_experiment
from synerdiff.experiments.adapter_mix import CURVES_FILE, cache_curves
from synerdiff.experiments.backends import make_backend
from synerdiff.experiments.compare import (
    MEASURES,
    At,
    Best,
    GridCell,
    PairedRuns,
    best_of_cells,
    compare,
    shortfalls,
    tied,
)
from synerdiff.experiments.grid import Grid
from synerdiff.experiments.layouts import ablation
from synerdiff.experiments.page import Printed, write_page
from synerdiff.experiments.run import execute, prepare
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.store import ROOT, code_hash, run_file
from synerdiff.experiments.sweep import Results, read_manifest, run_sweep, write_manifest
from synerdiff.experiments.sweep_page import SHOWN_LOAD, sweep_page
from synerdiff.figures.adapters import cache_figure, strategy_map, strategy_steps
from synerdiff.figures.comparison import best_policy_map, compare_at, gain_map, paired_comparison
from synerdiff.figures.lanes import lane_chart, where_the_time_goes
from synerdiff.figures.load import (
    against_concurrency,
    backlog_over_time,
    latency_against_load,
    latency_by_size,
    throughput_against_load,
    throughput_against_p99,
)
from synerdiff.figures.style import save
from synerdiff.files import atomic, claim_folder, naming, sha256_of_files
from synerdiff.profile.tables import pixels_of
from synerdiff.results.folder import STATES, UTILISATION
from synerdiff.results.intervals import PairedRatio, paired_log_ratio
from synerdiff.results.metrics import SLO_FACTOR, TAIL_PERCENT, WARMUP_PERCENT, measured
from synerdiff.results.records import REQUEST_COLUMNS, read_table

if TYPE_CHECKING:
    import pandas

FIGURES = "figures"
TOLERANCE = 0.02
WATCHED = "synerdiff-feedback"
"""Whose gain over the best baseline the map over contention and load shows."""
CLAIMS = {"saturation": "1.6x", "mean": "up to -78.7%", "p99": "up to -78.7%"}
"""SynerDiff's paper, abstract."""
_PANELS = 3
_TITLES = {"saturation": "throughput at saturation", "mean": "mean latency", "p99": "P99 latency"}
_COLUMNS = (
    ("mean s", "request_latency_mean_s"),
    ("P99 s", "request_latency_p99_s"),
    ("requests/s", "request_throughput"),
    ("images/s", "image_throughput"),
    ("goodput/s", "goodput"),
    ("skipped", "skip_fraction"),
)

Row = Mapping[str, Any]
Draw = Callable[[], Any]
"""Makes a figure."""


@dataclass(slots=True)
class Report:
    """What one kind of report makes of the rows."""

    parts: list[Printed] = field(default_factory=list)
    """To print."""
    texts: dict[str, str] = field(default_factory=dict)
    """File -> content."""
    figures: dict[str, Draw] = field(default_factory=dict)


def open_sweep(
    file: Path, out: Path | None, jobs: int | None, backend: str, address: str | None = None
) -> Callable[[Callable[[int, int], None]], list[Printed]]:
    """What runs an experiment's file, telling its progress, reports it, and gives what is to be printed.

    InputError before any work for what does not fit.
    """
    experiment = load_experiment(file)
    runner = make_backend(backend, experiment.jobs if jobs is None else jobs, address)
    folder = Path("results") / experiment.name if out is None else out
    claim_folder(folder, f"sweep {experiment.name}")
    with naming(file):
        grid = Grid(experiment, file.parent, folder)
    return lambda on_progress: publish(experiment, run_sweep(grid, runner, on_progress))


def publish(experiment: Experiment, results: Results) -> list[Printed]:
    """Write the texts, draw the figures whose data changed, and write the page; what is to be printed."""
    report = KINDS[experiment.report](experiment, results)
    for name, text in report.texts.items():
        with atomic(results.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    drawn = _draw(report, experiment, results) if experiment.figures else 0
    counts = (
        f"{results.folder}: {len(results.rows)} runs, {results.computed} computed now and {results.reused} found "
        "(those that compared batch sizes included)"
    )
    pictures = f"{results.folder / FIGURES}: {len(report.figures)} figures, {drawn} drawn now"
    figures = [*report.figures] if experiment.figures else []
    caption = _caption(experiment, results)
    page = write_page(results.folder, sweep_page(experiment, results, report.parts, figures, caption))
    return [*report.parts, counts, *([pictures] if experiment.figures else []), f"{page}: the page"]


def _draw(report: Report, experiment: Experiment, results: Results) -> int:
    """How many figures were drawn: those that are missing, or whose data, texts or code changed."""
    code = [*sorted((ROOT / "synerdiff" / "figures").glob("*.py")), Path(__file__)]
    known = [experiment.model_dump(mode="json"), results.rows, report.texts, code_hash(), sha256_of_files(code)]
    now = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    manifest = read_manifest(results.folder)
    done: dict[str, str] = {name: hash for name, hash in manifest.get("figures", {}).items() if name in report.figures}
    stale = [
        name
        for name in report.figures
        if done.get(name) != now
        or not all((results.folder / FIGURES / f"{name}.{kind}").is_file() for kind in ("png", "svg"))
    ]
    for name in stale:
        save(report.figures[name](), results.folder / FIGURES, name)
        done[name] = now
        write_manifest(results.folder, {**manifest, "figures": done})
    return len(stale)


# Latency against load


def _curves(experiment: Experiment, results: Results) -> Report:
    """Load curves show the workloads that are not replayed as backlog; every replayed one has a picture a profile."""
    slo = experiment.slo or Slo(solo_multiple=SLO_FACTOR)
    limits = f"{slo.seconds:g} s" if slo.seconds else f"{slo.solo_multiple:g} times the latency alone"
    parts = _result_parts(results.rows, experiment.policy_names, experiment.reference, limits)
    report = Report([*_batch_parts(results.batches), *parts])
    if experiment.max_concurrency:
        if "concurrency" in experiment.figures:
            caption = _caption(experiment, results)
            closed = _frame(results.rows).sort_values(["profile", "workload", "seed"], kind="stable")
            report.figures["concurrency"] = partial(against_concurrency, closed, caption=caption)
        return report
    runs = _frame(row for row in results.rows if row["load"] is not None)
    order = {name: place for place, name in enumerate(experiment.policy_names)}
    runs = runs.assign(place=runs["policy"].map(order))
    runs = runs.sort_values(["profile", "workload", "load", "seed", "place"], kind="stable")
    curves = [workload for workload in experiment.workloads if not workload.backlog]
    shown = runs[~runs["backlog_of"].isin([workload.name for workload in experiment.workloads if workload.backlog])]
    caption = _caption(experiment, results, curves)
    figures: dict[str, Draw] = {}
    if curves:
        loads = sorted(shown["load"].unique())
        spread = loads if len(loads) <= _PANELS else [loads[0], loads[len(loads) // 2], loads[-1]]
        figures = {
            "latency-load": partial(latency_against_load, shown, baseline=experiment.reference, caption=caption),
            "comparison": partial(compare_at, shown, baseline=experiment.reference, caption=caption),
            "throughput-load": partial(throughput_against_load, shown, caption=caption),
            "tradeoff": partial(throughput_against_p99, shown, caption=caption),
            "stages": partial(where_the_time_goes, shown, spread, caption=caption),
        }
        if "sizes" in experiment.figures:
            by_size = _by_size(results, shown)
            if len(by_size):
                baseline = experiment.reference
                figures["sizes"] = partial(latency_by_size, by_size, baseline=baseline, caption=caption)
                report.texts["sizes.csv"] = by_size.to_csv(index=False)
        if "lanes" in experiment.figures:
            figures |= {
                f"lanes-{profile}": partial(_lanes, results, part) for profile, part in shown.groupby("profile")
            }
    if len(experiment.policies) == 1:
        figures.pop("comparison", None)
    report.figures = {name: draw for name, draw in figures.items() if name in experiment.figures or "lanes-" in name}
    for workload in experiment.workloads if "backlog" in experiment.figures else ():
        if workload.backlog:
            part = runs[runs["backlog_of"] == workload.name]
            for (profile, load, seed), group in part.groupby(["profile", "load", "seed"], sort=False):
                name = f"backlog-{workload.name}-{profile}-load{load:g}-{seed}"
                report.figures[name] = partial(_backlog, workload, results, group)
    return report


def _frame(rows: Iterable[Row]) -> pandas.DataFrame:
    """The rows for load curves: a profile's name says how it was changed, a workload's how many LoRAs it asks for."""
    named = []
    for row in rows:
        cell = GridCell.of(row)
        named.append({**row, "backlog_of": row["workload"], "profile": cell.machine, "workload": cell.asked})
    return frame_of(named)


def frame_of(rows: Sequence[Row]) -> pandas.DataFrame:
    """Rows as a data frame, for pictures."""
    import pandas

    return pandas.DataFrame(rows)


def _by_size(results: Results, runs: pandas.DataFrame) -> pandas.DataFrame:
    """Mean latency of each run's requests by their resolution, at the load nearest the one that is shown."""
    import pandas

    load = min(runs["load"].unique(), key=lambda load: abs(load - SHOWN_LOAD))
    parts = []
    for run in runs[runs["load"] == load].to_dict("records"):
        grid_run = results.grid_runs[str(run["key"])]
        if len({request.size for request in arrivals(grid_run.source).requests}) < 2:
            continue
        table = measured(read_table(run_file(results.folder, run["key"]), REQUEST_COLUMNS)[0].to_pandas())
        sizes: Any = table[table["status"] == "done"].groupby(["height", "width"], sort=False)
        for (height, width), latency in sizes["request_latency_s"]:
            parts.append(
                {
                    **{name: run[name] for name in ("profile", "estimated", "workload", "policy", "seed", "load")},
                    "size": pixels_of((int(height), int(width))),
                    "pixels": int(height * width),
                    "requests": len(latency),
                    "request_latency_mean_s": float(latency.mean()),
                    "request_latency_p99_s": float(latency.quantile(0.99)),
                }
            )
    return pandas.DataFrame(parts)


def _lanes(results: Results, runs: pandas.DataFrame) -> Any:
    """Some seconds of every policy on one profile: one run of each, replayed, for the records keep no work."""
    load = min(runs["load"].unique(), key=lambda load: abs(load - SHOWN_LOAD))
    first = runs[runs["load"] == load]
    first = first[first["workload"] == first["workload"].iloc[0]]
    first = first[first["seed"] == first["seed"].iloc[0]]
    works = {
        str(run["policy"]): execute(prepare(results.grid_runs[str(run["key"])].spec)).frames[1]
        for run in first.to_dict("records")
    }
    return lane_chart(
        works,
        estimated=bool(first["estimated"].any()),
        title=f"What the lanes do: {first['profile'].iloc[0]}",
        caption=f"{first['workload'].iloc[0]} at load {load:g}, the same seconds of the same arrivals.",
    )


def _backlog(workload: Workload, results: Results, group: pandas.DataFrame) -> Any:
    """One picture per profile, load and replicate: a backlog is one history, not a mean."""
    runs = group.to_dict("records")
    tables = {str(run["policy"]): read_table(run_file(results.folder, run["key"]), {})[0].to_pandas() for run in runs}
    batches = [f"{run['policy']} {run['batch']:g}" for run in runs if run["batch"] == run["batch"]]
    first = runs[0]
    caption = f"{workload.name} on {first['profile']}, mean load {first['load']:g}. "
    if batches:
        caption += f"Batch sizes: {', '.join(batches)}. "
    return backlog_over_time(
        tables,
        estimated=any(run["estimated"] for run in runs),
        time_scale=float(first["time_scale"]),
        title=f"Requests in the system: {workload.name}",
        caption=caption + _drops([workload], results.dropped),
    )


def _batch_parts(batches: Sequence[Row]) -> list[Printed]:
    """The batch sizes that were compared, and the best."""
    rows = []
    for choice in batches:
        column, unit = ("saturation_throughput", "/s") if choice["load"] is None else ("request_latency_mean_s", " s")
        tried = ", ".join(f"{batch}: {_mean_text([value])}{unit}" for batch, value in choice[column].items())
        cell = GridCell.of(choice)
        best = str(choice["best_batch"])
        rows.append((cell.machine, cell.asked, _load(choice["load"]), choice["policy"], best, tried))
    title = "Best batch size: the least mean latency, at saturation the highest throughput, of those that were tried"
    return [title, (("machine", "workload", "load", "policy", "best", "tried"), rows)] if rows else []


def _result_parts(rows: Sequence[Row], policies: Sequence[str], reference: str, slo: str) -> list[Printed]:
    """One table per cell: by policy (in the order given) and load, means over the replicates."""
    groups: dict[GridCell, list[Row]] = {}
    for row in rows:
        groups.setdefault(GridCell.of(row), []).append(row)
    parts: list[Printed] = []
    headers = (
        *("policy", "load", "batch", f"mean / that of {reference}", *(title for title, _ in _COLUMNS)),
        *("time scale", "lane busy", "of its capacity", "state"),
    )
    for cell, members in groups.items():
        table = []
        offers = sorted({_offer(row) for row in members})
        for policy in policies:
            for offer in offers:
                own = [row for row in members if row["policy"] == policy and _offer(row) == offer]
                base = [row for row in members if row["policy"] == reference and _offer(row) == offer]
                values = [_mean_text(_value(row, name) for row in own) for _, name in _COLUMNS]
                batch, most = own[0]["batch"], own[0].get("max_concurrency")
                offered = _load(own[0]["load"]) if most is None else f"{most} at once"
                ratio = "-" if policy == reference else _ratio(own, base)
                scale, share = (_mean_of(own, name) for name in ("time_scale", "policy_load"))
                how_full = [scale, _busy(own), share, _words(own)]
                table.append([policy, offered, "-" if batch is None else str(batch), ratio, *values, *how_full])
        replicates = len({row["seed"] for row in members})
        estimated = " (estimated)" * bool(members[0]["estimated"])
        parts += [
            f"{cell.text}{estimated}, means over {replicates} run{'s' if replicates > 1 else ''}; SLO of a request "
            f"without one of its own: {slo}",
            (headers, table),
        ]
    return parts


def _busy(rows: Sequence[Row]) -> str:
    """How busy the denoise lanes are: mean of all runs and workers."""
    own = [row[name] for row in rows for name in row if name.startswith(UTILISATION) and name.endswith("_denoise")]
    return _mean_text(own, ".0%")


def _words(rows: Sequence[Row]) -> str:
    """What the runs are called, each word once."""
    words = {row.get("state") for row in rows}
    return " to ".join(word for word in STATES if word in words) or "-"


def _offer(row: Row) -> tuple[float, float]:
    """Load and requests at a time, infinite where there is none: rows with equal ones are compared."""
    load, most = row["load"], row.get("max_concurrency")
    return inf if load is None else load, inf if most is None else most


def _load(load: float | None) -> str:
    return "all wait" if load is None else f"{load:g}"


def _value(row: Row, column: str) -> float | None:
    """A metric of a row; at saturation images a second are those of the saturated time."""
    saturated = _offer(row) == (inf, inf) and column == "image_throughput"
    return row.get("saturation_throughput") if saturated else row.get(column)


def _ratio(rows: Sequence[Row], reference: Sequence[Row]) -> str:
    """Paired by replicate, because all policies see the same arrivals; with the 95% interval."""
    mine, theirs = (
        {row["seed"]: value for row in part if (value := row["request_latency_mean_s"]) is not None}
        for part in (rows, reference)
    )
    if len(mine) < len(rows) or len(theirs) < len(reference):
        return "-"
    ratio = paired_log_ratio(mine, theirs)
    return f"{ratio.ratio:.3f} ({ratio.low:.3f}-{ratio.high:.3f})" if ratio.seeds > 1 else f"{ratio.ratio:.3f}"


def _mean_of(rows: Sequence[Row], column: str) -> str:
    return _mean_text(row.get(column) for row in rows)


def _mean_text(values: Iterable[float | None], form: str = ".4g") -> str:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return format(fmean(known), form) if known else "-"


# Comparisons


def _comparison(experiment: Experiment, results: Results) -> Report:
    """Per cell and measure: every policy against each baseline, beside the paper's claim."""
    paired, baselines = compare(results.rows), experiment.baselines
    lines: list[str] = []
    for cell, at in _places(paired):
        where = "at saturation" if at[1] is None else f"at load {at[1]:g}"
        lines += [f"### {MEASURES[at[0]].title} {where}: {cell.text}", ""]
        rows = []
        for policy in experiment.policy_names:
            cells = [_gain_text(paired, cell, at, policy, other) for other in baselines]
            rows.append([policy, *cells, f"{paired.skips[cell, at[1], policy]:.0%}"])
        table = _markdown(["policy", *(f"against {name}" for name in baselines), "skipped"], rows)
        if at[0] in CLAIMS:
            table.insert(2, "| *the paper's claim* | " + " | ".join([f"*{CLAIMS[at[0]]}*"] * len(baselines)) + " | |")
        lines += [*table, ""]
    return Report(list(lines), {"comparison.md": "\n".join(lines) + "\n"})


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    first, *others = (f"| {' | '.join(row)} |" for row in (headers, *rows))
    return [first, "|---" * len(headers) + "|", *others]


def _places(paired: PairedRuns) -> Iterable[tuple[GridCell, At]]:
    """Goodput left out: it says how many deadlines are met, not how fast."""
    return ((cell, at) for cell, measures in paired.values.items() for at in measures if at[0] != "goodput")


def _gain_text(paired: PairedRuns, cell: GridCell, at: At, policy: str, other: str) -> str:
    gain = None if policy == other else paired.gain(cell, at, policy, other)
    if gain is None:
        return "-"
    if MEASURES[at[0]].larger_is_better:
        return _ratio_text(gain)
    change, low, high = _change(at, gain)
    return f"{change:+.0%} [{low:+.0%}, {high:+.0%}]"


def _change(at: At, gain: PairedRatio) -> tuple[float, float, float]:
    """(change, low, high) of the value itself: 0.1 is 10% more."""
    ends = (gain.ratio, gain.low, gain.high)
    if not MEASURES[at[0]].larger_is_better:
        ends = tuple(1 / end if end > 0 else inf for end in (gain.ratio, gain.high, gain.low))  # type: ignore[assignment]
    return (ends[0] - 1, ends[1] - 1, ends[2] - 1)


def _ablation(experiment: Experiment, results: Results) -> Report:
    """What each part adds, against the first baseline."""
    paired, base = compare(results.rows), experiment.baselines[0]
    records, rows = [], []
    several = len(experiment.loads) > 1
    for cell, at in _places(paired):
        for policy in experiment.policy_names:
            gain = paired.gain(cell, at, policy, base)
            skip = paired.skips[cell, at[1], policy]
            text = "-"
            if gain is not None:
                change, low, high = _change(at, gain)
                name = _TITLES.get(at[0], at[0]) + (f", load {at[1]:g}" if several and at[1] is not None else "")
                measure = {"measure": name, "larger": MEASURES[at[0]].larger_is_better}
                ratio = {"ratio": 1 + change, "low": 1 + low, "high": 1 + high, "skip_fraction": skip}
                marks = {"cell": cell.text, "policy": policy, "estimated": paired.estimated[cell]}
                records.append({**marks, **measure, **ratio})
                text = f"{change:+.1%} [{low:+.1%}, {high:+.1%}]"
            rows.append([cell.text, at[0], "" if at[1] is None else f"{at[1]:g}", policy, text, f"{skip:.0%}"])
    at_load = "" if several else f"Latencies at load {experiment.loads[0]:g}. "
    caption = at_load + _caption(experiment, results)
    title = "What each part adds"
    draw = partial(paired_comparison, frame_of(records), baseline=base, title=title, caption=caption)
    table = _markdown(["cell", "measure", "load", "policy", f"against {base}", "skipped"], rows)
    return Report(list(table), {"ablation.md": "\n".join(table) + "\n"}, {"ablation": draw})


def _map(experiment: Experiment, results: Results) -> Report:
    """Which policy is best where, and where SynerDiff is better than the best baseline."""
    paired, policies = compare(results.rows), experiment.policy_names
    best = best_of_cells(paired, policies, experiment.baselines, experiment.subject)
    at = experiment.loads[len(experiment.loads) // 2]
    caption = _caption(experiment, results)
    shown = [row for row in best if (row.measure, row.load) in (("saturation", None), ("mean", at))]
    panels = sorted({(row.measure, row.load) for row in shown}, reverse=True)  # saturation first
    frame = frame_of([{**_place(paired, row), "policy": row.policy, **_ends(row.gain)} for row in shown])
    title = "Which policy is best where"
    report = Report(figures={"best-policy": partial(best_policy_map, frame, panels, title=title, caption=caption)})
    if WATCHED in policies:
        gains = []
        for row in best:
            gain = paired.gain(row.cell, (row.measure, row.load), WATCHED, row.baseline)
            if gain is not None and row.cell.beside and row.measure in ("saturation", "mean"):
                gains.append({**_place(paired, row), **_ends(gain)})
        title = "Where SynerDiff pays"
        draw = partial(gain_map, frame_of(gains), policy=WATCHED, title=title, caption=caption)
        report.figures["where-synerdiff-pays"] = draw
    if experiment.subject:
        report.parts = list(_subject_lines(experiment.subject, shown, at))
    headers = ("cell", "measure", "load", "best", "tied with it", "best baseline", "gain", "gain of the subject")
    lines = []
    for row in best:
        load = "-" if row.load is None else f"{row.load:g}"
        ratios = [_ratio_text(row.gain), _ratio_text(row.subject_gain)]
        lines.append([row.cell.text, row.measure, load, row.policy, ", ".join(row.ties), row.baseline, *ratios])
    report.texts["map.md"] = "\n".join(_markdown(headers, lines)) + "\n"
    return report


def _place(paired: PairedRuns, row: Best) -> dict[str, Any]:
    marks = {"measure": row.measure, "load": row.load, "estimated": paired.estimated[row.cell]}
    return {**row.cell._asdict(), **marks}


def _ends(gain: PairedRatio) -> dict[str, float]:
    return {"gain": gain.ratio, "low": gain.low, "high": gain.high}


def _ratio_text(gain: PairedRatio | None) -> str:
    """``1.50x [1.40, 1.61]``"""
    if gain is None:
        return "-"
    return f"{gain.ratio:.2f}x [{gain.low:.2f}, {f'{gain.high:.2f}' if gain.high < inf else 'inf'}]"


def _subject_lines(subject: str, judged: Sequence[Best], at: float) -> list[str]:
    """How often the subject is within the tolerance of the best of the others, and where it is not."""
    behind = shortfalls(judged, TOLERANCE)
    good = len(judged) - len(behind)
    lines = [
        f"{subject} is within {TOLERANCE:.0%} of the best of the others, or better, in {good} of {len(judged)} "
        f"cells ({good / len(judged):.1%}; saturation throughput and mean latency at load {at:g})."
    ]
    for row in behind:
        assert row.subject_gain is not None  # shortfalls leaves those without out
        tie = ", which the interval does not tell apart" if tied(row.subject_gain) else ""
        gap = f"{1 - row.subject_gain.ratio:.1%}"
        lines.append(f"  behind {row.policy} by {gap} in {row.measure}: {row.cell.text}{tie}")
    return lines


# Adapters


def _adapters(experiment: Experiment, results: Results) -> Report:
    """Where each set of strategies pays, what each is worth alone, and what caches spare.

    The published cache curves stand beside where SYNERDIFF_DATA names their folder.
    """
    paired, base = compare(results.rows, by="fleet"), experiment.baselines[0]
    names = list(dict.fromkeys([base, *(fleet.name for fleet in experiment.each_fleet)]))
    ratios: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    for cell, measures in paired.values.items():
        for measure, load in measures:
            for name in names if measure in ("mean", "cost") else ():
                gain = paired.gain(cell, (measure, load), name, base)
                place = {"gpus": cell.gpus, "lora_share": cell.lora_share, "load": load or 0.0}
                ratios.append({"strategies": name, **place, "speedup": gain.ratio if gain else nan})
                text = "-" if gain is None else f"{gain.ratio:.3g}x"
                lines.append((name, str(cell.gpus), cell.asked, _load(load), text))
    folder = Path(os.environ.get("SYNERDIFF_DATA", ""))
    points = [asdict(point) for point in cache_curves(folder if (folder / CURVES_FILE).is_file() else None)]
    columns = ("name", "system", "gpus", "latency_s", "gpu_seconds")
    alone = [{name: getattr(case, name) for name in columns} for case in ablation()]
    service = str(experiment.workloads[0].parameters.get("service", "A"))
    caption = (
        "Load 1 is what as many GPUs sustain without any strategy. GPUs are divided between workers and services for "
        f"the highest throughput. Adapters as popular as in Katz's production service {service}. "
        + _caption(experiment, results)
    )
    estimated = any(paired.estimated[cell] for cell in paired.values)
    figures: dict[str, Draw] = {"strategies": partial(strategy_map, ratios, base, caption, estimated)}
    if len(names) == 1:
        figures.clear()
    figures |= {"strategies-alone": partial(strategy_steps, alone), "caches": partial(cache_figure, points)}
    texts = {
        f"{name}.csv": frame_of(rows).to_csv(index=False)
        for name, rows in (("speedups", ratios), ("alone", alone), ("caches", points))
    }
    headers = ("fleet", "GPUs", "workload", "load", f"times as good as {base}")
    return Report([(headers, lines)], texts, figures)


# Fleets


def _fleets(experiment: Experiment, results: Results) -> Report:
    """Every fleet beside the baseline of as many GPUs on the same arrivals: paired ratios, and latency against load."""
    paired, base = compare(results.rows, by="fleet"), experiment.baselines[0]
    names = list(dict.fromkeys([base, *(fleet.name for fleet in experiment.each_fleet)]))
    means: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        means.setdefault((GridCell.of(row)._replace(fleet=""), row["load"], row["fleet"]), []).append(row)
    lines: list[tuple[str, ...]] = []
    for cell, load, name in sorted(means, key=lambda place: (place[0].text, place[1] or inf, names.index(place[2]))):
        ratios = [paired.gain(cell, (measure, load), name, base) for measure in ("mean", "p99") if load is not None]
        ratios += [paired.gain(cell, ("saturation", load), name, base)] if load is None else []
        gains = ["-" if gain is None or name == base else _ratio_text(gain) for gain in ratios]
        own = [
            _mean_of(means[cell, load, name], column)
            for column in ("request_latency_mean_s", "request_latency_p99_s", "goodput")
        ]
        where = (name, str(cell.gpus), cell.asked, _load(load))
        lines.append((*where, *own, *gains, *["-"] * (2 - len(gains))))
    headers = ("fleet", "GPUs", "workload", "load", "mean s", "P99 s", "goodput/s", f"mean, better than {base}", "P99")
    shown = _frame({**row, "policy": row["fleet"], "fleet": ""} for row in results.rows if row["load"] is not None)
    figures: dict[str, Draw] = {}
    if len(shown) and len(names) > 1:
        shown["profile"] = [
            f"{profile}, {gpus} GPUs" for profile, gpus in zip(shown["profile"], shown["gpus"], strict=True)
        ]
        caption = "Load 1 is what as many single workers sustain. " + _caption(experiment, results)
        draw = partial(latency_against_load, shown, baseline=base, caption=caption)
        figures = {"fleets": draw, "fleets-p99": partial(draw, measure="request_latency_p99_s")}
    return Report([(headers, lines)], {}, figures)


# Captions


def _caption(experiment: Experiment, results: Results, some: Sequence[Workload] | None = None) -> str:
    """What a reader must know to judge a figure of all workloads, or of some."""
    texts, workloads = [], experiment.workloads if some is None else some
    generated = [workload for workload in workloads if workload.generator is not None]
    if generated:
        seeds = sorted({seed for workload in generated for seed in workload.seeds or experiment.seeds})
        counts = sorted({workload.requests or experiment.requests for workload in generated})
        size = " or ".join(f"{count:,}" for count in counts)
        texts.append(f"{size} requests a run, seeds {', '.join(str(seed) for seed in seeds)}.")
    if len(generated) < len(workloads):
        windows = sum(max(1, len(workload.windows)) for workload in workloads if workload.trace is not None)
        texts.append(f"{windows} windows of the trace, stretched in time to the load.")
    texts.append(f"First {WARMUP_PERCENT}% and last {TAIL_PERCENT}% of requests set aside.")
    batches = [experiment.batch, *(entry.batch for entry in experiment.policies)]
    if any(batch == "best" or isinstance(batch, tuple) for batch in batches):
        texts.append(
            "Each policy at the batch size of least mean latency"
            + (", at saturation of the highest throughput." if experiment.saturation else ".")
        )
    if experiment.skip_budget.fraction > 0:
        texts.append(f"At most {experiment.skip_budget.fraction:.0%} of an image's steps may skip guidance.")
    if experiment.skip_budget.min_ssim is not None:
        texts.append(f"Skips keep the mean SSIM at {experiment.skip_budget.min_ssim:g} or above (fidelity table).")
    if any(entry.steps_scale < 1 for entry in experiment.policies):
        texts.append(
            "Fewer steps, all guided, are the equal-cost baseline of skipping: what both do to images is known for "
            "digits only."
        )
    return " ".join([*texts, _drops(workloads, results.dropped)]).strip()


def _drops(workloads: Sequence[Workload], dropped: Mapping[str, Mapping[str, int]]) -> str:
    texts = []
    for workload in workloads:
        if workload.trace is None:
            continue
        if dropped.get(workload.name):
            counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped[workload.name].items())
            texts.append(f"{workload.name}: dropped {counts}.")
        if workload.format == "gentd26":
            one = workload.parameters.get("checkpoints", "one") == "one"
            bare = workload.parameters.get("adapters", "keep") == "drop"
            merged = " and ".join(["checkpoints"] * one + ["LoRAs"] * bare)
            texts.append(f"{merged[0].upper()}{merged[1:]} counted as one model." if merged else "")
    return " ".join(dict.fromkeys(text for text in texts if text))


KINDS: dict[str, Callable[[Experiment, Results], Report]] = {
    "curves": _curves,
    "comparison": _comparison,
    "map": _map,
    "ablation": _ablation,
    "adapters": _adapters,
    "fleets": _fleets,
}
"""Report -> what it shows."""
