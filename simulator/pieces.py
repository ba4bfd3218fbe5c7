"""Pieces of work under changing contention, and their measured times.

Integer arithmetic of the contract: a piece of solo work w at slowdown p (ppm) takes ceil(w * p / 10^6); progress over
an interval dt is floor(dt * 10^6 / p).
"""

from __future__ import annotations

import math
import random

from synerdiff.core import PPM
from synerdiff.profile.tables import Profile, Spread


class Piece:
    """Work that runs on one lane: what is left of it, at which slowdown, and when it will end."""

    __slots__ = ("end_ns", "left_ns", "ppm", "since_ns", "start_ns")

    def __init__(self, work_ns: int, now_ns: int) -> None:
        self.left_ns = work_ns
        self.start_ns = self.since_ns = now_ns
        self.ppm = 0
        self.end_ns = -1
        """-1 until the piece is first timed."""

    def retime(self, ppm: int, now_ns: int) -> None:
        """Go on at another slowdown from now."""
        if self.ppm:
            self.left_ns -= (now_ns - self.since_ns) * PPM // self.ppm
        self.ppm = ppm
        self.since_ns = now_ns
        self.end_ns = now_ns - (-self.left_ns * ppm // PPM)


def drawn(spread: Spread, source: random.Random) -> int:
    """One time from the spread: two-sided lognormal around the median, so that its p10 and p90 are the spread's."""
    z = source.gauss(0.0, 1.0)
    ratio = spread.p90 / spread.median if z > 0 else spread.median / spread.p10
    return max(1, round(spread.median * math.exp(z * math.log(ratio) / 1.2815515655446004)))


class Times:
    """Solo work of steps and chunks, dispatch included; with a seed, drawn from the measured spread."""

    def __init__(self, profile: Profile, chunking: str, seed: int | None) -> None:
        self._profile = profile
        self._random = None if seed is None else random.Random(seed)
        self._step_dispatch_ns = profile.overhead_ns("step_dispatch")
        self._chunk_dispatch_ns = profile.overhead_ns("chunk_dispatch")
        self._chunk_spreads = profile.chunks[chunking]
        self._step_memo: dict[int, Spread] = {}

    def step_ns(self, rows: int) -> int:
        if self._random is None:
            return self._profile.step_ns(rows) + self._step_dispatch_ns
        spread = self._step_memo.get(rows)
        if spread is None:
            spread = self._step_memo[rows] = self._profile.step_spread(rows)
        return drawn(spread, self._random) + self._step_dispatch_ns

    def chunk_ns(self, chunk: int) -> int:
        spread = self._chunk_spreads[chunk]
        time_ns = spread.median if self._random is None else drawn(spread, self._random)
        return time_ns + self._chunk_dispatch_ns


class Draws:
    """Adapter times: their medians, or with a seed drawn from their spread as those of steps and chunks are."""

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else random.Random(seed)

    def draw(self, spread: Spread) -> int:
        if self._random is None or spread.p10 <= 0:
            return spread.median
        return drawn(spread, self._random)
