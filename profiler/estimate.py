"""An estimated profile, from data sheets, FLOPs, bytes and stated efficiencies. Nothing is run.

A step of R rows takes ``kernels * kernel_overhead + max(compute, memory)`` (roofline):

- compute = R * FLOPs / (peak * efficiency);
- memory = (weights + R * activations * fused_share) / (bandwidth * bandwidth_efficiency);
- kernel_overhead is what every kernel costs beside its work (launch gap, ramp-up, tail). It makes one or two rows
  launch-bound, so that the effective speed rises with the rows.

A decode is the sum of the same over the decoder's 20 layers, at a stated share of the step's efficiency.

Calibration, on H100 (the only GPU with enough published numbers): SDXL at 2 rows runs at 19.8 steps/s (published:
18.5 with torch.compile, 21.6 with stable-fast), SD1.5 at 103 steps/s (66 and 105), SDXL at 16 rows at 404 TFLOP/s
(8-bit MLPerf entries reach about 612, eager single requests 200). The decode's efficiency and all co-run slowdowns
rest on no measurement.

Contention. A side is described by its demand: the share of its solo time for which it needs a resource. Two sides
that together ask for more than there is share it so that the resource is exactly used up, each side losing in
proportion to the other's demand (``share``). Two bounds are computed:

- *perfect*: demands against the attainable peaks of compute and bandwidth; the worse of the two resources counts;
- *turns*: a side keeps the whole GPU to itself whenever a kernel of it works, so only launch gaps overlap.

``contention`` moves linearly between them: 0 is perfect sharing, 1 is taking turns, more is worse than taking turns
(caches thrash). Up to 1 the sum 1/s_u + 1/s_v lies between 1 and 2; beyond, overlapping may lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from math import isfinite, sqrt
from typing import Any

from profiler.datasheets import Gpu, Model, decoder_atoms, find_gpu, find_model
from synerdiff.core import NS_PER_S, PPM, InputError
from synerdiff.profile.tables import Corun, Head, Profile, Spread

ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CORUN_ROWS = (1, 2, 4, 8, 16, 32)
CHUNKINGS = {"whole": 1, "c4": 4, "c8": 8}
CONTENTION_LEVELS = {"mild": 0.3, "moderate": 0.8, "severe": 1.5}
DEFAULT_CONTENTION = "moderate"
MOST_CONTENTION = 3.0

KERNEL_OVERHEAD_S = 7.5e-6
DECODE_SHARE = 0.68
BANDWIDTH_EFFICIENCY = 0.85
FUSED_SHARE = 0.5
ATTAINABLE_COMPUTE = 0.80
STEP_DISPATCH_S = 200e-6
CHUNK_DISPATCH_S = 50e-6
COPY_BYTES_PER_S = 25e9
COPY_LATENCY_S = 100e-6


@dataclass(frozen=True, slots=True)
class RooflinePiece:
    """Solo time of one piece of work, and its demands: shares of that time for which it needs a resource."""

    seconds: float
    busy: float
    """Share in which a kernel works (no launch gap)."""
    compute: float
    """Share of the attainable compute that it uses."""
    memory: float
    """Share of the attainable bandwidth that it uses."""


def contention_value(text: str) -> float:
    """A named level or a number from 0 to 3."""
    if text in CONTENTION_LEVELS:
        return CONTENTION_LEVELS[text]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and 0 <= value <= MOST_CONTENTION):
        names = ", ".join(CONTENTION_LEVELS)
        raise InputError(f"contention is '{text}'; allowed are {names} or a number from 0 to {MOST_CONTENTION:g}.")
    return value


def estimate_profile(
    gpu: str, model: str, contention: str | float = DEFAULT_CONTENTION, decode_scale: float = 1.0
) -> Profile:
    """The estimated profile of a known GPU and model.

    ``contention``: a name of CONTENTION_LEVELS or a number from 0 to 3. ``decode_scale`` multiplies the work of the
    decode. Every cell has n = 0 and p10 = p90 = median. InputError lists what is known.
    """
    device, network = find_gpu(gpu), find_model(model)
    severity = contention_value(str(contention))
    if not (isfinite(decode_scale) and 0 < decode_scale <= 100):
        raise InputError(f"decode-scale is {decode_scale:g}; allowed is a number above 0 and up to 100.")
    steps = {rows: _step(device, network, rows) for rows in ROW_BUCKETS}
    atoms = _decode_pieces(device, network, decode_scale)
    chunks = {name: [_joined(part) for part in _cut(atoms, count)] for name, count in CHUNKINGS.items()}
    corun = {
        (name, i): {rows: _corun_cell(steps[rows], piece, severity) for rows in CORUN_ROWS}
        for name, pieces in chunks.items()
        for i, piece in enumerate(pieces)
    }
    name = f"{gpu}-{model}-estimated"
    name += f"-contention{severity:g}" if severity != CONTENTION_LEVELS[DEFAULT_CONTENTION] else ""
    name += f"-decode{decode_scale:g}" if decode_scale != 1 else ""
    return Profile(
        name=name,
        provenance="estimated",
        row_buckets=ROW_BUCKETS,
        steps={rows: _exactly(piece.seconds) for rows, piece in steps.items()},
        chunks={name: tuple(_exactly(piece.seconds) for piece in pieces) for name, pieces in chunks.items()},
        corun=corun,
        overheads={key: _exactly(value) for key, value in _overheads(device, network).items()},
        head=_head(gpu, model, device, network, severity, decode_scale),
    )


def _exactly(seconds: float) -> Spread:
    ns = max(1, round(seconds * NS_PER_S))
    return Spread(ns, ns, ns, 0)


def _piece(gpu: Gpu, flops: float, traffic: float, kernels: float, efficiency: float) -> RooflinePiece:
    compute = flops / (gpu.peak_flops * efficiency)
    memory = traffic / (gpu.bandwidth * BANDWIDTH_EFFICIENCY)
    working = max(compute, memory)
    seconds = kernels * KERNEL_OVERHEAD_S + working
    return RooflinePiece(
        seconds, working / seconds, flops / (gpu.peak_flops * ATTAINABLE_COMPUTE) / seconds, memory / seconds
    )


def _step(gpu: Gpu, model: Model, rows: int) -> RooflinePiece:
    activations = (model.step_traffic_bytes - model.step_weight_bytes) * FUSED_SHARE
    traffic = model.step_weight_bytes + rows * activations
    return _piece(gpu, rows * model.step_flops, traffic, model.step_kernels, gpu.step_efficiency)


def _decode_pieces(gpu: Gpu, model: Model, scale: float) -> list[RooflinePiece]:
    atoms = decoder_atoms(model.resolution)
    bytes_per_element = model.decode_traffic_bytes * FUSED_SHARE / sum(atom.elements for atom in atoms)
    efficiency = gpu.step_efficiency * DECODE_SHARE
    return [
        _piece(gpu, scale * atom.flops, scale * atom.elements * bytes_per_element, scale * atom.kernels, efficiency)
        for atom in atoms
    ]


def _joined(pieces: list[RooflinePiece]) -> RooflinePiece:
    """Pieces that run one after the other, as one: demands are means over time."""
    seconds = sum(piece.seconds for piece in pieces)
    means = [
        sum(piece.seconds * demand for piece, demand in zip(pieces, demands, strict=True)) / seconds
        for demands in zip(*((piece.busy, piece.compute, piece.memory) for piece in pieces), strict=True)
    ]
    return RooflinePiece(seconds, *means)


def _cut(pieces: list[RooflinePiece], count: int) -> list[list[RooflinePiece]]:
    """Cut into ``count`` runs so that the longest is as short as possible, then the others as even as possible.

    All cuts are tried: 20 layers into 8 chunks is 50,388 of them.
    """
    until = [0]
    for piece in pieces:
        until.append(until[-1] + round(piece.seconds * NS_PER_S))

    def unevenness(cuts: tuple[int, ...]) -> tuple[int, int]:
        lengths = [until[high] - until[low] for low, high in pairwise((0, *cuts, len(pieces)))]
        return max(lengths), sum(length * length for length in lengths)

    best = min(combinations(range(1, len(pieces)), count - 1), key=unevenness)
    return [pieces[low:high] for low, high in pairwise((0, *best, len(pieces)))]


def share(u: float, v: float) -> tuple[float, float]:
    """Slowdowns of two sides with demands u and v (0 to 1) for one resource.

    Nobody is slowed while u + v <= 1. Beyond, the resource is used up, u/s_u + v/s_v = 1, with s_u - 1 = k*v and
    s_v - 1 = k*u: the root k of u*v*k^2 + (u + v - u^2 - v^2)*k - (u + v - 1) = 0.
    """
    excess = u + v - 1
    if excess <= 0:
        return 1.0, 1.0
    product = u * v
    linear = u + v - u * u - v * v
    k = (sqrt(linear * linear + 4 * product * excess) - linear) / (2 * product)
    return 1 + k * v, 1 + k * u


def slowdowns(step: RooflinePiece, chunk: RooflinePiece, contention: float) -> tuple[float, float]:
    """(step, chunk) slowdowns, between perfect sharing (contention 0) and taking turns (1), and on beyond."""
    compute, memory = share(step.compute, chunk.compute), share(step.memory, chunk.memory)
    turns = share(step.busy, chunk.busy)
    perfect = (max(compute[0], memory[0]), max(compute[1], memory[1]))
    pair = [p + contention * max(0.0, t - p) for p, t in zip(perfect, turns, strict=True)]
    return pair[0], pair[1]


def _corun_cell(step: RooflinePiece, chunk: RooflinePiece, contention: float) -> Corun:
    step_ppm, chunk_ppm = (round(PPM * slowdown) for slowdown in slowdowns(step, chunk, contention))
    return Corun(Spread(step_ppm, step_ppm, step_ppm, 0), Spread(chunk_ppm, chunk_ppm, chunk_ppm, 0), held_out=False)


def _overheads(gpu: Gpu, model: Model) -> dict[str, float]:
    text = _piece(gpu, 2 * model.text_flops, model.text_weight_bytes, model.text_kernels, gpu.step_efficiency)
    return {
        "step_dispatch": STEP_DISPATCH_S,
        "chunk_dispatch": CHUNK_DISPATCH_S,
        "text_encode": text.seconds,
        "result_copy": COPY_LATENCY_S + 3 * model.resolution**2 / COPY_BYTES_PER_S,
    }


def _head(gpu: str, model: str, device: Gpu, network: Model, contention: float, decode_scale: float) -> Head:
    def assumption(value: float, unit: str, source: str) -> dict[str, Any]:
        return {"value": value, "unit": unit, "source": source}

    own = "our assumption; no measurement"
    notes = {
        "model_title": network.title,
        "n_meaning": "n is 0 in every cell: nothing was measured, and p10 = p90 = median",
        "assumptions": {
            "peak_tflops": assumption(device.peak_flops / 1e12, "TFLOP/s, dense 16 bit", device.source),
            "bandwidth": assumption(device.bandwidth / 1e9, "GB/s", "data sheet"),
            "step_efficiency": assumption(device.step_efficiency, "share of the peak", device.efficiency_source),
            "decode_share": assumption(
                DECODE_SHARE,
                "decode's efficiency as a share of the step's",
                own + "; TensorRT in 32 bit on H100 needs 127 ms for a 1024x1024 decode, an upper bound there",
            ),
            "bandwidth_efficiency": assumption(BANDWIDTH_EFFICIENCY, "share of the bandwidth", own),
            "fused_share": assumption(
                FUSED_SHARE, "share of the eager activation traffic", own + "; a compiler fuses pointwise operations"
            ),
            "kernel_overhead": assumption(
                KERNEL_OVERHEAD_S * 1e6,
                "microseconds a kernel",
                "chosen between torch.compile and stable-fast on H100 at 2 rows (stable-fast's README)",
            ),
            "attainable_compute": assumption(
                ATTAINABLE_COMPUTE, "share of the peak", "large bf16 products reach 790 TFLOP/s on H200"
            ),
            "step_flops": assumption(network.step_flops / 1e9, "GFLOP a row", network.source),
            "step_traffic": assumption(network.step_traffic_bytes / 1e9, "GB a row, eager", network.source),
            "step_weights": assumption(network.step_weight_bytes / 1e9, "GB", network.source),
            "step_kernels": assumption(network.step_kernels, "kernels a step", own + "; from the layer counts"),
            "decode_flops": assumption(
                sum(atom.flops for atom in decoder_atoms(network.resolution)) / 1e9,
                "GFLOP an image",
                "the decoder's 20 layers, from its public configuration",
            ),
            "decode_traffic": assumption(network.decode_traffic_bytes / 1e9, "GB an image, eager", network.source),
            "decode_scale": assumption(decode_scale, "factor on the decode's work", "option --decode-scale"),
            "contention": assumption(
                contention,
                "0 = perfect sharing by roofline demand, 1 = taking turns, more = worse than turns",
                own + "; option --contention",
            ),
            "text_encode": assumption(
                2 * network.text_flops / 1e9, "GFLOP a request (prompt and negative prompt)", network.source
            ),
            "step_dispatch": assumption(STEP_DISPATCH_S * 1e6, "microseconds a step", own),
            "chunk_dispatch": assumption(CHUNK_DISPATCH_S * 1e6, "microseconds a chunk", own),
            "result_copy": assumption(
                COPY_BYTES_PER_S / 1e9, "GB/s to the host, after 100 microseconds", "PCIe 4.0 x16 in practice"
            ),
        },
    }
    return Head(
        device=device.title,
        gpu=gpu,
        model=model,
        resolutions=((network.resolution, network.resolution),),
        dtype="bfloat16",
        notes=notes,
    )
