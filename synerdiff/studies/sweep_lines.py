"""A sweep's results as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_COLUMNS = (
    ("mean s", "request_latency_mean_s"),
    ("P99 s", "request_latency_p99_s"),
    ("requests/s", "request_throughput"),
    ("images/s", "image_throughput"),
    ("goodput/s", "goodput"),
    ("skipped", "skip_fraction"),
)


def batch_lines(batches: Sequence[Mapping[str, Any]]) -> list[str]:
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


def result_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table per profile and workload: policy and load, then means over the replicates."""
    groups: dict[tuple[str, str], dict[tuple[str, float], list[Mapping[str, Any]]]] = {}
    for row in rows:
        place = groups.setdefault((row["profile"] + (" (estimated)" if row["estimated"] else ""), row["workload"]), {})
        place.setdefault((row["policy"], row["load"]), []).append(row)
    lines = []
    for (profile, workload), cells in groups.items():
        lines.append(f"{workload} on {profile}, means over {max(len(found) for found in cells.values())} run(s)")
        table = [["policy", "load", "batch", *(title for title, _ in _COLUMNS)]]
        for (policy, load), found in sorted(cells.items()):
            batch = found[0]["batch"]
            values = [_mean([row[name] for row in found]) for _, name in _COLUMNS]
            table.append([policy, f"{load:g}", "-" if batch is None else str(batch), *map(_number, values)])
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        for row in table:
            cells_text = [row[0].ljust(widths[0])]
            cells_text += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  " + "  ".join(cells_text))
    return lines


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
