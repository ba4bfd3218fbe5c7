"""The tables of a profile, each measured on the two lanes of a bench."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from profiler.pieces import ChunkPiece, StepPiece, linked
from profiler.replay import Piece, Side, alone, durations, in_turn, together
from profiler.sampling import Rule, spread_of, warm_up
from synerdiff.core import PPM, InputError
from synerdiff.diffusion.chunking import WHOLE, Chunking
from synerdiff.diffusion.device import Device, Lane
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.stages import ChunkFunction, finished_picture, prepare_chunks
from synerdiff.profile import Spread

BATCH = 5
BLOCK = 4
GIVE_UP = 10
BRACKET_NS = 30_000_000
FEWEST_IN_BRACKET, MOST_IN_BRACKET = 3, 10


@dataclass(frozen=True, slots=True)
class Bench:
    """A model on a device with its two lanes, steps prepared, and the rule that says how often to sample."""

    model: DiffusionModel
    device: Device
    denoise: Lane
    decode: Lane
    rule: Rule

    @property
    def on_gpu(self) -> bool:
        return self.device.torch_device.type == "cuda"

    def latent(self) -> torch.Tensor:
        return self.model.start(0, 2).latent


def measure_steps(bench: Bench, pieces: Mapping[str, Piece], keep: Callable[[str, Spread], None]) -> None:
    """Solo times of steps. Points take turns of a few samples each, so that slow drift reaches all of them alike."""
    sides = {name: Side(bench.denoise, piece) for name, piece in pieces.items()}
    samples: dict[str, list[int]] = {name: [] for name in sides}
    spent_s = dict.fromkeys(sides, 0.0)
    for side in sides.values():
        warm_up(lambda count, side=side: alone(side, count), bench.rule.cap_s)  # type: ignore[misc]
    while sides:
        for name, side in list(sides.items()):
            since_s = time.monotonic()
            samples[name] += alone(side, BATCH)
            spent_s[name] += time.monotonic() - since_s
            if bench.rule.enough(samples[name], spent_s[name]):
                del sides[name]
                keep(name, spread_of(samples[name]))


def measure_atoms(bench: Bench) -> dict[str, Spread]:
    """Solo time of each atom of the decoder, run in order; what a boundary between chunks costs is in each of them."""
    atoms = bench.model.decoder.atoms
    every = Chunking("atoms", tuple(range(1, len(atoms))))
    spreads = measure_chunks(bench, prepare_chunks(bench.model, every, bench.decode))
    return {atom.name: spread for atom, spread in zip(atoms, spreads, strict=True)}


def measure_chunks(bench: Bench, functions: Sequence[ChunkFunction]) -> list[Spread]:
    """Solo time of each chunk, run in order like a decode."""
    sides = [Side(bench.decode, piece) for piece in linked(functions, bench.latent())]
    warm_up(lambda count: [sum(times) for times in zip(*in_turn(sides, count), strict=True)], bench.rule.cap_s)
    samples: list[list[int]] = [[] for _ in sides]
    since_s = time.monotonic()
    while not all(bench.rule.enough(found, time.monotonic() - since_s) for found in samples):
        for found, more in zip(samples, in_turn(sides, BATCH), strict=True):
            found += more
    return [spread_of(found) for found in samples]


def chunk_pieces(bench: Bench, functions: Sequence[ChunkFunction]) -> list[ChunkPiece]:
    """Each chunk with the input that it has in a decode, to be run on its own."""
    hidden, pieces = bench.latent(), []
    for function in functions:
        pieces.append(ChunkPiece(function, hidden))
        hidden = bench.decode.submit(lambda function=function, hidden=hidden: function(hidden)).result()  # type: ignore[misc]
    return pieces


def measure_corun(bench: Bench, step: StepPiece, chunk: ChunkPiece) -> tuple[Spread, Spread]:
    """Slowdowns (ppm) of a step and a chunk that replay at the same time: (step, chunk).

    Blocks of solo, co-run, solo: each co-run time is divided by the median of the solo times on both sides of it, so
    that drift cancels. Raises InputError when the machine is so busy that the two never run without a gap.
    """
    sides = (Side(bench.denoise, step), Side(bench.decode, chunk))
    for side in sides:
        alone(side, 1)
    before = [alone(side, FEWEST_IN_BRACKET) for side in sides]
    slowdowns: tuple[list[int], list[int]] = ([], [])
    since_s = time.monotonic()
    while not all(bench.rule.enough(found, time.monotonic() - since_s) for found in slowdowns):
        if time.monotonic() - since_s > GIVE_UP * bench.rule.cap_s and not all(slowdowns):
            raise InputError("The machine is too busy to measure: a step and a chunk never ran together without a gap.")
        solo_ns = [median(times) for times in before]
        slow = 0 if solo_ns[0] >= solo_ns[1] else 1
        pair = together(sides[slow], sides[1 - slow], BLOCK, max(1, int(solo_ns[1 - slow])))
        during = pair if slow == 0 else pair[::-1]
        after = [alone(side, _bracket(ns)) for side, ns in zip(sides, solo_ns, strict=True)]
        for found, first, last, times in zip(slowdowns, before, after, during, strict=True):
            reference_ns = median([*first, *last])
            found += [max(1, round(PPM * ns / reference_ns)) for ns in times]
        before = after
    return spread_of(slowdowns[0]), spread_of(slowdowns[1])


def _bracket(solo_ns: float) -> int:
    """Solo samples between two co-runs: short pieces get more, because they cost little."""
    return min(MOST_IN_BRACKET, max(FEWEST_IN_BRACKET, int(BRACKET_NS / solo_ns)))


def measure_overheads(bench: Bench, step: StepPiece) -> dict[str, Spread]:
    """What a runner adds to the pieces (``docs/profiling.md`` says what is in each); ``step`` is a small one."""
    whole = prepare_chunks(bench.model, WHOLE, bench.decode)
    image = bench.decode.submit(lambda: whole[0](bench.latent())).result()
    chunk = chunk_pieces(bench, whole)[0]
    launch = measure_launch(bench, step)
    found = {
        "step_dispatch": measure_gaps(bench, Side(bench.denoise, step), early=launch is not None),
        "chunk_dispatch": measure_gaps(bench, Side(bench.decode, chunk), early=False),
        "decision_lead": launch or Spread(0, 0, 0, 0),
        "text_encode": _host_times(bench, lambda: bench.model.start(0, 2)),
        "result_copy": _host_times(bench, lambda: finished_picture(image)),
    }
    bench.device.synchronize()
    return found


def measure_gaps(bench: Bench, side: Side, early: bool) -> Spread:
    """Time from the end of one piece to the start of the next on its lane.

    As the runner hands over: this thread waits for the end and submits the next piece; or, with ``early``, it has
    submitted the next piece before that end.
    """
    alone(side, 2)
    works = [side.submit()]
    for _ in range(bench.rule.most):
        if not early:
            bench.device.wait_any([works[-1]])
        works.append(side.submit())
        works[-2].result()
    durations(works)
    return spread_of([max(1, later.start_ns - work.end_ns) for work, later in pairwise(works)])


def measure_launch(bench: Bench, step: StepPiece) -> Spread | None:
    """How long this thread needs to launch a step on a GPU, None on a CPU, whose lanes launch for themselves.

    A decision must fall this long before the running step ends; the 90th percentile stands for the median, because
    a late launch costs more than an early one.
    """
    if not bench.on_gpu:
        return None
    side, samples = Side(bench.denoise, step), []
    alone(side, 2)
    for _ in range(bench.rule.most):
        function = step.again()
        since_ns = time.monotonic_ns()
        work = side.lane.submit(function)
        samples.append(time.monotonic_ns() - since_ns)
        work.result()
    found = spread_of(samples)
    return Spread(found.p90, found.p10, found.p90, found.n)


def _host_times(bench: Bench, function: Callable[[], object]) -> Spread:
    samples = []
    for _ in range(bench.rule.most + 2):
        bench.device.synchronize()
        since_ns = time.monotonic_ns()
        function()
        bench.device.synchronize()
        samples.append(max(1, time.monotonic_ns() - since_ns))
    return spread_of(samples[2:])
