"""A profile's cells measured by the runner itself, on the lanes on which runs follow: machines drift between sittings.

A piece takes longer in a run than back to back: its lane has slept, its caches are cold, the engine's threads hand it
over and look after the one before. So cells for predicting a run are taken from a small run of the same engine on the
same lanes. At each number of rows a policy makes a step that ends one sample, decodes that alone, makes a plain step
and a step that ends another sample, then steps while this one is decoded beside them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from profiler.sampling import spread_of
from real_runner.engine import RealRun, run_real
from real_runner.hardware import Hardware
from synerdiff.core import (
    CONDITIONAL,
    GUIDED,
    NOTHING,
    PPM,
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
from synerdiff.profile.tables import Corun, Profile, Spread

ROUNDS = 1
"""Visits of every cell in one pass."""
MOST_SLOWDOWN = 10
"""A piece that seems to stand still beside the other lane counts as slowed down so many times."""
STEPS_BESIDE = 16
"""Most steps beside one decode; a decode that lasts longer ends alone."""
STEPS_OF_A_VISIT = 3 + STEPS_BESIDE
GUIDANCE = 4.0

_Key = TypeVar("_Key", int, str)
CorunKey = tuple[str, int, int]
"""(chunking, chunk, rows)"""


class CellVisitor:
    """A policy that visits each of ``rows`` in turn, ``rounds`` times, with ``requests`` of its own.

    ``over`` is set when every cell has been visited, to stop the run: samples are left then.
    """

    NAME = "cell visitor"

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


class Overlap(NamedTuple):
    """Pieces that ran beside the other lane: for how long both worked, and how much solo work was done meanwhile."""

    overlap_ns: int
    progress_ns: float
    pieces: int


@dataclass(frozen=True, slots=True)
class CellTimes:
    """What the records of one or several passes tell; samples in ns.

    The hand-over is a part of ``steps`` and ``chunks``, as it is in the simulator's pieces, which slow down as a whole.
    """

    steps: Mapping[int, Sequence[int]]
    """Of steps that followed another without a gap, where any did; else of those that an idle lane was given."""
    launched: Mapping[int, Sequence[int]]
    """Of steps that an idle lane was given, where others followed without a gap."""
    chunks: Mapping[str, Sequence[Sequence[int]]]
    overheads: Mapping[str, Sequence[int]]
    beside: Mapping[CorunKey, tuple[Overlap, Overlap]]
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


def cell_times(chunking: str, run: RealRun) -> CellTimes:
    """Durations of pieces that ran alone, and what a decode beside steps cost both of them.

    A piece of solo time T that took D, of which the other lane worked for O, made T - (D - O) of its own progress in
    O; its slowdown is O over that. Both are summed over all pieces before they are divided.
    """
    work = handed_over(run)
    ended = sorted((record for record in run.result.work if record.kind == "step"), key=lambda record: record.end_ns)
    # When the steps ended that had been committed while another one ran.
    queued_ends = {record.end_ns for record, queued in zip(ended, run.dispatch.step_queued, strict=True) if queued}
    steps = [record for record in work if record.kind == "step"]
    decodes = [record for record in work if record.kind == "chunk"]
    with_decode = {id(step): _overlap_ns(step, decodes) for step in steps}
    alone: dict[int, list[WorkRecord]] = {}
    for step in steps:
        if not with_decode[id(step)]:
            alone.setdefault(step.rows, []).append(step)
    solo = [
        [c.end_ns - c.start_ns for c in decodes if c.exclusive and c.chunk == chunk]
        for chunk in range(1 + max(c.chunk for c in decodes))
    ]
    launched = {rows: [s.end_ns - s.start_ns for s in of if s.end_ns not in queued_ends] for rows, of in alone.items()}
    queued = {rows: [s.end_ns - s.start_ns for s in of if s.end_ns in queued_ends] for rows, of in alone.items()}
    step_times = {rows: queued[rows] or launched[rows] for rows in alone}
    beside = {}
    for rows, times in step_times.items():
        same = [step for step in steps if step.rows == rows]
        beside_decodes = [(step, with_decode[id(step)]) for step in same if with_decode[id(step)]]
        of_steps = _overlap(beside_decodes, sum(times) / len(times))
        for index, chunk_times in enumerate(solo):
            of_chunks = [(c, _overlap_ns(c, same)) for c in decodes if c.chunk == index and not c.exclusive]
            beside[chunking, index, rows] = (
                of_steps,
                _overlap([pair for pair in of_chunks if pair[1]], sum(chunk_times) / len(chunk_times)),
            )
    overheads = {
        "step_dispatch": run.dispatch.step_ns,
        "chunk_dispatch": run.dispatch.chunk_ns,
        "text_encode": run.dispatch.prepare_ns,
        "result_copy": run.dispatch.copy_ns,
    }
    launched = {rows: times for rows, times in launched.items() if times and queued[rows]}
    return CellTimes(step_times, launched, {chunking: solo}, overheads, beside)


def joined(parts: Sequence[CellTimes]) -> CellTimes:
    """The samples of passes with different chunkings together."""

    def together(tables: Iterable[Mapping[_Key, Sequence[int]]]) -> dict[_Key, list[int]]:
        found: defaultdict[_Key, list[int]] = defaultdict(list)
        for table in tables:
            for key, times in table.items():
                found[key] += times
        return dict(found)

    return CellTimes(
        together(part.steps for part in parts),
        together(part.launched for part in parts),
        {name: columns for part in parts for name, columns in part.chunks.items()},
        together(part.overheads for part in parts),
        {key: both for part in parts for key, both in part.beside.items()},
    )


def _overlap_ns(piece: WorkRecord, others: Sequence[WorkRecord]) -> int:
    shared = (min(piece.end_ns, other.end_ns) - max(piece.start_ns, other.start_ns) for other in others)
    return sum(ns for ns in shared if ns > 0)


def _overlap(pieces: Sequence[tuple[WorkRecord, int]], solo_ns: float) -> Overlap:
    overlap_ns = sum(overlap for _, overlap in pieces)
    outside_ns = sum(piece.end_ns - piece.start_ns - overlap for piece, overlap in pieces)
    return Overlap(overlap_ns, solo_ns * len(pieces) - outside_ns, len(pieces))


@dataclass(frozen=True, slots=True)
class Cells:
    """What a study's runs can meet: step rows and chunkings."""

    rows: tuple[int, ...]
    chunkings: tuple[str, ...]


def cells_for(profile: Profile, most_rows: int, chunkings: Sequence[str], even_only: bool = False) -> Cells:
    """The profile's row buckets up to that of ``most_rows``, and the chunkings that the policies use.

    ``even_only``: all samples are guided and none skips, so that only even numbers of rows occur.
    """
    most = min(most_rows, profile.max_rows)
    rows = {profile.bucket(r) for r in range(2, most + 1, 2)}
    if not even_only:
        rows = {r for r in profile.row_buckets or tuple(profile.steps) if r <= profile.bucket(most)}
    return Cells(tuple(sorted(rows)), tuple(dict.fromkeys(chunkings)))


def take_pass(hardware: Hardware, profile: Profile, cells: Cells) -> CellTimes:
    """Every cell once, in a small run for each chunking. Raises what ended one of them early."""
    parts = []
    for name in cells.chunkings:
        visitor = CellVisitor(name, cells.rows, ROUNDS)
        run = run_real(visitor.requests, visitor, profile, hardware, stop=visitor.over)
        if run.error is not None:
            raise run.error
        parts.append(cell_times(name, run))
    return joined(parts)


def refreshed(profile: Profile, times: Sequence[CellTimes], ratios: Sequence[CellTimes]) -> Profile:
    """The profile with these cells in place of its own; other cells stay.

    Times come from the passes ``times``; slowdowns, which are ratios and drift far less, from ``ratios``. Both are
    means: a run pays the mean of its pieces, and single pieces on a shared machine have a long tail, which medians
    leave out.
    """
    overheads = {name: _mean(one.overheads[name] for one in times) for name in times[0].overheads}
    # The simulator adds the hand-over to every piece; one within a decode is shorter than one to a lane that sleeps.
    step_ns, chunk_ns = (overheads[name].median for name in ("step_dispatch", "chunk_dispatch"))
    steps = {rows: _mean((one.steps[rows] for one in times), step_ns) for rows in times[0].steps}
    launches = {}
    for rows in times[0].launched:
        idle = _mean((one.launched.get(rows, ()) for one in times), step_ns)
        launches[rows] = idle.each(lambda value, queued_ns=steps[rows].median: max(0, value - queued_ns))  # type: ignore[misc]
    chunks = {
        name: tuple(_mean((one.chunks[name][i] for one in times), chunk_ns) for i in range(len(columns)))
        for name, columns in times[0].chunks.items()
    }
    corun = {key: dict(cells) for key, cells in profile.corun.items()}
    for chunking, chunk, rows in ratios[0].beside:
        both = [one.beside[chunking, chunk, rows] for one in ratios]
        cell = Corun(_slowdown([step for step, _ in both]), _slowdown([part for _, part in both]), False)
        corun.setdefault((chunking, chunk), {})[rows] = cell
    again = (
        f"means over pieces of runs: steps of {', '.join(map(str, steps))} rows, chunkings {', '.join(chunks)}, "
        "what ran beside each other of these, overheads; all else is as first measured"
    )
    return replace(
        profile,
        steps=dict(profile.steps) | steps,
        chunks=dict(profile.chunks) | chunks,
        corun=corun,
        overheads=dict(profile.overheads) | overheads,
        step_launch=launches,
        head=profile.head.model_copy(update={"notes": {**profile.head.notes, "measured_again": again}}),
        content_hash="",
    )


def _mean(parts: Iterable[Sequence[int]], less_ns: int = 0) -> Spread:
    """The mean, in the place where lookups look, with p10 and p90; ``less_ns`` is taken off every sample."""
    samples = [max(1, sample - less_ns) if less_ns else sample for part in parts for sample in part]
    return spread_of(samples).around(round(sum(samples) / len(samples)))


def _slowdown(parts: Sequence[Overlap]) -> Spread:
    """Overlap over progress (ppm), summed over all pieces; single pieces tell too little for a spread."""
    overlap_ns = sum(part.overlap_ns for part in parts)
    least_ns = overlap_ns / MOST_SLOWDOWN
    ppm = round(PPM * overlap_ns / max(least_ns, sum(part.progress_ns for part in parts))) if overlap_ns else PPM
    return Spread.exactly(ppm, sum(part.pieces for part in parts))
