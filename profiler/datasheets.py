"""What an estimate starts from: data sheets of GPUs, and what identifies a model.

Everything here is a number with its source; the formulas are in ``profiler.durations``. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from synerdiff.core import InputError

_T = TypeVar("_T")

ALL_PRECISIONS = ("bf16", "fp16", "fp8", "int8")
NO_FP8 = ("bf16", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card: its multiprocessors, their clock, and what a clock brings; memory; board power.

    ``flops_per_clock``: dense 16-bit FLOPs with 32-bit sums, per multiprocessor and clock (whitepapers). 32-bit tensor
    products (TF32) run at half of it. ``eight_bit``: how many times faster 8-bit products are. ``half_sums``: 16-bit
    sums double the rate (GeForce; engines choose them in fp16). ``clock_ghz`` is the clock held under load: the
    rated boost on server cards, 5 to 9% above it on GeForce cards.
    """

    title: str
    multiprocessors: int
    clock_ghz: float
    flops_per_clock: int
    vector_flops_per_clock: int
    """32-bit FLOPs outside the tensor cores, per multiprocessor and clock."""
    bandwidth: float
    """Bytes per second."""
    cache_mib: int
    """Level 2 cache."""
    watts: int
    process: str
    """Key of ``FLOPS_PER_JOULE``."""
    eight_bit: int = 2
    precisions: tuple[str, ...] = ALL_PRECISIONS
    half_sums: bool = False
    checked: bool = True
    """Published times of this card were compared (``synerdiff scorecard --only times``)."""

    @property
    def peak_flops(self) -> float:
        """Dense 16-bit products with 32-bit sums, FLOP/s, at ``clock_ghz``."""
        return self.multiprocessors * self.clock_ghz * 1e9 * self.flops_per_clock


FLOPS_PER_JOULE = {"hopper": 1.13e12, "ampere": 1.0e12, "ada": 0.75e12, "samsung": 0.469e12, "volta": 0.33e12}
"""16-bit tensor FLOPs that a joule of board power buys, the ceiling of power-limited cards. Hopper: 790 TFLOP/s at
700 W, in large products that others measured. Ampere: the 250 W of an A100 PCIe nearly keep the speed of 400 W (chosen
on its published times). Samsung's 8 nm (A10, RTX 30): fitted. Ada with GDDR memory, and Volta with Turing: assumed."""


def _geforce(title: str, units: int, clock: float, bandwidth: float, cache: int, watts: int, process: str) -> Gpu:
    return Gpu(
        f"NVIDIA GeForce {title}", units, clock, 512, 256, bandwidth, cache, watts, process,
        4 if process == "samsung" else 2, NO_FP8 if process == "samsung" else ALL_PRECISIONS, half_sums=True,
    )  # fmt: skip


GPUS = {
    "h100": Gpu("NVIDIA H100 SXM 80 GB", 132, 1.83, 4096, 256, 3.35e12, 50, 700, "hopper"),
    "h100-pcie": Gpu("NVIDIA H100 PCIe 80 GB", 114, 1.62, 4096, 256, 2.039e12, 50, 350, "hopper"),
    "h200": Gpu("NVIDIA H200 SXM 141 GB", 132, 1.83, 4096, 256, 4.8e12, 50, 700, "hopper"),
    "h800": Gpu("NVIDIA H800 SXM 80 GB", 132, 1.83, 4096, 256, 3.35e12, 50, 700, "hopper"),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 108, 1.41, 2048, 128, 2.039e12, 40, 400, "ampere", precisions=NO_FP8),
    "a100-pcie": Gpu("NVIDIA A100 PCIe 40 GB", 108, 1.41, 2048, 128, 1.555e12, 40, 250, "ampere", precisions=NO_FP8),
    "l40s": Gpu("NVIDIA L40S 48 GB", 142, 2.52, 1024, 256, 0.864e12, 96, 350, "ada"),
    "l4": Gpu("NVIDIA L4 24 GB", 58, 2.04, 1024, 256, 0.3e12, 48, 72, "ada", checked=False),
    "a10": Gpu("NVIDIA A10 24 GB", 72, 1.695, 1024, 256, 0.6e12, 6, 150, "samsung", precisions=NO_FP8),
    "v100": Gpu("NVIDIA V100 SXM 16 GB", 80, 1.53, 1024, 128, 0.9e12, 6, 300, "volta", precisions=("fp16",)),
    "t4": Gpu("NVIDIA T4 16 GB", 40, 1.59, 1024, 128, 0.32e12, 4, 70, "volta", precisions=("fp16", "int8")),
    "b200": Gpu("NVIDIA B200 SXM 180 GB", 148, 1.86, 8192, 256, 8.0e12, 126, 1000, "hopper", checked=False),
    "rtx4090": _geforce("RTX 4090 24 GB", 128, 2.7, 1.008e12, 72, 450, "ada"),
    "rtx4080": _geforce("RTX 4080 16 GB", 76, 2.75, 0.717e12, 64, 320, "ada"),
    "rtx4070ti": _geforce("RTX 4070 Ti 12 GB", 60, 2.75, 0.504e12, 48, 285, "ada"),
    "rtx3080ti": _geforce("RTX 3080 Ti 12 GB", 80, 1.8, 0.912e12, 6, 350, "samsung"),
    "rtx3090": _geforce("RTX 3090 24 GB", 82, 1.8, 0.936e12, 6, 350, "samsung"),
    "rtx3080": _geforce("RTX 3080 10 GB", 68, 1.8, 0.76e12, 5, 320, "samsung"),
    "rtx3070": _geforce("RTX 3070 8 GB", 46, 1.85, 0.448e12, 4, 220, "samsung"),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A model by its configuration's name, its own resolution (pixels a side), and its text encoders."""

    title: str
    resolution: int
    text_encoders: tuple[tuple[int, int, int], ...]
    """(layers, channels, heads) of each."""


MODELS = {
    "sd15": Model("Stable Diffusion 1.5", 512, ((12, 768, 12),)),
    "sdxl": Model("Stable Diffusion XL", 1024, ((12, 768, 12), (32, 1280, 20))),
}


def known(table: Mapping[str, _T], name: str, what: str) -> _T:
    """The entry ``name``; InputError lists the known names."""
    if name not in table:
        raise InputError(
            f"nothing is known about the {what} '{name}', so it cannot be estimated; known are {', '.join(table)}."
        )
    return table[name]


_IDLE_WORDS = re.compile(r"nvidia|geforce|sxm\d?|\d+ ?gb|[^a-z0-9]")


def gpu_key(name: str) -> str:
    """The key of a card as people write it: ``NVIDIA H100 SXM5 80GB`` is h100, ``RTX 4090`` rtx4090."""
    flat = _IDLE_WORDS.sub("", name.lower())
    return next((key for key in GPUS if key.replace("-", "") == flat), name)
