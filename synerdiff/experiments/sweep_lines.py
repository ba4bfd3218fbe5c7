"""A sweep's results as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from synerdiff.results.intervals import paired_log_ratio

_MEAN_LATENCY = "request_latency_mean_s"
_COLUMNS = (
    ("mean s", _MEAN_LATENCY),
    ("P99 s", "request_latency_p99_s"),
    ("requests/s", "request_throughput"),
    ("images/s", "image_throughput"),
    ("goodput/s", "goodput"),
    ("skipped", "skip_fraction"),
)

Row = Mapping[str, Any]


def batch_lines(batches: Sequence[Row]) -> list[str]:
    """The batch sizes that were compared, and the best."""
    if not batches:
        return []
    lines = ["Best batch size (mean latency of each size that was tried)"]
    for found in batches:
        tried = "  ".join(f"{batch}: {_number(mean)} s" for batch, mean in found["mean_latency_s"].items())
        lines.append(
            f"  {found['profile']}  {found['workload']}  load {found['load']:g}  {found['policy']}: "
            f"{found['best_batch']}  ({tried})"
        )
    return lines


def result_lines(rows: Sequence[Row], policies: Sequence[str], reference: str) -> list[str]:
    """One table per profile and workload: by policy (in the order given) and load, means over the replicates."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        profile = f"{row['profile']} (estimated)" if row["estimated"] else str(row["profile"])
        groups.setdefault((row["workload"], profile), []).append(row)
    lines = []
    for (workload, profile), members in groups.items():
        table = [["policy", "load", "batch", *(title for title, _ in _COLUMNS), f"mean / that of {reference}"]]
        for policy in policies:
            for load in sorted({row["load"] for row in members}):
                found = [row for row in members if row["policy"] == policy and row["load"] == load]
                base = [row for row in members if row["policy"] == reference and row["load"] == load]
                values = [_mean([row[name] for row in found]) for _, name in _COLUMNS]
                batch = found[0]["batch"]
                head = [policy, f"{load:g}", "-" if batch is None else str(batch)]
                table.append([*head, *map(_number, values), "" if policy == reference else _ratio(found, base)])
        replicates = len({row["seed"] for row in members})
        lines.append(f"{workload} on {profile}, means over {replicates} run{'s' if replicates > 1 else ''}")
        lines += _aligned(table)
    return lines


def _ratio(rows: Sequence[Row], reference: Sequence[Row]) -> str:
    """Paired by replicate, because all policies see the same arrivals; with the 95% interval."""
    mine, theirs = ({row["seed"]: row[_MEAN_LATENCY] for row in part} for part in (rows, reference))
    if None in (*mine.values(), *theirs.values()):
        return "-"
    found = paired_log_ratio(mine, theirs)
    return f"{found.ratio:.3f} ({found.low:.3f}-{found.high:.3f})" if found.seeds > 1 else f"{found.ratio:.3f}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    return [
        "  " + "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in table
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
