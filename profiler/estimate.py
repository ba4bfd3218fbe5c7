"""An estimated profile: the operations of a model (``profiler.operations``), timed on a card's data sheet
(``profiler.durations``). Nothing is run.

Contention. A side is described by its demand: the share of its solo time for which it needs a resource. Two sides
that together ask for more than there is share it so that the resource is exactly used up, each side losing in
proportion to the other's demand (``share``). Two bounds are computed:

- *low*: a chunk runs in the launch gaps and in the multiprocessors that the last wave of a product leaves empty, and
  products overlap with copies; compute and bandwidth are shared apart, and the worse of the two counts;
- *high*: a kernel that runs keeps the card to itself, so that only gaps and tails overlap.

Where a pair lies between them nobody has published for these models (vllm-omni#5885 built decoding beside denoising
and measured 0.15% less: the high end). ``contention`` moves linearly: 0 is low, 1 high, and above 1 is worse
than taking turns (caches thrash). Low, mid (0.5, the default) and high should all be tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise, permutations
from math import sqrt
from typing import Any, NamedTuple

from profiler.datasheets import FLOPS_PER_JOULE, GPUS, MODELS, Gpu, Model, gpu_key, known
from profiler.durations import FITTED, ForwardMode, Occupancy, forward, joined
from profiler.operations import Operations, decoder, text_encoders, total, unet
from synerdiff.core import NS_PER_S, PPM, InputError
from synerdiff.files import number, shown, sides_of
from synerdiff.profile.folder import combined
from synerdiff.profile.tables import MOST_DEGREE, Band, Corun, Head, Profile, Spread

ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CORUN_ROWS = (1, 2, 4, 8, 16, 32)
CHUNKINGS = {"whole": 1, "c4": 4, "c8": 8}
CONTENTION_LEVELS = {"low": 0.0, "mid": 0.5, "high": 1.0}
DEFAULT_CONTENTION = "mid"
MOST_CONTENTION = 3.0
STEP_DISPATCH_S = 200e-6
CHUNK_DISPATCH_S = 50e-6
COPY_BYTES_PER_S = 25e9
COPY_LATENCY_S = 100e-6
LARGEST_SIDE = 4096
NVLINK_GB_PER_S = 450.0
"""One direction of an H100's NVLink, data sheet."""
EXCHANGE_S = 10e-6
"""What an exchange between GPUs takes at the least; assumed."""
ACTIVATION_BYTES = 2
BAND = {"eager": (0.88, 1.18), "compiled": (0.92, 1.29), "engine": (0.86, 1.25)}
"""Execution -> multiples of the estimate between which eight of ten published times lie, each card left out of the fit
that judges it (``synerdiff scorecard --only times``; a test holds them against it)."""


def contention_value(text: str) -> float:
    """A named level or a number from 0 to 3."""
    if text in CONTENTION_LEVELS:
        return CONTENTION_LEVELS[text]
    try:
        return number(text, 0, MOST_CONTENTION)
    except ValueError:
        names = ", ".join(CONTENTION_LEVELS)
        raise InputError(
            f"contention is '{shown(text)}'; allowed are {names} or a number from 0 to {MOST_CONTENTION:g}."
        ) from None


def resolution_value(text: str, model: Model) -> tuple[int, int]:
    """``HxW`` in pixels, multiples of 64 up to 4096; empty is the model's own."""
    if not text:
        return model.resolution, model.resolution
    sides = sides_of(text, 64, LARGEST_SIDE)
    if sides is None or sides[0] % 64 or sides[1] % 64:
        raise InputError(
            f"resolution is '{shown(text)}'; allowed is HEIGHTxWIDTH in multiples of 64 pixels up to {LARGEST_SIDE}, "
            "like 768x512."
        )
    return sides


class Estimated(NamedTuple):
    """An estimated profile of one resolution, and what its co-runs are made of."""

    profile: Profile
    steps: dict[int, Occupancy]
    chunks: dict[str, list[Occupancy]]
    contention: float

    def corun(self, beside: Estimated) -> dict[tuple[str, int], dict[int, Corun]]:
        """Slowdowns of these steps and the chunks of one or another resolution."""

        def cell(rows: int, chunk: Occupancy) -> Corun:
            pair = slowdowns(self.steps[rows], chunk, self.contention)
            step_ppm, chunk_ppm = (Spread.exactly(PPM * slowdown) for slowdown in pair)
            return Corun(step_ppm, chunk_ppm, held_out=False)

        return {
            (name, i): {rows: cell(rows, piece) for rows in CORUN_ROWS}
            for name, pieces in beside.chunks.items()
            for i, piece in enumerate(pieces)
        }


def estimate_profile(*given: Any, **fields: Any) -> Profile:
    """The profile that `estimated` makes of the same."""
    return estimated(*given, **fields).profile


def estimated(
    gpu: str,
    model: str,
    contention: str | float = DEFAULT_CONTENTION,
    decode_scale: float = 1.0,
    *,
    execution: str = "compiled",
    precision: str = "bf16",
    vae_bits: int = 16,
    resolution: str = "",
    degrees: Sequence[int] = (),
    link_gb_per_s: float = NVLINK_GB_PER_S,
) -> Estimated:
    """The estimated profile of a known GPU and model.

    ``contention``: a name of CONTENTION_LEVELS or a number from 0 to 3. ``decode_scale`` multiplies the time of the
    decode. ``degrees``: also steps that so many GPUs take together over links of ``link_gb_per_s`` (``together``).
    Text encoders run eagerly unless ``execution`` is ``engine``. Every cell has n = 0 and p10 = p90 = median.
    InputError lists what is known.
    """
    gpu = gpu_key(gpu)
    device = known(GPUS, gpu, "GPU")
    network = known(MODELS, model, "model")
    severity = contention_value(str(contention))
    if not 0.001 <= decode_scale <= 100:
        raise InputError(f"decode-scale is {decode_scale:g}; allowed is a number from 0.001 to 100.")
    if vae_bits not in (16, 32):
        raise InputError(f"vae-precision is {vae_bits}; allowed are 16 and 32.")
    height, width = resolution_value(resolution, network)
    mode = ForwardMode(execution, precision)
    mode.check(device)
    plain = "fp16" if "bf16" not in device.precisions or precision == "fp16" else "bf16"
    operations = unet(model, height, width, execution)
    steps = {rows: forward(operations, rows, device, mode) for rows in ROW_BUCKETS}
    decode_mode = ForwardMode(execution, plain, single=vae_bits == 32)
    atoms = [
        forward(listed, 1, device, decode_mode).scaled(decode_scale)
        for _, listed in decoder(model, height, width, execution)
    ]
    text_execution = "engine" if execution == "engine" else "eager"
    text = forward(text_encoders(network.text_encoders, text_execution), 2, device, ForwardMode(text_execution, plain))
    chunks = {name: [joined(part) for part in _cut(atoms, count)] for name, count in CHUNKINGS.items()}
    overheads = {
        "step_dispatch": STEP_DISPATCH_S,
        "chunk_dispatch": CHUNK_DISPATCH_S,
        "text_encode": text.seconds,
        "result_copy": COPY_LATENCY_S + 3 * height * width / COPY_BYTES_PER_S,
    }
    for degree in degrees:
        if not 2 <= degree <= MOST_DEGREE:
            raise InputError(f"degrees holds {degree}; allowed are whole numbers from 2 to {MOST_DEGREE}.")
    if not 1e-3 <= link_gb_per_s <= 1e6:
        raise InputError(f"link-gb-per-s is {link_gb_per_s:g}; allowed is a number from 0.001 to 1000000.")
    own_size, usual = f"{network.resolution}x{network.resolution}", f"{CONTENTION_LEVELS[DEFAULT_CONTENTION]:g}"
    name, command = f"{gpu}-{model}-estimated", f"synerdiff estimate --gpu {gpu} --model {model}"
    for flag, value, default, ending in (
        ("resolution", f"{height}x{width}", own_size, f"-{height}x{width}"),
        ("execution", execution, "compiled", f"-{execution}"),
        ("precision", precision, "bf16", f"-{precision}"),
        ("vae-precision", str(vae_bits), "16", f"-vae{vae_bits}"),
        ("contention", f"{severity:.15g}", usual, f"-contention{severity:g}"),
        ("decode-scale", f"{decode_scale:.15g}", "1", f"-decode{decode_scale:g}"),
        ("degrees", ",".join(map(str, degrees)), "", ""),
        ("link-gb-per-s", f"{link_gb_per_s:.15g}", f"{NVLINK_GB_PER_S:.15g}", ""),
    ):
        if value != default:
            name, command = name + ending, f"{command} --{flag} {value}"
    head = _head(gpu, model, (height, width), mode, vae_bits, severity, decode_scale, command)
    if degrees:
        head.notes["assumptions"]["link"] = {
            "value": link_gb_per_s,
            "unit": "GB/s between GPUs that take a step together, one direction",
            "source": "option --link-gb-per-s; each GPU has an equal share of the pixels (profiler/estimate.py)",
        }
    link_bytes_per_s = link_gb_per_s * 1e9
    profile = Profile(
        name=name,
        provenance="estimated",
        row_buckets=None if execution == "eager" else ROW_BUCKETS,
        steps={rows: _exactly(piece.seconds) for rows, piece in steps.items()},
        chunks={name: tuple(_exactly(piece.seconds) for piece in pieces) for name, pieces in chunks.items()},
        corun={},
        overheads={key: _exactly(value) for key, value in overheads.items()},
        degrees={
            g: {r: _exactly(together(operations, r, device, mode, g, link_bytes_per_s)) for r in ROW_BUCKETS}
            for g in degrees
        },
        head=head,
    )
    made = Estimated(profile, steps, chunks, severity)
    profile.corun = made.corun(made)
    return made


def together(
    operations: Operations, rows: int, device: Gpu, mode: ForwardMode, degree: int, link_bytes_per_s: float
) -> float:
    """Seconds of a step that ``degree`` GPUs take together, each with its share of every image's pixels.

    Every GPU does 1/g of each operation with all weights. Each self-attention exchanges its queries, keys, values and
    outputs between all GPUs (Jacobs et al., DeepSpeed Ulysses, 2023): 4 tensors of which a GPU sends (g - 1) / g^2.
    The borders of convolutions and the sums of group norms travel too, and are taken to hide behind work (Li et al.,
    DistriFusion, 2024).
    """
    shared = tuple(
        (o._replace(flops=o.flops / degree, elements=o.elements / degree, m=-(-o.m // degree)), times)
        for o, times in operations
    )
    own = [(o, times) for o, times in operations if o.kind == "attention" and o.elements == 4 * o.m * o.n]
    sent = sum(times * o.elements for o, times in own) * rows * ACTIVATION_BYTES * (degree - 1) / degree**2
    exchanges = 4 * sum(times for _, times in own)
    return forward(shared, rows, device, mode).seconds + sent / link_bytes_per_s + exchanges * EXCHANGE_S


def estimate_profiles(resolution: str, *given: Any, **fields: Any) -> Profile:
    """The same with several resolutions, ``512x512,768x1024``, the first one first; the overheads are the first's.

    Pairs of two resolutions are estimated as those of one are.
    """
    parts = [part.strip() for part in resolution.split(",")]
    made = [estimated(*given, **fields, resolution=part) for part in parts]
    own = made[0].profile
    if len(made) == 1:
        return own
    profile = combined([one.profile for one in made], f"{own.name}-and-{len(made) - 1}-more")
    pairs = [(u, v, (u.profile.head.resolutions[0], v.profile.head.resolutions[0])) for u, v in permutations(made, 2)]
    profile.across = {sizes: u.corun(v) for u, v, sizes in pairs}
    first = profile.head.source.replace(f" --resolution {parts[0]}", "")
    profile.head = profile.head.model_copy(update={"source": f"{first} --resolution {','.join(parts)}"})
    return profile


def _exactly(seconds: float) -> Spread:
    return Spread.exactly(seconds * NS_PER_S)


def _cut(pieces: list[Occupancy], count: int) -> list[list[Occupancy]]:
    """Cut into ``count`` runs so that the longest is as short as possible, then the others as even as possible.

    All cuts are tried: 20 layers into 8 chunks is 50,388 of them.
    """
    until = [0, *accumulate(round(piece.seconds * NS_PER_S) for piece in pieces)]

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


def slowdowns(step: Occupancy, chunk: Occupancy, contention: float) -> tuple[float, float]:
    """(step, chunk) slowdowns, between perfect sharing (contention 0) and taking turns (1), and on beyond."""
    compute, memory = share(step.compute, chunk.compute), share(step.memory, chunk.memory)
    turns = share(step.busy, chunk.busy)
    perfect = (max(compute[0], memory[0]), max(compute[1], memory[1]))
    pair = [p + contention * max(0.0, t - p) for p, t in zip(perfect, turns, strict=True)]
    return pair[0], pair[1]


def _head(
    gpu: str,
    model: str,
    resolution: tuple[int, int],
    mode: ForwardMode,
    vae_bits: int,
    contention: float,
    decode_scale: float,
    command: str,
) -> Head:
    device, network = GPUS[gpu], MODELS[model]
    height, width = resolution
    flops, elements, weights, kernels = total(unet(model, height, width, mode.execution))
    layers = [pair for _, atom in decoder(model, height, width, mode.execution) for pair in atom]
    decode_flops, decode_elements, _, _ = total(layers)
    sheet, counted = "data sheet", "counted on the public diffusers configuration"
    fitted = "fitted on published times (synerdiff/validation/published_times.csv)"
    low, high = BAND[mode.execution]
    own = "our assumption; no measurement"
    sides = "0 = gaps and tails are filled and resources shared apart (low), 1 = taking turns (high)"
    trial = "option --contention; the only published trial (vllm-omni#5885: -0.15%) lies at the high end"
    power = device.watts * FLOPS_PER_JOULE[device.process] / 1e12
    assumptions = (
        ("peak", device.peak_flops / 1e12, "TFLOP/s, dense 16 bit, 32-bit sums", sheet),
        ("power_ceiling", power, "TFLOP/s at the board's power", "FLOPs a joule, profiler/datasheets.py"),
        ("bandwidth", device.bandwidth / 1e9, "GB/s", sheet),
        ("operands", FITTED.feed, "16-bit FLOPs a clock and multiprocessor", fitted),
        ("single", FITTED.single, "FLOPs of 32-bit convolutions a clock and multiprocessor", fitted),
        ("softmax", FITTED.softmax, "32-bit FLOPs a score of attention", fitted),
        ("bandwidth_share", FITTED.bandwidth, "share of the bandwidth", fitted),
        ("kernel", FITTED.kernel_s * 1e6, "microseconds a kernel", fitted),
        ("host", FITTED.host_s * 1e6, "microseconds of the host a kernel, not in engines", fitted),
        ("step_flops", flops / 1e9, "GFLOP a row", counted),
        ("step_activations", elements * 2 / 1e9, "GB a row", counted),
        ("step_weights", weights * 2 / 1e9, "GB", counted),
        ("step_kernels", kernels, "kernels a step", counted),
        ("decode_flops", decode_flops / 1e9, "GFLOP an image", counted),
        ("decode_activations", decode_elements * vae_bits / 8e9, "GB an image", counted),
        ("decode_scale", decode_scale, "factor on the decode", "option --decode-scale"),
        ("contention", contention, sides, f"{own}; {trial}"),
        ("step_dispatch", STEP_DISPATCH_S * 1e6, "microseconds a step", own),
        ("chunk_dispatch", CHUNK_DISPATCH_S * 1e6, "microseconds a chunk", own),
        ("result_copy", COPY_BYTES_PER_S / 1e9, "GB/s to the host, after 100 microseconds", "PCIe 4.0 x16 in practice"),
    )
    notes = {
        "model_title": network.title,
        "precision": mode.precision,
        "vae_bits": vae_bits,
        "n_meaning": "n is 0 in every cell: nothing was measured, and p10 = p90 = median",
        "assumptions": {
            key: {"value": float(f"{value:.6g}"), "unit": unit, "source": where}
            for key, value, unit, where in assumptions
        },
    }
    return Head(
        device=device.title,
        gpu=gpu,
        model=model,
        resolutions=(resolution,),
        dtype="float16" if mode.precision == "fp16" else "bfloat16",
        execution=mode.execution,
        source=command,
        band=Band(
            low=low,
            high=high,
            meaning="8 of 10 published times lie between these multiples of an estimate made without their card",
            card="checked against published times" if device.checked else "unchecked: no published time of this card",
        ),
        notes=notes,
    )
