"""A step as a set of segments with dependencies: what runs on a GPU, what is waited for, and what follows what.

A plain step is one segment. With adapters or guidance on two GPUs it is several, on one GPU or on many: merges before
it, its encoder and decoder around a ControlNet's residuals, its halves and what brings them together.
"""

from __future__ import annotations

from collections.abc import Callable

from simulator.pieces import Piece

NEVER = 1 << 62
"""Later than anything: the end of what has not been timed yet."""


class Segment:
    """One piece of a step.

    With ``work_ns`` it runs on ``gpu`` as a step of ``rows`` rows does: decode chunks beside it slow it down (not when
    rows is 0). With ``begin`` it ends when that says so, given the instant at which it starts: a transfer, a call, a
    wait. It starts when all that it comes after have ended.
    """

    __slots__ = ("after", "begin", "end_ns", "gpu", "kind", "piece", "rows", "start_ns", "waits", "work_ns")

    def __init__(
        self,
        kind: str,
        *,
        gpu: int = -1,
        rows: int = 0,
        work_ns: int = 0,
        begin: Callable[[int], int] | None = None,
    ) -> None:
        self.kind = kind
        self.gpu = gpu
        self.rows = rows
        self.work_ns = work_ns
        self.begin = begin
        self.waits = 0
        self.after: list[Segment] = []
        self.piece: Piece | None = None
        self.start_ns = -1
        self.end_ns = NEVER

    def start(self, now_ns: int) -> None:
        self.start_ns = now_ns
        if self.begin is not None:
            self.end_ns = self.begin(now_ns)
        else:
            self.piece = Piece(self.work_ns, now_ns)

    def retime(self, ppm: int, now_ns: int) -> None:
        piece = self.piece
        if piece is not None and piece.ppm != ppm:
            piece.retime(ppm, now_ns)
            self.end_ns = piece.end_ns


class Plan:
    """The segments of one step, and which of them run."""

    __slots__ = ("left", "running", "segments")

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.running: list[Segment] = []
        self.left = 0
        """Segments that have not ended."""

    def add(self, segment: Segment, *before: Segment | None) -> Segment:
        """Add a segment that starts when those before it (None: nothing) have ended."""
        self.segments.append(segment)
        self.left += 1
        for other in before:
            if other is not None:
                other.after.append(segment)
                segment.waits += 1
        return segment

    def start(self, now_ns: int) -> None:
        for segment in self.segments:
            if segment.waits == 0:
                segment.start(now_ns)
                self.running.append(segment)

    def advance(self, now_ns: int) -> list[Segment]:
        """End what ends now and start what that frees, in the order in which segments were added; those that ended."""
        ended: list[Segment] = []
        position = 0
        while position < len(self.running):
            segment = self.running[position]
            if segment.end_ns > now_ns:
                position += 1
                continue
            del self.running[position]
            self.left -= 1
            ended.append(segment)
            for follower in segment.after:
                follower.waits -= 1
                if follower.waits == 0:
                    follower.start(now_ns)
                    self.running.append(follower)
            position = 0
        return ended

    def next_ns(self) -> int:
        due_ns = NEVER
        for segment in self.running:
            if segment.end_ns < due_ns:
                due_ns = segment.end_ns
        return due_ns
