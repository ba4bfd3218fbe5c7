"""Pieces of work under changing contention, their measured times, and the plain stepper: a step that is one piece.

Integer arithmetic of the contract: a piece of solo work w at slowdown p (ppm) takes ceil(w * p / 10^6); progress over
an interval dt is floor(dt * 10^6 / p).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Protocol

from synerdiff.core import PPM, InputError, Request
from synerdiff.engine.rounds import NEVER
from synerdiff.engine.worker import Step
from synerdiff.profile.tables import Profile, Spread


class Piece:
    """Work that runs on one lane: what is left of it, at which slowdown, and when it will end."""

    __slots__ = ("end_ns", "left_ns", "ppm", "since_ns", "start_ns")

    def __init__(self, work_ns: int, now_ns: int) -> None:
        self.left_ns = work_ns
        self.start_ns = self.since_ns = now_ns
        self.ppm = 0
        self.end_ns = NEVER

    def retime(self, ppm: int, now_ns: int) -> None:
        """Go on at another slowdown from now."""
        if self.ppm:
            self.left_ns -= (now_ns - self.since_ns) * PPM // self.ppm
        self.ppm = ppm
        self.since_ns = now_ns
        self.end_ns = now_ns - (-self.left_ns * ppm // PPM)


class Stepper(Protocol):
    """The running step of one worker. After `start` and `advance` comes `retime`, at the same instant."""

    due_ns: int
    """When something of it happens next; NEVER while no step runs."""
    rows_on: dict[int, int]
    """GPU -> rows of what computes there now; GPUs without a step's rows may be missing or have 0."""

    def start(self, step: Step, now_ns: int) -> None:
        """The worker's step starts."""

    def advance(self, now_ns: int) -> int:
        """Take what is due now; once the whole step has ended, the instant at which its forward began, else -1."""

    def early_ns(self, lead_ns: int) -> int:
        """``lead_ns`` before the step's end, but not before it was last timed; NEVER while its end is unknown."""

    def retime(self, slower: Mapping[int, int], now_ns: int) -> None:
        """Look up slowdowns anew; ``slower``: GPU -> ppm that the chunks there add to a step's own 1."""


class PlainStepper:
    """A step is one piece on the worker's GPU. (Its fields are those of a `Piece`: one object serves all steps.)"""

    __slots__ = (
        "_gpu",
        "_left_ns",
        "_ppm",
        "_profile",
        "_rows",
        "_since_ns",
        "_solo_ns",
        "_start_ns",
        "_times",
        "due_ns",
        "rows_on",
    )

    def __init__(self, times: Times, profile: Profile, gpu: int) -> None:
        self._times, self._profile, self._gpu = times, profile, gpu
        self._left_ns = self._ppm = self._rows = self._since_ns = self._start_ns = 0
        self._solo_ns: dict[int, int] = {}
        """Rows -> solo work of a step, where it is not drawn."""
        self.due_ns = NEVER
        self.rows_on: dict[int, int] = {gpu: 0}

    def start(self, step: Step, now_ns: int) -> None:
        rows = self._rows = self.rows_on[self._gpu] = step.rows
        profile = self._profile
        if self._times.others:
            request = step.samples[0].request
            profile = profile.at(request.size)
            work_ns: int | None = self._times.of(request).step_ns(rows)
        else:
            work_ns = self._solo_ns.get(rows)
        if work_ns is None:
            work_ns = self._times.step_ns(rows)
            if not self._times.drawn:
                self._solo_ns[rows] = work_ns
        if profile.step_launch and not step.committed:
            work_ns += profile.launch_ns(rows)
        self._left_ns = work_ns
        self._start_ns = self._since_ns = now_ns
        self._ppm = 0
        self.due_ns = NEVER

    def advance(self, now_ns: int) -> int:
        self._rows = self.rows_on[self._gpu] = 0
        self.due_ns = NEVER
        return self._start_ns

    def early_ns(self, lead_ns: int) -> int:
        return max(self._since_ns, self.due_ns - lead_ns)

    def retime(self, slower: Mapping[int, int], now_ns: int) -> None:
        ppm = PPM + slower.get(self._gpu, 0) if slower else PPM
        if ppm == self._ppm or not self._rows:
            return
        if ppm <= 0:
            raise without_limit(ppm, self._profile, self._rows)
        if self._ppm:
            self._left_ns -= (now_ns - self._since_ns) * PPM // self._ppm
        self._ppm = ppm
        self._since_ns = now_ns
        self.due_ns = now_ns - (-self._left_ns * ppm // PPM)


def without_limit(step_ppm: int, profile: Profile, rows: int) -> InputError:
    """The error that the chunks beside a step add up to a speed-up without limit."""
    return InputError(
        f"profile '{profile.name}': the chunks beside a step of {rows} rows speed it up without limit "
        f"(sum of slowdowns {step_ppm} ppm)."
    )


def drawn(spread: Spread, source: random.Random) -> int:
    """One time from the spread: two-sided lognormal around the median, so that its p10 and p90 are the spread's."""
    z = source.gauss(0.0, 1.0)
    ratio = spread.p90 / spread.median if z > 0 else spread.median / spread.p10
    return max(1, round(spread.median * math.exp(z * math.log(ratio) / 1.2815515655446004)))


class Times:
    """Solo work of steps and chunks, dispatch included; with a seed, drawn from the measured spread."""

    def __init__(self, profile: Profile, chunking: str, seed: int | None, source: random.Random | None = None) -> None:
        self._profile = profile
        self._random = source or (None if seed is None else random.Random(seed))
        self.others = {size: Times(one, chunking, seed, self._random) for size, one in profile.others.items()}
        """Those of further resolutions."""
        self.drawn = seed is not None
        """Two steps of the same rows may take different times."""
        self._step_dispatch_ns = profile.overhead_ns("step_dispatch")
        self._chunk_dispatch_ns = profile.overhead_ns("chunk_dispatch")
        self._chunk_spreads = profile.chunks[chunking]
        self._step_memo: dict[int, Spread] = {}

    def step_ns(self, rows: int) -> int:
        if self._random is None:
            return self._profile.step_ns(rows) + self._step_dispatch_ns
        return self._profile.sped(self.forward_ns(rows)) + self._step_dispatch_ns

    def forward_ns(self, rows: int) -> int:
        """A step without its dispatch, at speed 1."""
        spread = self.step_spread(rows)
        return spread.median if self._random is None else drawn(spread, self._random)

    def step_spread(self, rows: int) -> Spread:
        """The profile's, looked up once."""
        spread = self._step_memo.get(rows)
        if spread is None:
            spread = self._step_memo[rows] = self._profile.step_spread(rows)
        return spread

    def of(self, request: Request) -> Times:
        """Those of the request's resolution."""
        size = request.size
        return self if size is None else self.others.get(size, self)

    def chunk_ns(self, chunk: int) -> int:
        spread = self._chunk_spreads[chunk]
        time_ns = spread.median if self._random is None else drawn(spread, self._random)
        return self._profile.sped(time_ns) + self._chunk_dispatch_ns


class Draws:
    """Adapter times: their medians, or with a seed drawn from their spread as those of steps and chunks are."""

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else random.Random(seed)

    def draw(self, spread: Spread) -> int:
        """A time (ns) of that spread."""
        if self._random is None or spread.p10 <= 0:
            return spread.median
        return drawn(spread, self._random)
