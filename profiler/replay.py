"""Pieces of work replayed on lanes, alone and together. The same code for a CPU and a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple, Protocol

from synerdiff.device.lanes import Lane, Work

LEAD_NS = 30_000_000
TOP_UP_S = 0.008
LARGEST_GAP_NS = 500_000


class Piece(Protocol):
    """Something that a lane can run again and again."""

    def again(self) -> Callable[[], object]:
        """What to submit for one more run; called by the submitting thread."""


class Side(NamedTuple):
    """One lane and what it replays."""

    lane: Lane
    piece: Piece

    def submit(self) -> Work[object]:
        return self.lane.submit(self.piece.again())


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
    for work in works:
        work.result()
    return [work.end_ns - work.start_ns for work in works]


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


def active_times(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces of one lane, in order, joined where the gap between them is at most LARGEST_GAP_NS."""
    joined = [spans[0]]
    for start, end in spans[1:]:
        if start - joined[-1][1] <= LARGEST_GAP_NS:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
