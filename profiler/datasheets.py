"""What an estimate starts from: data sheets of GPUs, sizes of models, and the layers of the Stable Diffusion decoder.

Everything here is a number with its source; the formulas are in ``profiler.estimate``. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from synerdiff.core import InputError

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense 16-bit peak (FLOP/s), memory bandwidth (bytes/s), and the share of the peak that large batches reach."""

    title: str
    peak_flops: float
    bandwidth: float
    step_efficiency: float
    source: str
    efficiency_source: str


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of one model at its own resolution, per row of a step, per image of a decode, per text encoding."""

    title: str
    resolution: int
    step_flops: float
    step_traffic_bytes: float
    step_weight_bytes: float
    step_kernels: int
    decode_traffic_bytes: float
    text_flops: float
    text_weight_bytes: float
    text_kernels: int
    source: str


_CALIBRATED = (
    "chosen so that SDXL steps of 16 rows reach 400 TFLOP/s on H100; with the kernel overhead the H100 "
    "speeds at 2 rows then lie between torch.compile and stable-fast"
)
_SMALLER = "not calibrated: a smaller GPU is filled by fewer rows, so a larger share of its peak is assumed"

GPUS = {
    "h100": Gpu(
        "NVIDIA H100 SXM 80 GB", 989.4e12, 3.35e12, 0.44, "data sheet: 1,979 TFLOP/s sparse, halved", _CALIBRATED
    ),
    "h200": Gpu(
        "NVIDIA H200 SXM 141 GB", 989.4e12, 4.8e12, 0.44, "data sheet: 1,979 TFLOP/s sparse, halved", _CALIBRATED
    ),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 312e12, 2.039e12, 0.60, "data sheet: 312 TFLOP/s dense", _SMALLER),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090 24 GB",
        165.2e12,
        1.008e12,
        0.60,
        "Ada architecture paper: 165.2 TFLOP/s dense, 16-bit inputs with 32-bit sums",
        _SMALLER,
    ),
}

_SIZES = "FLOPs and eager traffic counted on the public diffusers configurations, one row forward, 16 bit"

MODELS = {
    "sd15": Model(
        title="Stable Diffusion 1.5, 512x512",
        resolution=512,
        step_flops=803e9,
        step_traffic_bytes=4.1 * GIB,
        step_weight_bytes=1639 * MIB,
        step_kernels=800,
        decode_traffic_bytes=7.9 * GIB,
        text_flops=13e9,
        text_weight_bytes=235 * MIB,
        text_kernels=180,
        source=_SIZES,
    ),
    "sdxl": Model(
        title="Stable Diffusion XL, 1024x1024",
        resolution=1024,
        step_flops=6761e9,
        step_traffic_bytes=22.6 * GIB,
        step_weight_bytes=4897 * MIB,
        step_kernels=2600,
        decode_traffic_bytes=31.2 * GIB,
        text_flops=111e9,
        text_weight_bytes=1560 * MIB,
        text_kernels=660,
        source=_SIZES,
    ),
}


def _known(table: dict[str, Gpu] | dict[str, Model], name: str, what: str) -> None:
    if name not in table:
        raise InputError(
            f"nothing is known about the {what} '{name}', so it cannot be estimated; known are {', '.join(table)}."
        )


def find_gpu(name: str) -> Gpu:
    _known(GPUS, name, "GPU")
    return GPUS[name]


def find_model(name: str) -> Model:
    _known(MODELS, name, "model")
    return MODELS[name]


@dataclass(frozen=True, slots=True)
class Atom:
    """One indivisible layer of the decoder: products (FLOPs), activations moved (elements) and kernels launched."""

    name: str
    flops: float
    elements: float
    kernels: int


def _conv(inputs: int, outputs: int, pixels: int, width: int = 3) -> float:
    return 2.0 * width * width * inputs * outputs * pixels


def _resnet(name: str, inputs: int, outputs: int, pixels: int) -> Atom:
    """Twice norm, activation, convolution; and a 1x1 shortcut when the channels change."""
    shortcut = inputs != outputs
    flops = _conv(inputs, outputs, pixels) + _conv(outputs, outputs, pixels)
    flops += _conv(inputs, outputs, pixels, 1) if shortcut else 0
    elements = (4 * inputs + inputs + outputs) + (4 * outputs + 2 * outputs) + 3 * outputs
    elements += inputs + outputs if shortcut else 0
    return Atom(name, flops, float(elements * pixels), 8 if shortcut else 7)


def _upsampler(name: str, channels: int, pixels: int) -> Atom:
    """Nearest-neighbour doubling, then a convolution; ``pixels`` counts after the doubling."""
    return Atom(name, _conv(channels, channels, pixels), channels * pixels * (0.25 + 1 + 1 + 1), 2)


def decoder_atoms(resolution: int) -> tuple[Atom, ...]:
    """The 20 layers of the Stable Diffusion and SDXL decoder in order, for a square image of that many pixels a side.

    Channels are those of the public AutoencoderKL configuration (128, 256, 512, 512; two layers per block, plus one
    in the decoder); the latent is an eighth of the image's side.
    """
    side = resolution // 8
    pixels = side * side
    attention = 4 * _conv(512, 512, pixels, 1) + 2 * 2.0 * pixels * pixels * 512
    atoms = [
        Atom("conv_in", _conv(4, 512, pixels), 516.0 * pixels, 1),
        _resnet("mid.res0", 512, 512, pixels),
        Atom("mid.attn", attention, 14.0 * 512 * pixels, 10),
        _resnet("mid.res1", 512, 512, pixels),
    ]
    channels = 512
    for block, outputs in enumerate((512, 512, 256, 128)):
        for layer in range(3):
            atoms.append(_resnet(f"up{block}.res{layer}", channels, outputs, pixels))
            channels = outputs
        if block < 3:
            pixels *= 4
            atoms.append(_upsampler(f"up{block}.up", channels, pixels))
    atoms.append(Atom("out", _conv(128, 3, pixels), (5 * 128 + 3.0) * pixels, 3))
    return tuple(atoms)
