"""Two results side by side: two runs paired by request, or two sweeps paired by seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.core import InputError
from synerdiff.experiments.page import Page, Part, Printed, write_page
from synerdiff.experiments.sweep import MANIFEST
from synerdiff.figures.pairs import paired_requests, paired_sweeps
from synerdiff.figures.style import save
from synerdiff.files import claim_folder
from synerdiff.results.folder import highest_load, how_full
from synerdiff.results.intervals import Interval, blocks_interval, paired_log_ratio, values_for_interval
from synerdiff.results.metrics import STAGES, measured, stages
from synerdiff.results.records import read_requests, read_table

if TYPE_CHECKING:
    import pandas

RUNS = "runs.parquet"
CELL = (
    *("profile", "contention", "decode_share", "decode_gpus", "fleet", "gpus", "workload", "lora_share"),
    *("policy", "max_concurrency", "load"),
)
"""Columns by which rows of two sweeps are the same cell; one in which each side has one value may differ."""
RATIOS = {
    "request_latency_mean_s": "mean latency",
    "request_latency_p99_s": "P99 latency",
    "request_throughput": "requests/s",
    "saturation_throughput": "images/s at saturation",
}
SATURATED = "saturation_throughput"


SideBySide = tuple[list[Printed], Callable[[], Any]]
"""What is printed, and what draws the figure of it."""


def compare_results(a: Path, b: Path, out: Path | None) -> list[Printed]:
    """Compare two folders; with ``out`` also draw it there. InputError for what is no result, or cannot be paired."""
    if out is not None:
        claim_folder(out, "compare")
    kinds = [_kind(folder) for folder in (a, b)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{a} is a {kinds[0]} and {b} a {kinds[1]}; two of one kind can be compared.")
    parts, draw = compare_sweeps(a, b) if kinds[0] == "sweep" else compare_runs(a, b)
    if out is not None:
        save(draw(), out, "compare")
        part = Part(title="Side by side", lines=parts[1:], figures=["compare"])
        gaps = ["What differs between the two is not explained here, only how much."]
        question, answer = f"How do {a.name} (A) and {b.name} (B) differ?", [str(parts[0])]
        page = Page(kind="compare", name=out.name, question=question, answer=answer, parts=[part], gaps=gaps)
        return [*parts, f"{write_page(out, page)}: the page; compare.png, compare.pdf"]
    return parts


def _kind(folder: Path) -> str:
    if (folder / MANIFEST).is_file() and (folder / RUNS).is_file():
        return "sweep"
    if (folder / "summary.json").is_file() and (folder / "requests.parquet").is_file():
        return "run"
    raise InputError(f"{folder}: this is neither the folder of a run nor of a finished sweep.")


# Two runs


def compare_runs(a: Path, b: Path) -> SideBySide:
    """Latencies of the same requests under two policies, on two GPUs, simulated and real."""
    summaries = [_summary(folder) for folder in (a, b)]
    tables = [measured(read_requests(folder)).set_index("request_id") for folder in (a, b)]
    _require_same_requests(a, b, tables)
    both = tables[0].index[(tables[0]["status"] == "done") & (tables[1]["status"] == "done")]
    if both.empty:
        raise InputError(f"{a} and {b}: no measured request is done in both, so nothing can be paired.")
    left, right = (table.loc[both].sort_values(["arrival_s"], kind="stable") for table in tables)
    loads = [load for summary in summaries if (load := highest_load(summary["run"])) is not None]
    load = max(loads) if len(loads) == 2 else None
    rows = []
    values = [table["request_latency_s"].astype(float) for table in (left, right)]
    interval = difference(values[0].tolist(), values[1].tolist(), load)
    rows.append(_row("latency, mean", [float(value.mean()) for value in values], interval))
    for rank in (50, 90, 99):
        rows.append(_row(f"latency, P{rank}", [float(value.quantile(rank / 100)) for value in values]))
    split = [stages(table) for table in (left, right)]
    for stage in STAGES:
        own = [part[stage] for part in split]
        means = [float(part.mean()) for part in own]
        rows.append(_row(f"{stage.replace('_', ' ')}, mean", means, difference(own[0].tolist(), own[1].tolist(), load)))
    rates = {"requests/s": "request_throughput", "goodput, 1/s": "goodput", "skipped": "skip_fraction"}
    rows += [_row(title, [summary[name] or 0.0 for summary in summaries]) for title, name in rates.items()]
    faster = int((values[1] < values[0]).sum())
    percent = "0 and" if rows[0][3] == "-" else f"{100 * float(rows[0][3]):.1f}% of"
    sentence = (
        f"B's mean latency is {percent} A's: {_signed(interval)} s over {len(both)} of "
        f"{len(tables[0])} measured requests, of which {faster} are faster in B."
    )
    if interval.low == float("-inf"):
        needed = values_for_interval(load)
        why = "the load is not below 1" if needed is None else f"{needed:,} measured requests are needed at this load"
        sentence += f" No interval: {why}."
    names = [_run_name(folder, summary) for folder, summary in zip((a, b), summaries, strict=True)]
    full = [_how_full(summary) for summary in summaries]
    told = [f"{side}: {name}{how}" for side, name, how in zip("AB", names, full, strict=True)]
    parts: list[Printed] = [sentence, *told, *_other_arrivals(summaries), ""]
    parts.append((["s", "A", "B", "B / A", "B - A [95%]"], [row[:5] for row in rows]))
    estimated = any(summary["run"].get("provenance") == "estimated" for summary in summaries)
    return parts, lambda: paired_requests(left, right, names, sentence, estimated)


def difference(a: list[float], b: list[float], load: float | None) -> Interval:
    """Mean of b - a in order of arrival, with an interval from means of blocks; infinite where there are too few."""
    paired = [y - x for x, y in zip(a, b, strict=True)]
    return blocks_interval(paired, values_for_interval(load))


def _require_same_requests(a: Path, b: Path, tables: list[pandas.DataFrame]) -> None:
    if list(tables[0].index) != list(tables[1].index):
        raise InputError(f"{a} and {b} have other requests ({len(tables[0])} and {len(tables[1])} measured ones).")
    for column in ("images", "steps"):
        if (tables[0][column] != tables[1][column]).any():
            raise InputError(
                f"{a} and {b}: the same requests ask for other {column}; only runs of one trace can be paired."
            )


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'summary.json'}: it cannot be read ({error}).") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("run"), dict) or "load" not in summary["run"]:
        raise InputError(f"{folder / 'summary.json'}: this is no run's summary.")
    return summary


def _run_name(folder: Path, summary: Mapping[str, Any]) -> str:
    run = summary["run"]
    how = f"measured on {run['device']}" if "device" in run else "simulated"
    return f"{folder.name}: {run.get('policy')} on {run.get('profile')}, {run.get('trace')}, {how}"


def _other_arrivals(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """That the same requests came at another pace, which alone changes latencies."""
    rates = [summary["run"].get("rate_per_s") for summary in summaries]
    if None in rates or abs(rates[1] / rates[0] - 1) < 1e-6:
        return []
    return [f"The requests came at another pace: {rates[0]:.4g} a second in A, {rates[1]:.4g} in B."]


def _how_full(summary: Mapping[str, Any]) -> str:
    """How full the run was; nothing of one that an earlier version wrote."""
    try:
        return f", {how_full(dict(summary))}"
    except KeyError:
        return ""


def _row(name: str, values: Sequence[float], interval: Interval | None = None) -> list[str]:
    a, b = values
    ratio = f"{b / a:.3f}" if a else "-"
    change = f"{b - a:+.3g}" if interval is None else _signed(interval)
    return [name, f"{a:.4g}", f"{b:.4g}", ratio, change]


def _signed(interval: Interval) -> str:
    if interval.low == float("-inf"):
        return f"{interval.value:+.3g}"
    return f"{interval.value:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


# Two sweeps


def compare_sweeps(a: Path, b: Path) -> SideBySide:
    """Geometric means over seeds of B / A, cell by cell, with t intervals."""
    tables = [read_table(folder / RUNS, {})[0].to_pylist() for folder in (a, b)]
    sides: list[list[dict[str, Any]]] = [[row for row in rows if row["purpose"] == "grid"] for rows in tables]
    alone = {column for column in CELL if all(len({row.get(column) for row in rows}) == 1 for rows in sides)}
    cells: list[dict[tuple[Any, ...], dict[int, Mapping[str, Any]]]] = [{}, {}]
    for rows, own in zip(sides, cells, strict=True):
        for row in rows:
            place = tuple(None if column in alone else row.get(column) for column in CELL)
            own.setdefault(place, {})[row["seed"]] = row
    lines, drawn = [], []
    for place in sorted(cells[0], key=lambda place: [(isinstance(part, str), part or 0) for part in place]):
        seeds = sorted(cells[0][place].keys() & cells[1].get(place, {}).keys())
        if not seeds:
            continue
        ratios = {}
        for column, title in RATIOS.items():
            values = [{seed: own[place][seed].get(column) or 0.0 for seed in seeds} for own in cells]
            waits = _from_the_start(cells[0][place][seeds[0]])
            if waits is (column == SATURATED) and all(value > 0 for side in values for value in side.values()):
                ratios[title] = paired_log_ratio(values[1], values[0])
        name = ", ".join(
            _worded(column, value) for column, value in zip(CELL, place, strict=True) if value not in (None, "")
        )
        name += f"{', ' * bool(name)}saturation" if _from_the_start(cells[0][place][seeds[0]]) else ""
        lines.append([name or "all", str(len(seeds))])
        drawn.append((name or "all", ratios))
    if not drawn:
        raise InputError(f"{a} and {b} have no cell in common ({', '.join(CELL)}, seed), so nothing can be paired.")
    titles = [title for title in RATIOS.values() if any(title in ratios for _, ratios in drawn)]
    lines = [
        [*line, *(str(ratios.get(t, "-")) for t in titles)] for line, (_, ratios) in zip(lines, drawn, strict=True)
    ]
    names = [_sweep_name(folder, rows, alone) for folder, rows in zip((a, b), sides, strict=True)]
    sentence = f"B / A on {len(drawn)} cells, paired by seed; below 1 B is lower. Ratios with 95% t intervals."
    left_out = len(cells[0].keys() ^ cells[1].keys())
    parts: list[Printed] = [sentence, f"A: {names[0]}", f"B: {names[1]}"]
    parts += [f"{left_out} cells are only in one of them and left out."] if left_out else []
    parts += ["", (["cell", "seeds", *titles], lines)]
    estimated = any(row.get("estimated") for rows in sides for row in rows)
    return parts, lambda: paired_sweeps(drawn, names, estimated)


def _from_the_start(row: Mapping[str, Any]) -> bool:
    """Whether all requests of the run waited from the start, so that only its throughput means something."""
    return row.get("load") is None and row.get("max_concurrency") is None


def _worded(column: str, value: Any) -> str:
    if column in ("profile", "fleet", "workload", "policy"):
        return str(value)
    return f"{column.replace('_', ' ')} {value:g}" if isinstance(value, int | float) else f"{column} {value}"


def _sweep_name(folder: Path, rows: list[dict[str, Any]], alone: set[str]) -> str:
    own = [str(rows[0].get(column)) for column in ("profile", "fleet", "workload", "policy") if column in alone]
    return f"{folder.name}: " + ", ".join(part for part in own if part not in ("", "None"))
