"""What a time means: achieved TFLOP/s and GB/s, and the least time that the device allows.

FLOPs and bytes come from ``profiler.operations`` (eager), data sheets from ``profiler.datasheets``; models and
devices that these do not know have no floor, and nothing is guessed for them.
"""

from __future__ import annotations

from typing import Any

from profiler.datasheets import GPUS, MODELS
from profiler.operations import decoder, total, unet
from synerdiff.core import NS_PER_S
from synerdiff.profile.folder import fields_of
from synerdiff.profile.tables import Profile

REACHED_FLOPS = {"h200": 790e12}
"""What bf16 matrix products were seen to reach on the device; elsewhere the data sheet's peak stands for it."""


def gpu_key(device: str) -> str | None:
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
    comparison: dict[str, Any] = {
        "ms": ns / 1e6,
        "tflop_per_s": flops / seconds / 1e12,
        "unfused_gb_per_s": moved / seconds / 1e9,
    }
    if gpu is not None:
        rate = REACHED_FLOPS.get(gpu, GPUS[gpu].peak_flops)
        floor_s = max(flops / rate, least_bytes / GPUS[gpu].bandwidth)
        comparison |= {"floor_ms": floor_s * 1e3, "of_floor": floor_s / seconds}
    return comparison


def profile_table(profile: Profile) -> dict[str, Any]:
    """Every solo time of a profile, beside its floor where model, resolution and device are known."""
    info = fields_of(profile.head)
    model = profile.head.model
    known = model in MODELS and profile.head.size == (MODELS[model].resolution, MODELS[model].resolution)
    gpu = gpu_key(profile.head.device)
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
        "overlap": info.get("overlap"),
        "kappa": info.get("kappa"),
        "held_out_error": info.get("held_out_error"),
    }
