"""Hold what the parts measured against the gates, with the numbers.

    python benchmarks/gpu/report.py DIR

DIR holds the part1.json ... part6.json that came back. Prints the report and writes DIR/report.md. Exit code 1 when a
gate is missed; what was not measured is neither met nor missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MLPERF_OFFLINE = 2.18
"""Images a second per GPU: MLPerf Inference v4.1, SDXL, 8x H200, 20 steps, offline, probably 8-bit. A reference."""
H100_IT_PER_S = {
    "sdxl": {"eager": 14.9, "compiled": 18.5, "stable-fast": 21.6},
    "sd15": {"eager": 54.5, "compiled": 66.0, "stable-fast": 104.6},
}
"""Published steps a second at batch 1 (2 rows) on an H100."""

Parts = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Gate:
    """``value`` is None where nothing was measured. ``at_most``: the limit is the largest allowed value."""

    name: str
    value: float | None
    limit: float
    unit: str
    at_most: bool = True
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "met" if met else "MISSED"

    def line(self) -> str:
        value = "-" if self.value is None else f"{self.value:.3g}"
        sign = "<=" if self.at_most else ">="
        cells = (self.name, f"{value} {self.unit}", f"{sign} {self.limit:g} {self.unit}", self.verdict, self.detail)
        return f"| {' | '.join(cells)} |"


def gates(parts: Parts) -> list[Gate]:
    """All gates; SDXL at 1024x1024 unless the name says otherwise. Dry runs (quick, on a CPU, another model) are left
    out: they say nothing about a gate."""
    parts = {number: part for number, part in parts.items() if not _dry(part.get("provenance", {}))}
    sdxl = _results(parts, 1).get("sdxl", {})
    steps = {int(row["rows"]): row for row in sdxl.get("steps", ())}
    large = {rows: row["tflop_per_s"] for rows, row in steps.items() if rows >= 8 and "tflop_per_s" in row}
    slowest = min(large, key=lambda rows: large[rows]) if large else None
    decode = next((row["ms"] for row in sdxl.get("decodes", ()) if row["chunking"] == "whole"), None)
    rates = {
        name: entry["saturation_images_per_s"]["value"]
        for name, entry in _results(parts, 3).get("policies", {}).items()
        if "saturation_images_per_s" in entry and _full_guidance(parts[3], name)
    }
    best = max(rates, key=lambda name: rates[name]) if rates else None
    return [
        Gate("guided step (2 rows)", steps.get(2, {}).get("ms"), 40, "ms"),
        Gate(
            "products at 8 rows or more, the slowest",
            large[slowest] if slowest is not None else None,
            400,
            "TFLOP/s",
            at_most=False,
            detail=f"at {slowest} rows" if slowest is not None else "",
        ),
        Gate("decode, whole", decode, 40, "ms"),
        *_gaps(parts, sdxl, steps),
        Gate(
            "20 steps, offline, full guidance",
            rates[best] if best is not None else None,
            1.4,
            "images/s",
            at_most=False,
            detail=(f"{best}; " if best else "") + f"MLPerf {MLPERF_OFFLINE}",
        ),
    ]


def _gaps(parts: Parts, sdxl: Mapping[str, Any], steps: Mapping[int, Mapping[str, Any]]) -> list[Gate]:
    """Idle time of the denoise lane between steps, in percent of a step: as profiled, and in the runs (medians)."""
    gap = sdxl.get("overheads_ms", {}).get("step_dispatch")
    profiled = 100 * gap / steps[2]["ms"] if gap is not None and 2 in steps else None
    gates = [Gate("lane gap, profiled, of a step of 2 rows", profiled, 2, "%")]
    for number, title in ((3, "SDXL runs"), (4, "SD1.5 runs")):
        shares = {
            f"{run['policy']}, {run['kind']}": 100 * run["dispatch"]["step_dispatch"]["p50_s"] / run["step_median_s"]
            for run in _results(parts, number).get("runs", ())
            if run["step_median_s"] and run["dispatch"]["step_dispatch"]["count"]
        }
        worst = max(shares, key=lambda name: shares[name]) if shares else None
        value = shares[worst] if worst is not None else None
        gates.append(Gate(f"lane gap, {title}, the worst", value, 2, "%", detail=worst or ""))
    return gates


def _dry(origin: Mapping[str, Any]) -> bool:
    return bool(origin.get("quick") or origin.get("model_instead") or origin.get("device_option") == "cpu")


def _full_guidance(part: Mapping[str, Any], policy: str) -> bool:
    runs = [run for run in part["results"].get("runs", ()) if run["policy"] == policy and run["kind"] == "saturation"]
    return all(run["summary"]["skip_fraction"] == 0 for run in runs)


def _results(parts: Parts, number: int) -> Mapping[str, Any]:
    results: Mapping[str, Any] = parts.get(number, {}).get("results", {})
    return results


def report_text(parts: Parts) -> str:
    """The gates, then a few lines from each part that was measured."""
    lines = ["# Measured", ""]
    for number, part in sorted(parts.items()):
        origin = part["provenance"]
        torch = origin.get("torch", "?")
        state = "complete" if part["complete"] else "INCOMPLETE"
        quick = ", a quick dry run" if origin.get("quick") else ""
        lines.append(
            f"- Part {number}, {part['title']}: {state}{quick}; {origin['device']}, torch {torch}, "
            f"commit {origin.get('commit') or 'unknown'}, {origin['date']}"
        )
    lines += ["", "## Gates", "", "| gate | found | limit | verdict | |", "|---|---|---|---|---|"]
    lines += [gate.line() for gate in gates(parts)]
    for model, table in _results(parts, 1).items():
        lines += ["", *_profile_lines(model, table)]
    checks = _results(parts, 2).get("checks", ())
    if checks:
        failed = [check for check in checks if not check["passed"]]
        lines += ["", "## Prediction", "", f"{len(checks) - len(failed)} of {len(checks)} checks hold."]
        lines += [f"- {one['case']}: {one['what']} {one['found']} (allowed: {one['allowed']})" for one in failed]
    for number in (3, 4):
        if _results(parts, number).get("policies"):
            lines += ["", *_policy_lines(parts[number])]
    for number, lines_of in ((5, _lane_lines), (6, _execution_lines)):
        for model, results in _results(parts, number).items():
            lines += ["", *lines_of(model, results)]
    return "\n".join(lines) + "\n"


def _number(row: Mapping[str, Any], key: str, form: str = ".3g") -> str:
    return format(row[key], form) if row.get(key) is not None else "-"


def _profile_lines(model: str, table: Mapping[str, Any]) -> list[str]:
    head = ("ms", "floor_ms", "of_floor", "tflop_per_s", "unfused_gb_per_s")
    lines = [f"## {model} on {table['info'].get('device')}", ""]
    lines += ["| | ms | floor, ms | floor / time | TFLOP/s | GB/s, if nothing is fused |", "|---|---|---|---|---|---|"]
    named = [(f"step, {row['rows']} rows", row) for row in table["steps"]]
    named += [(f"decode, {row['chunking']}", row) for row in table["decodes"]]
    lines += [f"| {name} | " + " | ".join(_number(row, key) for key in head) + " |" for name, row in named]
    won = [cell for cell in table["corun"] if cell["overlap"] > 1]
    lines += ["", f"1/s_u + 1/s_v is above 1 in {len(won)} of {len(table['corun'])} cells."]
    return lines


def _bounds(interval: Mapping[str, Any] | None, scale: float = 1.0) -> str:
    if interval is None:
        return "-"
    low, high = (format(interval[key] * scale, ".3g") if interval[key] is not None else "?" for key in ("low", "high"))
    return f"{interval['value'] * scale:.3g} ({low} to {high})"


def _policy_lines(part: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {part['title']}",
        "",
        "| policy | images/s | mean, s | P99, s | P99 claimed, s | requests | skipped |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, entry in part["results"]["policies"].items():
        skipped = entry.get("skip_fraction") or []
        cells = [
            _bounds(entry.get("saturation_images_per_s")),
            _bounds(entry.get("mean_latency_s")),
            _number(entry, "p99_latency_s"),
            _number(entry, "p99_claim_s") if entry.get("p99_claim_s") else "too few requests",
            str(entry.get("measured_requests", "-")),
            f"{sum(skipped) / len(skipped):.0%}" if skipped else "-",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for pair, ratios in part["results"]["paired_ratios"].items():
        texts = [
            f"{name.replace('_', ' ')} {_bounds({**one, 'value': one['ratio']})}" for name, one in ratios.items() if one
        ]
        lines.append(f"\n{pair}: {', '.join(texts) or '-'}")
    return lines


def _lane_lines(model: str, results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## Overlap by lanes, {model}",
        "",
        "| lanes | cells | above 1 | least | largest |",
        "|---|---|---|---|---|",
    ]
    for kind, cells in results["kinds"].items():
        values = [cell["overlap"] for cell in cells]
        won = sum(value > 1 for value in values)
        lines.append(f"| {kind} | {len(values)} | {won} | {min(values):.2f} | {max(values):.2f} |")
    return [*lines, *(f"\nNot measured: {kind}: {reason}." for kind, reason in results["skipped"].items())]


def _execution_lines(model: str, results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## Forward of {model}",
        "",
        "| | rows | ms | it/s | floor, ms | prepared in, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["times"]:
        cells = [_number(row, key) for key in ("ms", "it_per_s", "floor_ms", "prepared_s")]
        lines.append(f"| {row['kind']} | {row['rows']} | " + " | ".join(cells) + " |")
    published = H100_IT_PER_S.get(model)
    if published:
        listed = ", ".join(f"{name} {value}" for name, value in published.items())
        lines.append(f"\nPublished for an H100 at 2 rows, it/s: {listed}.")
    return [*lines, *(f"\nNot measured: {kind}: {reason}." for kind, reason in results["skipped"].items())]


def read_parts(folder: Path) -> dict[int, dict[str, Any]]:
    parts = {}
    for number in range(1, 7):
        path = folder / f"part{number}.json"
        if path.exists():
            parts[number] = json.loads(path.read_text(encoding="utf-8"))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    parts = read_parts(folder)
    if not parts:
        print(f"{folder}: there is no part1.json to part6.json here.", file=sys.stderr)
        sys.exit(2)
    text = report_text(parts)
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(text, end="")
    sys.exit(1 if any(gate.verdict == "MISSED" for gate in gates(parts)) else 0)


if __name__ == "__main__":
    main()
