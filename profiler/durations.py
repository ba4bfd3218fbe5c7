"""How long the operations of a forward take on a card.

A product (convolution or linear layer) of F FLOPs takes ``F / rate + bytes / bandwidth``; everything else the longer
of the two. Every kernel adds ``kernel_s``. The parts, each with one constant at most:

- *Operands*: a multiprocessor computes ``c`` FLOPs a clock on its data sheet, and its shared memory delivers operands
  for ``feed`` FLOPs a clock; one follows the other, so a clock brings ``1 / (1/c + 1/feed)``. This is why Hopper
  reaches a smaller share of its peak than Ampere, and Ampere than GeForce cards. 32-bit convolutions stop at
  ``single``.
- *Power*: no card exceeds what its board power buys (``datasheets.FLOPS_PER_JOULE``).
- *Waves*: a product is cut into tiles of 128x128 to 64x64 outputs (the sums split up to 16 times when there are few);
  tiles run in waves over the multiprocessors, and the last wave is seldom full.
- *Softmax*: attention needs, beside its products, ``softmax`` 32-bit FLOPs for every score outside the tensor cores.
- *Memory*: ``bandwidth`` of the data sheet; what a kernel moves of activations goes at the speed of the level 2 cache
  where it is less than half of it. torch's GroupNorm reads its input with one block for each of 32 groups and row, so
  with few rows it does not fill the card.
- *Launches*: eager and compiled forwards are launched by a host that needs ``host_s`` a kernel, while the card works
  through the queue: together ``(card^6 + host^6)^(1/6)``. Engines replay a graph.

The constants were fitted on published times that were marked beforehand and judged on the others
(``synerdiff/validation/published_times.csv``). Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import NamedTuple

from profiler.datasheets import FLOPS_PER_JOULE, Gpu
from profiler.operations import EXECUTIONS, Operation, Operations
from synerdiff.core import InputError

EIGHT_BIT = ("fp8", "int8")
CACHE_BYTES_PER_CLOCK = 16
"""Level 2 cache, per multiprocessor and clock (A100 2.4 TB/s, RTX 4090 5.5 TB/s)."""
CACHE_SHARE = 0.5
ATTENTION_SHARE = 0.6
UNFUSED_SHARE = 0.3
"""Attention without a flash kernel, as a share of a product's rate."""
GROUPS = 32
TILES = ((128, 128, 1.0), (128, 64, 1.0), (64, 64, 0.9))
SPLITS = (1, 2, 4, 8, 16)
SPLIT_SHARE = 0.9
QUEUE = 6
"""Exponent with which the host's and the card's time join."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What was fitted."""

    feed: float = 9060.0
    """Operands of this many FLOPs reach a multiprocessor in a clock, 16 bit."""
    single: float = 418.0
    """FLOPs of 32-bit convolutions, per multiprocessor and clock."""
    softmax: float = 36.6
    """32-bit FLOPs outside the tensor cores for every score of an attention."""
    bandwidth: float = 0.933
    """Share of the data sheet's bandwidth."""
    kernel_s: float = 5.64e-6
    """What a kernel costs beside its work: launch gap, ramp-up, end."""
    host_s: float = 28.4e-6
    """The host's time for a kernel."""
    samsung: float = FLOPS_PER_JOULE["samsung"]


FITTED = Constants()


@dataclass(frozen=True, slots=True)
class ForwardMode:
    """How a forward runs: execution, precision, and whether it is in single precision, 32 bit (decoders)."""

    execution: str = "compiled"
    precision: str = "bf16"
    single: bool = False

    def check(self, gpu: Gpu) -> None:
        """InputError for what the card or the execution has not."""
        if self.execution not in EXECUTIONS:
            raise InputError(f"execution is '{self.execution}'; allowed are {', '.join(EXECUTIONS)}.")
        if self.precision not in gpu.precisions:
            raise InputError(f"precision is '{self.precision}'; {gpu.title} has {', '.join(gpu.precisions)}.")
        if self.precision in EIGHT_BIT and self.execution == "eager":
            raise InputError(f"precision {self.precision} needs execution compiled or engine, not eager.")


class Occupancy(NamedTuple):
    """Time of one piece of work alone, and how much of it needs a resource.

    ``compute_s``: with all multiprocessors full, the time its products and softmax would take; ``memory_s``: its bytes
    at the attainable bandwidth. What is left of ``seconds`` are gaps, tails of waves, and the host.
    """

    seconds: float
    compute_s: float
    memory_s: float

    @property
    def compute(self) -> float:
        """Share of the time in which the arithmetic units are busy, at most 1."""
        return min(1.0, self.compute_s / self.seconds)

    @property
    def memory(self) -> float:
        """Share of the time in which the memory is busy, at most 1."""
        return min(1.0, self.memory_s / self.seconds)

    @property
    def busy(self) -> float:
        """Share in which neither gaps nor unfilled multiprocessors leave room."""
        return min(1.0, (self.compute_s + self.memory_s) / self.seconds)

    def scaled(self, factor: float) -> Occupancy:
        """The same shares over ``factor`` times the time."""
        return Occupancy(factor * self.seconds, factor * self.compute_s, factor * self.memory_s)


def joined(pieces: Iterable[Occupancy]) -> Occupancy:
    """Pieces that run one after the other, as one."""
    return Occupancy._make(map(sum, zip(*pieces, strict=True)))


@cache
def filled(m: int, n: int, units: int) -> float:
    """Share of the multiprocessors' time that the best tiling of an m x n product uses."""
    best = 0.0
    for height, width, share in TILES:
        tiles = ceil(m / height) * ceil(n / width)
        for split in SPLITS:
            if split > 1 and tiles > units:
                break
            waves = ceil(tiles * split / units)
            used = m * n * split / (waves * units * height * width)
            best = max(best, used * share * (1 if split == 1 else SPLIT_SHARE))
    return best


def product_flops_per_s(gpu: Gpu, mode: ForwardMode, kind: str, constants: Constants) -> float:
    """What full waves of a product reach."""
    clocks = gpu.multiprocessors * gpu.clock_ghz * 1e9
    engine = mode.execution == "engine"
    joule = constants.samsung if gpu.process == "samsung" else FLOPS_PER_JOULE[gpu.process]
    if mode.single and not (engine or kind == "conv"):
        return clocks * gpu.vector_flops_per_clock
    per_clock = float(gpu.flops_per_clock)
    if gpu.half_sums and engine and mode.precision != "bf16":
        per_clock *= 2
    if mode.single:
        return min(clocks * min(gpu.flops_per_clock / 2 * _fed(gpu.flops_per_clock, constants), constants.single),
                   gpu.watts * joule / 2)  # fmt: skip
    fed = _fed(per_clock, constants)
    if mode.precision in EIGHT_BIT and (kind == "linear" or (engine and kind == "conv")):
        return min(clocks * gpu.flops_per_clock * gpu.eight_bit, gpu.watts * joule * 2) * fed
    return min(clocks * per_clock, gpu.watts * joule) * fed


def _fed(per_clock: float, constants: Constants) -> float:
    return 1 / (1 + per_clock / constants.feed)


def spent(operation: Operation, rows: int, gpu: Gpu, mode: ForwardMode, constants: Constants = FITTED) -> Occupancy:
    """One operation of ``rows`` rows on the card alone, host aside."""
    kind, units = operation.kind, gpu.multiprocessors
    if kind == "layout" and mode.single:
        return Occupancy(0.0, 0.0, 0.0)
    size = 4 if mode.single else 2
    eight_bit = mode.precision in EIGHT_BIT and (kind == "linear" or (kind == "conv" and mode.execution == "engine"))
    clocks = units * gpu.clock_ghz * 1e9
    bandwidth = gpu.bandwidth * constants.bandwidth
    elements = operation.elements * rows
    cached = elements * 2 / max(1, operation.kernels) < CACHE_SHARE * gpu.cache_mib * 2**20
    speed = max(bandwidth, clocks * CACHE_BYTES_PER_CLOCK) if cached else bandwidth
    memory = elements * size / speed + operation.weights * (1 if eight_bit else size) / bandwidth
    gap = operation.kernels * constants.kernel_s
    flops = operation.flops * rows
    if kind in ("conv", "linear"):
        if eight_bit and mode.execution == "compiled":  # inputs are read in 16 bit and written in 8 first
            memory += (operation.elements - operation.m * operation.n) * rows * 3 / bandwidth
        full = flops / product_flops_per_s(gpu, mode, kind, constants)
        return Occupancy(full / filled(operation.m * rows, operation.n, units) + memory + gap, full, memory)
    rate = product_flops_per_s(gpu, mode, "attention", constants)
    if kind == "attention":
        blocks = ceil(operation.m * rows / 128)
        padded = ceil(operation.n / 32) * 32 / operation.n
        softmax = flops / (4 * operation.n) * constants.softmax / (clocks * gpu.vector_flops_per_clock)
        full = flops * padded / (rate * ATTENTION_SHARE) + softmax
        return Occupancy(max(full * ceil(blocks / units) * units / blocks, memory) + gap, full, memory)
    if kind == "unfused":
        full = flops / (rate * UNFUSED_SHARE)
        return Occupancy(max(full, memory) + gap, full, memory)
    unfilled = min(1.0, rows * GROUPS / units) if kind == "moments" else 1.0
    return Occupancy(memory / unfilled + gap, 0.0, memory)


def forward(operations: Operations, rows: int, gpu: Gpu, mode: ForwardMode, constants: Constants = FITTED) -> Occupancy:
    """All operations of a forward of ``rows`` rows, with the host that launches them."""
    seconds = compute = memory = 0.0
    kernels = 0
    for operation, times in operations:
        piece = spent(operation, rows, gpu, mode, constants)
        seconds += times * piece.seconds
        compute += times * piece.compute_s
        memory += times * piece.memory_s
        kernels += times * operation.kernels * (operation.kind != "layout" or not mode.single)
    host = 0.0 if mode.execution == "engine" else kernels * constants.host_s
    return Occupancy((seconds**QUEUE + host**QUEUE) ** (1 / QUEUE), compute, memory)
