"""Times of pieces of work on lanes: alone, and slowdowns of both sides while a step and a chunk run at the same time.

Machines drift by tens of percent within minutes, so solo points are not measured one after the other: a round takes
a few samples of every point, and rounds are spread over the whole measurement. All medians then describe the same
mixture of conditions, and their ratios hold. Every pair is visited twice, half a measurement apart, so that one bad
minute of the machine does not decide it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import ceil, inf
from statistics import median
from typing import NamedTuple

from profiler.bench import Again, Bench, TimedStep, linked, timed_chunk
from profiler.sampling import Rule, spread_of, warm_up
from synerdiff.core import NS_PER_S, PPM, InputError
from synerdiff.device.lanes import Lane, Work
from synerdiff.diffusion.decoder import Chunking
from synerdiff.diffusion.stages import ChunkFunction, finished_picture, prepare_chunks
from synerdiff.profile.tables import Spread

LEAD_NS = 30_000_000
TOP_UP_S = 0.008
LARGEST_GAP_NS = 500_000


class Side(NamedTuple):
    """One lane and what it replays."""

    lane: Lane
    again: Again

    def submit(self) -> Work[object]:
        return self.lane.submit(self.again())


def alone(side: Side, count: int) -> list[int]:
    """``count`` durations (ns) of the piece, back to back; one more run before them is not counted.

    All are submitted at once: a GPU then never waits for the host, as when the runner launches the next step early.
    """
    works = [side.submit() for _ in range(count + 1)]
    return durations(works)[1:]


def in_turn(sides: Sequence[Side], rounds: int) -> list[list[int]]:
    """Durations (ns) of several pieces that follow each other on one lane, per piece; one more round goes before."""
    works = [[side.submit() for side in sides] for _ in range(rounds + 1)]
    return [durations(column)[1:] for column in zip(*works, strict=True)]


def durations(works: Sequence[Work[object]]) -> list[int]:
    """Wait for them; raises what a piece raised."""
    return [end - start for start, end in _spans(works)]


def together(slow: Side, quick: Side, count: int, quick_ns: int) -> tuple[list[int], list[int]]:
    """Durations (ns) of two sides that replay at the same time: (slow, quick).

    The slow side runs ``count`` + 1 times; the quick one, of about ``quick_ns`` alone, replays as long. Each side's
    queue always holds more work, so that neither waits for this thread. Only pieces are kept that lie wholly inside a
    time in which the other side was active without a gap.
    """
    depth = max(2, ceil(LEAD_NS / quick_ns))
    quick_works = [quick.submit() for _ in range(depth)]
    slow_works = [slow.submit() for _ in range(count + 1)]
    ended = 0
    while not slow_works[-1].done():
        while ended < len(quick_works) and quick_works[ended].done():
            ended += 1
        while len(quick_works) - ended < depth:
            quick_works.append(quick.submit())
        # Sleeping, instead of waiting for each end, leaves the cores to the lanes.
        time.sleep(TOP_UP_S)
    slow_spans, quick_spans = _spans(slow_works), _spans(quick_works)
    return _inside(slow_spans, quick_spans), _inside(quick_spans, slow_spans)


def _spans(works: Sequence[Work[object]]) -> list[tuple[int, int]]:
    for work in works:
        work.result()
    return [(work.start_ns, work.end_ns) for work in works]


def _inside(pieces: Sequence[tuple[int, int]], partner: Sequence[tuple[int, int]]) -> list[int]:
    """Durations of the pieces that lie wholly inside one active time of the partner."""
    active = active_times(partner)
    return [end - start for start, end in pieces if any(low <= start and end <= high for low, high in active)]


def active_times(pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces of one lane, in order, joined where the gap between them is at most LARGEST_GAP_NS."""
    joined = [pieces[0]]
    for start, end in pieces[1:]:
        if start - joined[-1][1] <= LARGEST_GAP_NS:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


BLOCK = 4
BRACKET_NS = 30_000_000
FEWEST_IN_BRACKET, MOST_IN_BRACKET = 3, 10
GIVE_UP = 10
CONTENDED = 1.5
"""A guess: how much longer pieces take together, for estimating how long a measurement will take."""
VISITS = 2

Slowdowns = tuple[list[int], list[int]]
"""Samples (ppm) of the step and of the chunk."""


def chunk_pieces(bench: Bench, functions: Sequence[ChunkFunction]) -> list[Again]:
    """Each chunk with the input that it has in a decode, to be run on its own."""
    hidden, pieces = bench.latent(), []
    for function in functions:
        pieces.append(timed_chunk(function, hidden))
        hidden = bench.decode.submit(lambda function=function, hidden=hidden: function(hidden)).result()  # type: ignore[misc]
    return pieces


class Unsettled(InputError):
    """The two sides of a pair never ran together without a gap."""


def measure_corun(bench: Bench, step: Again, chunk: Again, so_far: Slowdowns, until_s: float = inf) -> Slowdowns:
    """One visit of a pair: its samples so far and new ones, slowdowns (ppm) of the step and of the chunk.

    Blocks of solo, co-run, solo: each co-run time is divided by the median of the solo times on both sides of it, so
    that drift cancels. A visit adds to both sides, has about half of the rule's time, and no further block after
    ``until_s`` of the monotonic clock. Raises Unsettled when the machine is so busy that the two never run without a
    gap.
    """
    sides = (Side(bench.denoise, step), Side(bench.decode, chunk))
    for side in sides:
        alone(side, 1)
    before = [alone(side, FEWEST_IN_BRACKET) for side in sides]
    slowdowns = (list(so_far[0]), list(so_far[1]))
    since_s = time.monotonic()
    while True:
        solo_ns = [median(times) for times in before]
        slow = 0 if solo_ns[0] >= solo_ns[1] else 1
        pair = together(sides[slow], sides[1 - slow], BLOCK, max(1, int(solo_ns[1 - slow])))
        during = pair if slow == 0 else pair[::-1]
        after = [alone(side, _bracket(ns)) for side, ns in zip(sides, solo_ns, strict=True)]
        for of_side, first, last, times in zip(slowdowns, before, after, during, strict=True):
            reference_ns = median([*first, *last])
            of_side += [max(1, round(PPM * ns / reference_ns)) for ns in times]
        before = after
        now_s = time.monotonic()
        spent_s = now_s - since_s
        over = now_s >= until_s
        grown = all(len(now) > len(first) for now, first in zip(slowdowns, so_far, strict=True))
        if grown and (over or all(bench.rule.enough(of_side, VISITS * spent_s) for of_side in slowdowns)):
            return slowdowns
        if not grown and (over or spent_s > GIVE_UP * bench.rule.cap_s):
            raise Unsettled("the machine is too busy: a step and a chunk never ran together without a gap")


def visit_s(rule: Rule, step_ns: float, chunk_ns: float) -> float:
    """About how long a visit of a pair with these solo times takes: one block, or the rule's time if that is longer."""
    both = step_ns + chunk_ns
    brackets = FEWEST_IN_BRACKET * both + sum(_bracket(ns) * ns for ns in (step_ns, chunk_ns))
    block_s = (2 * both + brackets + CONTENDED * (BLOCK + 1) * max(step_ns, chunk_ns)) / NS_PER_S
    return max(block_s, rule.cap_s / VISITS)


def _bracket(solo_ns: float) -> int:
    """Solo samples between two co-runs: short pieces get more, because they cost little."""
    return min(MOST_IN_BRACKET, max(FEWEST_IN_BRACKET, int(BRACKET_NS / solo_ns)))


BATCH = 2

Columns = list[list[int]]
"""Samples (ns) of one point, or of the points that can only be measured together (the chunks of a decode)."""

Sampler = Callable[[int], Columns]
"""Given a number of samples, that many for each of its columns."""


def step_samplers(bench: Bench, rows: Iterable[int], unguided_rows: int) -> dict[str, Sampler]:
    """``step R`` for each number of rows, and ``unguided R``: as many rows as one-row samples."""
    pieces = {f"step {r}": TimedStep(bench.model, r) for r in rows}
    pieces[f"unguided {unguided_rows}"] = TimedStep(bench.model, unguided_rows, guided=False)
    sides = {name: Side(bench.denoise, piece.again) for name, piece in pieces.items()}
    return {name: lambda count, side=side: [alone(side, count)] for name, side in sides.items()}  # type: ignore[misc]


def chunks_sampler(bench: Bench, functions: Sequence[ChunkFunction]) -> Sampler:
    """The chunks of one decode, run in order, each going on from what the one before it made."""
    sides = [Side(bench.decode, piece) for piece in linked(functions, bench.latent())]
    return lambda count: in_turn(sides, count)


def overhead_samplers(bench: Bench, by_rows: Mapping[int, TimedStep], whole: ChunkFunction) -> dict[str, Sampler]:
    """``overhead NAME`` for each name of `synerdiff.profile.tables.OVERHEADS` that this device has, and
    ``overhead idle R``: steps of each number of rows that are launched on an idle lane."""
    step = by_rows[min(by_rows)]
    latent = bench.latent()
    image = bench.decode.submit(lambda: whole(latent)).result()
    steps, chunks = Side(bench.denoise, step.again), Side(bench.decode, timed_chunk(whole, latent))
    samplers: dict[str, Callable[[int], list[int]]] = {
        "step_dispatch": lambda count: gaps(bench, steps, count, early=bench.on_gpu),
        "chunk_dispatch": lambda count: gaps(bench, chunks, count, early=False),
        "text_encode": lambda count: _host_times(bench, lambda: bench.model.start(0, 2), count),
        "result_copy": lambda count: _host_times(bench, lambda: finished_picture(image), count),
    }
    for rows, one in by_rows.items():
        samplers[f"idle {rows}"] = partial(launched_idle, bench, Side(bench.denoise, one.again))
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


def launched_idle(bench: Bench, side: Side, count: int) -> list[int]:
    """Durations (ns) of a piece when nothing is queued before it; one more run before them is not counted.

    A GPU's lane notes the start before this thread has launched all of the piece, so what the host takes is in them.
    """
    works = []
    for _ in range(count + 1):
        bench.device.synchronize()
        works.append(side.submit())
        works[-1].result()
    return durations(works)[1:]


def launch_times(side: Side, count: int) -> list[int]:
    """How long this thread is busy with launching a piece on a GPU."""
    samples = []
    for _ in range(count):
        function = side.again()
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
    """Warm up every sampler before the first sample that counts."""
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
