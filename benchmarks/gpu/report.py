"""What a quarter of an hour on a GPU found: times beside their floors and published ones, and the gates.

FLOPs and bytes come from ``profiler.operations`` (eager), data sheets from ``profiler.datasheets``; models and
devices that these do not know have no floor, and nothing is guessed for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.datasheets import GPUS, MODELS
from profiler.operations import decoder, total, unet
from synerdiff.core import NS_PER_S, InputError
from synerdiff.profile.folder import fields_of, load_profile
from synerdiff.profile.tables import Profile

MLPERF_OFFLINE = {"h100": 2.04, "h200": 2.18}
"""Images a second per GPU: MLPerf Inference, SDXL, 20 steps, offline, 8-bit. A reference, not the same precision."""
H100_IT_PER_S = {"sdxl": {"eager": 14.9, "compiled": 18.5, "TensorRT": 22.6}, "sd15": {"eager": 54.5, "compiled": 66.0}}
"""Published guided steps a second (2 rows) on an H100."""
Results = Mapping[str, Any]

REACHED_FLOPS = {"h200": 790e12}
"""What bf16 matrix products were seen to reach on the device; elsewhere the data sheet's peak stands for it."""


def card_of(device: str) -> str | None:
    """``NVIDIA H200`` -> ``h200``; the longest key wins. None for a device without a data sheet here."""
    flat = device.lower().replace(" ", "").replace("-", "")
    return max((key for key in GPUS if key.replace("-", "") in flat), key=len, default=None)


def work_of(model: str, rows: int) -> tuple[float, float, float]:
    """(FLOPs, bytes moved when nothing is fused, bytes of weights) of a step of ``rows`` rows; KeyError if unknown."""
    side = MODELS[model].resolution
    flops, elements, weights, _ = total(unet(model, side, side, "eager"))
    return rows * flops, 2 * (weights + rows * elements), 2 * weights


def decode_work(model: str) -> tuple[float, float]:
    """(FLOPs, bytes moved when nothing is fused) of one decode; KeyError if unknown."""
    side = MODELS[model].resolution
    layers = [pair for _, atom in decoder(model, side, side, "eager") for pair in atom]
    flops, elements, weights, _ = total(layers)
    return flops, 2 * (elements + weights)


def beside_floor(ns: float, flops: float, moved: float, least_bytes: float, gpu: str | None) -> dict[str, Any]:
    """The time in ms, what it achieves, and its floor: the products at the device's best rate, or the bytes that any
    execution must read (weights), whichever takes longer. ``of_floor`` is floor / time."""
    seconds = ns / NS_PER_S
    found: dict[str, Any] = {
        "ms": ns / 1e6,
        "tflop_per_s": flops / seconds / 1e12,
        "unfused_gb_per_s": moved / seconds / 1e9,
    }
    if gpu is not None:
        rate = REACHED_FLOPS.get(gpu, GPUS[gpu].peak_flops)
        floor_s = max(flops / rate, least_bytes / GPUS[gpu].bandwidth)
        found |= {"floor_ms": floor_s * 1e3, "of_floor": floor_s / seconds}
    return found


def profile_table(profile: Profile) -> dict[str, Any]:
    """Every solo time of a profile, beside its floor where model, resolution and device are known."""
    info = fields_of(profile.head)
    model = profile.head.model
    known = model in MODELS and profile.head.size == (MODELS[model].resolution, MODELS[model].resolution)
    gpu = card_of(profile.head.device)
    steps = []
    for rows, spread in profile.steps.items():
        row: dict[str, Any] = {"rows": rows, "ms": spread.median / 1e6}
        if known:
            row |= beside_floor(spread.median, *work_of(model, rows), gpu)
        steps.append({**row, "p10_ms": spread.p10 / 1e6, "p90_ms": spread.p90 / 1e6, "n": spread.n})
    decodes = []
    for name in profile.chunkings:
        ns = profile.decode_ns(name)
        row = {"chunking": name, "ms": ns / 1e6, "chunks_ms": [spread.median / 1e6 for spread in profile.chunks[name]]}
        if known:
            row |= beside_floor(ns, *decode_work(model), 0.0, gpu)
        decodes.append(row)
    corun = [
        {"chunking": name, "chunk": chunk, "rows": rows, "s_u": cell.step.median / 1e6, "s_v": cell.chunk.median / 1e6}
        | {"overlap": 1e6 / cell.step.median + 1e6 / cell.chunk.median}
        for (name, chunk), by_rows in profile.corun.items()
        for rows, cell in by_rows.items()
    ]
    keys = ("device", "model", "resolution", "dtype", "execution", "quick", "clocks", "driver", "torch", "commit")
    return {
        "info": {key: info[key] for key in (*keys, "date", "measured_for_s") if key in info},
        "steps": steps,
        "decodes": decodes,
        "corun": corun,
        "overheads_ms": {name: profile.overhead_ns(name) / 1e6 for name in profile.overheads},
        **{key: info.get(key) for key in ("overlap", "kappa", "held_out_error", "missing")},
    }


def read_results(work: Path) -> dict[str, Any]:
    """What the steps have left in their folder, by step; what is not there or cannot be read was not measured."""
    found: dict[str, Any] = {"runs": {}, "profiles": {}}
    for name in ("environment", "ceilings", "forward"):
        found[name] = read_json(work / f"{name}.json") or {}
    found["across"] = read_json(work / "across.json") or []
    found["validation"] = read_json(work / "validate" / "validation.json") or {}
    for slot in ("small", "large"):
        found["runs"][slot] = list(_json_lines(work / f"runs-{slot}.jsonl"))
        for folder in sorted((work / slot).glob("*")):
            try:
                found["profiles"][slot] = profile_table(load_profile(folder))
            except InputError:
                continue
    return found


def read_json(path: Path) -> Any:
    """What a file holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that may have been cut off while it was written."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


@dataclass(frozen=True, slots=True)
class Gate:
    """``found`` is None where nothing was measured. ``at_most``: the limit is the largest allowed value."""

    name: str
    found: float | None
    limit: float
    unit: str
    at_most: bool = True
    detail: str = ""

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED`` or ``not measured``."""
        if self.found is None:
            return "not measured"
        met = self.found <= self.limit if self.at_most else self.found >= self.limit
        return "met" if met else "MISSED"

    def cells(self) -> tuple[str, ...]:
        found = "-" if self.found is None else f"{self.found:.3g}"
        sign = "<=" if self.at_most else ">="
        return self.name, f"{found} {self.unit}", f"{sign} {self.limit:g} {self.unit}", self.verdict, self.detail


def gates(results: Results) -> list[Gate]:
    """All gates; those of SDXL at 1024x1024 on a GPU. A rehearsal with another model or on a CPU says nothing."""
    environment = results.get("environment", {})
    real = environment.get("device_option", "cpu") != "cpu" and not environment.get("model_instead")
    large = results["profiles"].get("large", {}) if real else {}
    runs = [run for run in results["runs"].get("large", ()) if real]
    steps = {row["rows"]: row for row in large.get("steps", ())}
    decode = next((row["ms"] for row in large.get("decodes", ()) if row["chunking"] == "whole"), None)
    step_ms = steps.get(2, {}).get("ms")
    levered = [row for row in results.get("forward", {}).get("times", ()) if real and row.get("levers")]
    own = [row["ms"] for row in levered if row["what"] == "2 rows" and "float8" not in row["levers"]]
    own_ms = min([*own, *([] if step_ms is None else [step_ms])], default=None)
    gap_ms = large.get("overheads_ms", {}).get("step_dispatch")
    gaps = {run["policy"]: 100 * run["gap_s"] / run["step_s"] for run in runs if run.get("gap_s") and run["step_s"]}
    rates = {run["policy"]: run["images_per_s"] for run in runs if run["kind"] == "saturation" and run["images_per_s"]}
    best, worst = (max(found, key=found.__getitem__, default="") for found in (rates, gaps))
    checks = results.get("validation", {}).get("checks", ()) if real else ()
    passed = sum(check.get("verdict") == "passed" for check in checks)
    card = card_of(str(environment.get("device", "")))
    offline = f"{best}; MLPerf, 8-bit: {MLPERF_OFFLINE.get(card or '', '-')}"
    return [
        Gate("guided step (2 rows)", step_ms, 40, "ms"),
        Gate("guided step (2 rows), with kernels of our own", own_ms, 30, "ms"),
        Gate("products at 8 rows", steps.get(8, {}).get("tflop_per_s"), 400, "TFLOP/s", at_most=False),
        Gate("decode, whole", decode, 40, "ms"),
        Gate("lane gap, profiled", 100 * gap_ms / step_ms if gap_ms is not None and step_ms else None, 2, "%"),
        Gate("lane gap, runs, the worst", gaps.get(worst), 2, "%", detail=worst),
        Gate("20 steps, offline, full guidance", rates.get(best), 1.4, "images/s", at_most=False, detail=offline),
        Gate("predictions inside their tolerance", float(passed) if checks else None, len(checks), "checks", False),
    ]


def report_text(results: Results, ledger: Sequence[Mapping[str, Any]], planned: Sequence[str]) -> str:
    """The gates, what ran and what did not, then every table that there is, as Markdown."""
    environment = results.get("environment", {})
    lines = ["# A quarter of an hour on a GPU", ""]
    lines += [
        f"{name}: {environment[name]}  " for name in ("device", "commit", "torch", "date") if environment.get(name)
    ]
    lines += ["", *_table(("gate", "found", "limit", "verdict", ""), [gate.cells() for gate in gates(results)])]
    done = {one["step"]: one for one in ledger}
    rows = [(name, *_state(done.get(name))) for name in planned]
    lines += ["", *_table(("step", "state", "s"), rows)]
    for table in results["profiles"].values():
        lines += ["", *_profile_lines(table)]
    if ceilings := results.get("ceilings", {}):
        reached = [(name, _number(one, "value"), one["unit"]) for name, one in ceilings.items()]
        lines += ["", "## Ceilings", "", *_table(("what", "found", "unit"), reached)]
    if times := results.get("forward", {}).get("times"):
        lines += ["", f"## Forward of {results['forward']['model']}", ""]
        cells = ("ms", "it_per_s", "floor_ms", "image_apart", "prepared_s")
        body = [(row["kind"], row["what"], *(_number(row, cell) for cell in cells)) for row in times]
        headers = ("levers", "", "ms", "it/s", "floor, ms", "largest difference of an image", "prepared in, s")
        lines += _table(headers, body)
        published = H100_IT_PER_S.get(results["forward"]["model"], {})
        lines += ["", *(f"Published for an H100 at 2 rows, {name}: {rate} it/s  " for name, rate in published.items())]
        lines += [f"Not measured: {kind}: {why}  " for kind, why in results["forward"].get("skipped", {}).items()]
    if across := results.get("across"):
        lines += ["", "## Slowdowns across two resolutions, small model", ""]
        names = ("s_u", "predicted_s_u", "s_v", "predicted_s_v")
        body = [
            (f"{row['step_side']}, {row['rows']} rows", f"{row['chunk_side']}, {row['chunking']}.{row['chunk']}")
            + tuple(_number(row, name) for name in names)
            for row in across
        ]
        lines += _table(("step", "chunk", "step's", "by the rule", "chunk's", "by the rule"), body)
    for slot, runs in results["runs"].items():
        if runs:
            lines += ["", f"## Runs, {slot} model", "", *_run_lines(runs)]
    if checks := results.get("validation", {}).get("checks"):
        lines += ["", "## Predictions", ""]
        body = [(c["case"], c["what"], c["found"], c["allowed"], c.get("verdict", "")) for c in checks]
        lines += _table(("case", "what", "found", "allowed", "verdict"), body)
    return "\n".join(lines) + "\n"


def _state(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    if entry is None:
        return "not begun", "-"
    return ("done" if entry["done"] else f"ended early, exit code {entry['exit_code']}"), f"{entry['wall_s']:.0f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _number(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.3g}" if row.get(key) is not None else "-"


def _profile_lines(table: Mapping[str, Any]) -> list[str]:
    info, keys = table["info"], ("ms", "floor_ms", "of_floor", "tflop_per_s", "unfused_gb_per_s")
    named = [(f"step, {row['rows']} rows", row) for row in table["steps"]]
    named += [(f"decode, {row['chunking']}", row) for row in table["decodes"]]
    body = [(name, *(_number(row, key) for key in keys)) for name, row in named]
    headers = ("", "ms", "floor, ms", "floor / time", "TFLOP/s", "GB/s, if nothing is fused")
    lines = [f"## Profile of {info.get('model')} on {info.get('device')}", "", *_table(headers, body), ""]
    for name, by_rows in (table["overlap"] or {}).items():
        lines.append(f"1/s_u + 1/s_v, {name}: " + ", ".join(f"{rows} rows {value}" for rows, value in by_rows.items()))
        lines[-1] += "  "
    for name, by_row in (table["kappa"] or {}).items():
        pairs = ", ".join(f"{rows} rows {pair['step']} {pair['chunk']}" for rows, pair in by_row.items())
        lines.append(f"kappa (step, chunk), {name}: {pairs}  ")
    if missing := table["missing"]:
        lines.append(f"Missing: {', '.join(f'{name} {_size(what)}' for name, what in missing.items())}")
    return lines


def _size(what: Any) -> str:
    return str(len(what)) if isinstance(what, list | dict) else str(what)


def _run_lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each run, and its rate or mean latency over that of continuous-serial; no claim on any percentile."""
    base = {run["kind"]: run for run in runs if run["policy"] == "continuous-serial"}
    rows = []
    for run in runs:
        key = "images_per_s" if run["kind"] == "saturation" else "mean_latency_s"
        other = base.get(run["kind"], {}).get(key)
        ratio = f"{run[key] / other:.3f}" if run.get(key) and other else "-"
        names = ("requests", "images_per_s", "predicted_images_per_s", "mean_latency_s", "predicted_mean_latency_s")
        rows.append((run["policy"], run["kind"], str(run["batch"]), *(_number(run, name) for name in names), ratio))
    headers = ("policy", "kind", "batch", "requests", "images/s", "predicted", "mean latency, s", "predicted")
    return _table((*headers, "/ continuous-serial"), rows)
