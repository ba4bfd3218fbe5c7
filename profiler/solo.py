"""Times of pieces that run alone, and of what a runner adds to them.

Machines drift by tens of percent within minutes, so solo points are not measured one after the other: a round takes
a few samples of every point, and rounds are spread over the whole measurement. All medians then describe the same
mixture of conditions, and their ratios hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from profiler.bench import Bench
from profiler.pieces import ChunkPiece, StepPiece, linked
from profiler.replay import Side, alone, durations, in_turn
from profiler.sampling import spread_of, warm_up
from synerdiff.diffusion.decoder import Chunking
from synerdiff.diffusion.stages import ChunkFunction, finished_picture, prepare_chunks
from synerdiff.profile.tables import Spread

BATCH = 2

Columns = list[list[int]]
"""Samples (ns) of one point, or of the points that can only be measured together (the chunks of a decode)."""

Sampler = Callable[[int], Columns]
"""Given a number of samples, that many for each of its columns."""


def step_samplers(bench: Bench, rows: Iterable[int], unguided_rows: int) -> dict[str, Sampler]:
    """``step R`` for each number of rows, and ``unguided R``: as many rows as one-row samples."""
    pieces = {f"step {r}": StepPiece(bench.model, r) for r in rows}
    pieces[f"unguided {unguided_rows}"] = StepPiece(bench.model, unguided_rows, guided=False)
    sides = {name: Side(bench.denoise, piece) for name, piece in pieces.items()}
    return {name: lambda count, side=side: [alone(side, count)] for name, side in sides.items()}  # type: ignore[misc]


def chunks_sampler(bench: Bench, functions: Sequence[ChunkFunction]) -> Sampler:
    """The chunks of one decode, run in order, each going on from what the one before it made."""
    sides = [Side(bench.decode, piece) for piece in linked(functions, bench.latent())]
    return lambda count: in_turn(sides, count)


def overhead_samplers(bench: Bench, step: StepPiece, whole: ChunkFunction) -> dict[str, Sampler]:
    """``overhead NAME`` for each name of `synerdiff.profile.tables.OVERHEADS` that this device has."""
    latent = bench.latent()
    image = bench.decode.submit(lambda: whole(latent)).result()
    steps, chunks = Side(bench.denoise, step), Side(bench.decode, ChunkPiece(whole, latent))
    samplers: dict[str, Callable[[int], list[int]]] = {
        "step_dispatch": lambda count: gaps(bench, steps, count, early=bench.on_gpu),
        "chunk_dispatch": lambda count: gaps(bench, chunks, count, early=False),
        "text_encode": lambda count: _host_times(bench, lambda: bench.model.start(0, 2), count),
        "result_copy": lambda count: _host_times(bench, lambda: finished_picture(image), count),
    }
    if bench.on_gpu:
        # A CPU lane launches for itself, so its decisions need no lead.
        samplers["decision_lead"] = lambda count: launch_times(steps, count)
    return {f"overhead {name}": lambda count, take=take: [take(count)] for name, take in samplers.items()}  # type: ignore[misc]


def gaps(bench: Bench, side: Side, count: int, early: bool) -> list[int]:
    """Times from the end of one piece to the start of the next on its lane.

    As the runner hands over: this thread waits for the end and submits the next piece; or, with ``early``, it has
    submitted the next piece before that end.
    """
    works = [side.submit()]
    for _ in range(count):
        if not early:
            bench.device.wait_any([works[-1]])
        works.append(side.submit())
        works[-2].result()
    durations(works)
    return [max(1, later.start_ns - work.end_ns) for work, later in pairwise(works)]


def launch_times(side: Side, count: int) -> list[int]:
    """How long this thread is busy with launching a piece on a GPU."""
    samples = []
    for _ in range(count):
        function = side.piece.again()
        since_ns = time.monotonic_ns()
        work = side.lane.submit(function)
        samples.append(time.monotonic_ns() - since_ns)
        work.result()
    return samples


def _host_times(bench: Bench, function: Callable[[], object], count: int) -> list[int]:
    samples = []
    for _ in range(count + 1):
        bench.device.synchronize()
        since_ns = time.monotonic_ns()
        function()
        bench.device.synchronize()
        samples.append(max(1, time.monotonic_ns() - since_ns))
    return samples[1:]


def warm_up_all(bench: Bench, samplers: Mapping[str, Sampler]) -> None:
    for sample in samplers.values():
        warm_up(lambda count, sample=sample: [sum(once) for once in zip(*sample(count), strict=True)], bench.rule.cap_s)  # type: ignore[misc]


def take_round(samplers: Mapping[str, Sampler]) -> dict[str, Columns]:
    """A few samples of every point."""
    return {name: sample(BATCH) for name, sample in samplers.items()}


def measure_atoms(bench: Bench) -> dict[str, Spread]:
    """Solo time of each atom of the decoder, in the course of whole decodes; what a boundary between chunks costs is
    in each of them."""
    atoms = bench.model.decoder.atoms
    every = Chunking("atoms", tuple(range(1, len(atoms))))
    sample = chunks_sampler(bench, prepare_chunks(bench.model, every, bench.decode))
    warm_up_all(bench, {"atoms": sample})
    columns = sample(bench.rule.most)
    return {atom.name: spread_of(column) for atom, column in zip(atoms, columns, strict=True)}
