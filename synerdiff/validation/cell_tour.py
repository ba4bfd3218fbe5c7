"""A profile's cells measured by the runner itself: a policy that visits every cell, and what its records tell.

A piece takes longer in a run than back to back: its lane has slept, its caches are cold, the engine's threads hand it
over and look after the one before. So cells for predicting a run are taken from a small run of the same engine on the
same lanes. At each number of rows the tour makes a step that ends one sample, decodes that alone, makes a plain step
and a step that ends another sample, then steps while this one is decoded beside them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from synerdiff.core import (
    CONDITIONAL,
    GUIDED,
    NOTHING,
    ChunkLaunch,
    Decision,
    Mode,
    Request,
    SampleId,
    View,
    WorkerInfo,
    WorkRecord,
)
from synerdiff.engine.samples import sorted_work
from synerdiff.profile.tables import Profile

if TYPE_CHECKING:
    from real_runner.engine import RealRun

STEPS_BESIDE = 16
"""Most steps beside one decode; a decode that lasts longer ends alone."""
STEPS_OF_A_VISIT = 3 + STEPS_BESIDE
GUIDANCE = 4.0

CorunKey = tuple[str, int, int]
"""(chunking, chunk, rows)"""


class CellTour:
    """A policy that visits each of ``rows`` in turn, ``rounds`` times, with ``requests`` of its own.

    ``over`` is set when every cell has been visited, to stop the run: samples are left then.
    """

    NAME = "cell tour"

    def __init__(self, chunking: str, rows: Sequence[int], rounds: int) -> None:
        self.chunking, self.rows, self.rounds = chunking, tuple(rows), rounds
        self.over = threading.Event()
        pairs = max(self.rows) // 2
        length = STEPS_OF_A_VISIT * rounds * len(self.rows)
        walkers = [(length, GUIDANCE)] * pairs + [(length, 1.0)]
        enders = [(1, GUIDANCE if r > 1 else 1.0) for _ in range(rounds) for r in self.rows for _ in range(2)]
        self.requests = [
            Request(index, 0, steps, guidance_scale=guidance)
            for index, (steps, guidance) in enumerate([*walkers, *enders])
        ]
        self._guided, self._unguided, self._first_ender = range(pairs), pairs, len(walkers)

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self._chunks = profile.chunk_count(self.chunking)
        self._ids: dict[int, SampleId] = {}
        self._ender = self._first_ender
        self._moves: Iterator[Decision] | None = None

    def decide(self, view: View) -> Decision:
        if not view.closed or not view.denoise_free:
            return NOTHING
        if self._moves is None:
            self._ids = {sample.request.request_id: sample.id for sample in view.waiting}
            self._moves = self._visit_all(view)
            return next(self._moves)._replace(admit=tuple(self._ids.values()))
        decision = next(self._moves, None)
        if decision is None:
            self.over.set()
        return decision or NOTHING

    def _visit_all(self, view: View) -> Iterator[Decision]:
        lane = view.decode_lanes[0]
        for _ in range(self.rounds):
            for rows in self.rows:
                alone = self._ids[self._ender]
                yield Decision(step=self._step(rows, ends_one=True))
                yield Decision(chunks=(ChunkLaunch(alone, self._chunks, exclusive=True),))
                yield Decision(step=self._step(rows))
                beside = self._ids[self._ender]
                yield Decision(step=self._step(rows, ends_one=True))
                launch: tuple[ChunkLaunch, ...] = (ChunkLaunch(beside, self._chunks),)
                for _ in range(STEPS_BESIDE):
                    yield Decision(step=self._step(rows), chunks=launch)
                    launch = ()
                    if lane.free:
                        break
                while not lane.free:
                    yield NOTHING

    def _step(self, rows: int, ends_one: bool = False) -> tuple[tuple[SampleId, Mode], ...]:
        members = [(self._ids[index], GUIDED) for index in self._guided[: rows // 2]]
        if rows % 2:
            members.append((self._ids[self._unguided], CONDITIONAL))
        if ends_one:
            members[0] = (self._ids[self._ender], GUIDED if rows > 1 else CONDITIONAL)
            self._ender += 1
        return tuple(members)


class Beside(NamedTuple):
    """Pieces that ran beside the other lane: for how long both worked, and how much solo work was done meanwhile."""

    overlap_ns: int
    progress_ns: float
    pieces: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What the records of one or several tours tell; samples in ns.

    The hand-over is a part of ``steps`` and ``chunks``, as it is in the simulator's pieces, which slow down as a whole.
    """

    steps: Mapping[int, Sequence[int]]
    chunks: Mapping[str, Sequence[Sequence[int]]]
    overheads: Mapping[str, Sequence[int]]
    beside: Mapping[CorunKey, tuple[Beside, Beside]]
    """Of steps and of chunks. A step knows only that a decode ran beside it, so all chunks of a chunking share its."""


def handed_over(run: RealRun) -> list[WorkRecord]:
    """A run's work as the simulator records it: each piece begins when what made it possible happened.

    A lane's own record begins when the lane does; the simulator counts the hand-over as a part of the piece.
    """
    work: list[WorkRecord] = []
    for kind, waits_ns in (("step", run.dispatch.step_ns), ("chunk", run.dispatch.chunk_ns)):
        # Both are kept in the order of the ends.
        pieces = sorted((record for record in run.result.work if record.kind == kind), key=lambda r: r.end_ns)
        work += [
            record._replace(start_ns=record.start_ns - wait_ns)
            for record, wait_ns in zip(pieces, waits_ns, strict=True)
        ]
    return sorted_work(work)


def cells_seen(chunking: str, run: RealRun) -> Seen:
    """Durations of pieces that ran alone, and what a decode beside steps cost both of them.

    A piece of solo time T that took D, of which the other lane worked for O, made T - (D - O) of its own progress in
    O; its slowdown is O over that. Both are summed over all pieces before they are divided.
    """
    work = handed_over(run)
    alone, solo = _alone(work)
    steps = [record for record in work if record.kind == "step"]
    decodes = [record for record in work if record.kind == "chunk"]
    with_decode = {id(step): _overlap_ns(step, decodes) for step in steps}
    beside = {}
    for rows, times in alone.items():
        same = [step for step in steps if step.rows == rows]
        of_steps = [(step, with_decode[id(step)]) for step in same if with_decode[id(step)]]
        both = _beside(of_steps, sum(times) / len(times))
        for index, chunk_times in enumerate(solo):
            of_chunks = [(c, _overlap_ns(c, same)) for c in decodes if c.chunk == index and not c.exclusive]
            found = _beside([pair for pair in of_chunks if pair[1]], sum(chunk_times) / len(chunk_times))
            beside[chunking, index, rows] = (both, found)
    overheads = {
        "step_dispatch": run.dispatch.step_ns,
        "chunk_dispatch": run.dispatch.chunk_ns,
        "text_encode": run.dispatch.prepare_ns,
        "result_copy": run.dispatch.copy_ns,
    }
    return Seen(alone, {chunking: solo}, overheads, beside)


def _alone(work: Sequence[WorkRecord]) -> tuple[dict[int, list[int]], list[list[int]]]:
    """Durations of steps without a decode beside them, by rows, and of exclusive chunks, by number."""
    decodes = [record for record in work if record.kind == "chunk"]
    steps: dict[int, list[int]] = {}
    chunks: list[list[int]] = [[] for _ in range(1 + max(chunk.chunk for chunk in decodes))]
    for record in work:
        duration_ns = record.end_ns - record.start_ns
        if record.kind == "chunk":
            if record.exclusive:
                chunks[record.chunk].append(duration_ns)
        elif not _overlap_ns(record, decodes):
            steps.setdefault(record.rows, []).append(duration_ns)
    return steps, chunks


def joined(parts: Sequence[Seen]) -> Seen:
    """The samples of tours with different chunkings together."""
    steps: dict[int, list[int]] = {}
    overheads: dict[str, list[int]] = {}
    for part in parts:
        for rows, times in part.steps.items():
            steps.setdefault(rows, []).extend(times)
        for name, times in part.overheads.items():
            overheads.setdefault(name, []).extend(times)
    return Seen(
        steps,
        {name: columns for part in parts for name, columns in part.chunks.items()},
        overheads,
        {key: both for part in parts for key, both in part.beside.items()},
    )


def _overlap_ns(piece: WorkRecord, others: Sequence[WorkRecord]) -> int:
    shared = (min(piece.end_ns, other.end_ns) - max(piece.start_ns, other.start_ns) for other in others)
    return sum(ns for ns in shared if ns > 0)


def _beside(pieces: Sequence[tuple[WorkRecord, int]], solo_ns: float) -> Beside:
    overlap_ns = sum(overlap for _, overlap in pieces)
    outside_ns = sum(piece.end_ns - piece.start_ns - overlap for piece, overlap in pieces)
    return Beside(overlap_ns, solo_ns * len(pieces) - outside_ns, len(pieces))
