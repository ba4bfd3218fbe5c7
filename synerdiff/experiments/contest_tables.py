"""What a contest found, as tables: paired ratios with intervals, winners per cell, and who falls short of the best.

A cell is (profile, contention, decode share, decode lanes, workload). Ratios are geometric means over seeds of runs on
the same requests, with 95% t intervals of the paired logarithms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any, NamedTuple

from synerdiff.results.intervals import PairedRatio, paired_log_ratio

Row = Mapping[str, Any]
MEASURES = {
    "saturation": "image_throughput",
    "mean": "request_latency_mean_s",
    "p99": "request_latency_p99_s",
    "goodput": "goodput",
}
"""Measure -> column; throughput and goodput are better when larger, latencies when smaller."""
LARGER_IS_BETTER = ("saturation", "goodput")


class CellKey(NamedTuple):
    profile: str
    contention: float
    decode_share: float
    decode_gpus: str
    workload: str


@dataclass(frozen=True, slots=True)
class Results:
    """The rows of a contest by cell, measure and policy."""

    values: Mapping[CellKey, Mapping[tuple[str, float | None], Mapping[str, Mapping[int, float]]]]
    """cell -> (measure, load) -> policy -> seed -> value. The load is None at saturation."""
    skips: Mapping[tuple[CellKey, float | None, str], float]
    """(cell, load, policy) -> mean share of guided sample-steps that skipped."""
    estimated: bool

    def gain(self, cell: CellKey, measure: str, load: float | None, policy: str, other: str) -> PairedRatio:
        """How much better: the ratio of the two, above 1 where ``policy`` is better."""
        values = self.values[cell][measure, load]
        mine, theirs = values[policy], values[other]
        return paired_log_ratio(mine, theirs) if measure in LARGER_IS_BETTER else paired_log_ratio(theirs, mine)

    def best(self, cell: CellKey, measure: str, load: float | None, among: Iterable[str]) -> str:
        """The best of these policies by mean over seeds; ties to the first."""
        values = self.values[cell][measure, load]
        sign = 1 if measure in LARGER_IS_BETTER else -1
        return max(among, key=lambda policy: sign * fmean(values[policy].values()))


def collect(rows: Sequence[Row]) -> Results:
    """Rows of ``run_contest`` by cell, measure and policy."""
    values: dict[CellKey, dict[tuple[str, float | None], dict[str, dict[int, float]]]] = {}
    skips: dict[tuple[CellKey, float | None, str], list[float]] = defaultdict(list)
    for row in rows:
        cell = CellKey(*(row[name] for name in CellKey._fields))
        load = row["load"]
        for measure, column in MEASURES.items():
            if (measure == "saturation") is (load is None) and row.get(column) is not None:
                place = values.setdefault(cell, {}).setdefault((measure, load), {})
                place.setdefault(row["policy"], {})[row["seed"]] = row[column]
        skips[cell, load, row["policy"]].append(row["skip_fraction"])
    means = {place: fmean(found) for place, found in skips.items()}
    return Results(values, means, any(row["estimated"] for row in rows))


@dataclass(frozen=True, slots=True)
class Winner:
    """The best policy of a cell, and its gain over the best baseline."""

    cell: CellKey
    measure: str
    load: float | None
    policy: str
    baseline: str
    gain: float
    focus_gain: float | None
    """The gain of the contest's focus over the best of the others; None without a focus."""


def winners(results: Results, policies: Sequence[str], baselines: Sequence[str], focus: str | None) -> list[Winner]:
    """Per cell and measure: who is best, the focus left out, and how the focus compares with that."""
    others = [policy for policy in policies if policy != focus]
    found = []
    for cell, measures in results.values.items():
        for measure, load in measures:
            best = results.best(cell, measure, load, others)
            baseline = results.best(cell, measure, load, baselines)
            gain = results.gain(cell, measure, load, best, baseline).ratio
            focus_gain = None if focus is None else results.gain(cell, measure, load, focus, best).ratio
            found.append(Winner(cell, measure, load, best, baseline, gain, focus_gain))
    return found


def headline_lines(results: Results, policies: Sequence[str], baselines: Sequence[str]) -> list[str]:
    """Markdown: per cell, throughput and latency cuts of every policy against each baseline, and the paper's claim."""
    lines: list[str] = []
    for cell, measures in results.values.items():
        for measure, load in measures:
            if measure == "goodput":
                continue
            at = "at saturation" if load is None else f"at load {load:g}"
            title = {"saturation": "Throughput", "mean": "Mean latency", "p99": "P99 latency"}[measure]
            lines += [f"### {title} {at}: {cell_text(cell)}", ""]
            lines.append("| policy | " + " | ".join(f"against {name}" for name in baselines) + " | skipped |")
            lines.append("|---" * (len(baselines) + 2) + "|")
            claim = "1.6x" if measure == "saturation" else "up to -78.7%"
            lines.append("| *the paper's claim* | " + " | ".join([f"*{claim}*"] * len(baselines)) + " | |")
            for policy in policies:
                cells = [_ratio_text(results, cell, measure, load, policy, other) for other in baselines]
                lines.append(f"| {policy} | " + " | ".join(cells) + f" | {results.skips[cell, load, policy]:.0%} |")
            lines.append("")
    return lines


def _ratio_text(results: Results, cell: CellKey, measure: str, load: float | None, policy: str, other: str) -> str:
    if policy == other:
        return "-"
    found = results.gain(cell, measure, load, policy, other)
    if measure in LARGER_IS_BETTER:
        return f"{found.ratio:.2f}x [{found.low:.2f}, {_high(found.high)}]"
    low, high = (1 / found.high - 1 if found.high < inf else -1), (1 / found.low - 1 if found.low > 0 else inf)
    return f"{1 / found.ratio - 1:+.0%} [{low:+.0%}, {high:+.0%}]"


def _high(value: float) -> str:
    return f"{value:.2f}" if value < inf else "inf"


def shortfalls(found: Sequence[Winner], tolerance: float = 0.02) -> list[Winner]:
    """The cells in which the focus is more than the tolerance behind the best of the others."""
    return [winner for winner in found if winner.focus_gain is not None and winner.focus_gain < 1 - tolerance]


def cell_text(cell: CellKey) -> str:
    """A cell in words."""
    place = "" if "0" in cell.decode_gpus.split(",") else ", decode on a second GPU"
    factors = f", contention x{cell.contention:g}" if cell.contention != 1 and not place else ""
    factors += f", decode x{cell.decode_share:g}" if cell.decode_share != 1 else ""
    return f"{cell.workload} on {cell.profile}{factors}{place}"
