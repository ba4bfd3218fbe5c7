"""Lanes that keep exactly to a profile's times, so that the hardware engine can be tested to the nanosecond."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from policies.base import Policy
from real_runner import engine
from real_runner.engine import RealRun, run_real
from real_runner.hardware import Hardware
from real_runner.intake import Entry
from real_runner.pieces import Picture
from synerdiff.core import NO_SKIPS, Request, SkipBudget
from synerdiff.diffusion.decoder import Chunking
from synerdiff.engine.rounds import NEVER
from synerdiff.profile.tables import Profile

NO_PICTURE = Picture(cast(Any, None), finite=True)


class Clock:
    """Virtual time; a wait jumps to the earliest end."""

    torch_device = None

    def __init__(self) -> None:
        self.now_ns = 12_345

    def wait_any(self, works: Sequence[TimedWork], until_ns: int) -> None:
        ends = [work.end_ns for work in works] + [until_ns]
        self.now_ns = max(self.now_ns, min(ends))


class TimedWork:
    def __init__(self, clock: Clock, start_ns: int, end_ns: int, value: Any = None) -> None:
        self.clock, self.start_ns, self.end_ns, self.value = clock, start_ns, end_ns, value

    def done(self) -> bool:
        return self.clock.now_ns >= self.end_ns

    def result(self) -> Any:
        return self.value


class TimedLane:
    """First in, first out; each piece takes what ``duration_of`` says of it and of whether the lane is idle."""

    def __init__(self, clock: Clock, duration_of: Callable[[Any, bool], int] = lambda piece, idle: 0) -> None:
        self.clock, self.duration_of, self.free_at_ns = clock, duration_of, 0

    def submit(self, function: Any) -> TimedWork:
        idle = self.clock.now_ns >= self.free_at_ns
        start_ns = max(self.clock.now_ns, self.free_at_ns)
        piece = getattr(function, "__self__", None)
        self.free_at_ns = start_ns + self.duration_of(piece, idle)
        return TimedWork(self.clock, start_ns, self.free_at_ns, NO_PICTURE)


class TimedIntake:
    """Every request enters exactly when it arrives, in a closed loop when a place is free."""

    def __init__(
        self,
        lane: TimedLane,
        model_at: Any,
        requests: Sequence[Request],
        zero_ns: int,
        stop: Any,
        controls_of: Any,
        most: int | None,
    ) -> None:
        self.clock, self.zero_ns, self.left = lane.clock, zero_ns, list(requests)
        self.places_ns = [0] * (len(requests) if most is None else most)
        """When each place that is not taken was free."""

    def free(self, at_ns: int) -> None:
        self.places_ns.append(at_ns)

    @property
    def head(self) -> TimedWork | None:
        if not self.left:
            return None
        due_ns = NEVER
        if self.places_ns:
            due_ns = self.zero_ns + max(self.left[0].arrival_ns, min(self.places_ns))
        return TimedWork(self.clock, due_ns, due_ns)

    def ready(self) -> list[Entry]:
        entries = []
        while (head := self.head) is not None and head.done():
            request = self.left.pop(0)
            self.places_ns.remove(min(self.places_ns))
            states: list[Any] = [SimpleNamespace(latent=0) for _ in range(request.images)]
            entries.append(Entry(head.start_ns - self.zero_ns, 0, 0, head.start_ns, states, ""))
        return entries


class TimedModel:
    """What the engine asks a model, at every resolution."""

    device = None

    def denoiser_calls(self, steps: int) -> int:
        return steps


def rehearse(
    requests: Sequence[Request],
    policy: Policy,
    profile: Profile,
    decode_lanes: int = 1,
    budget: SkipBudget = NO_SKIPS,
    stop: threading.Event | None = None,
    max_concurrency: int | None = None,
) -> RealRun:
    """run_real on timed lanes."""
    clock = Clock()

    def evenly_cut(profile: Profile, name: str) -> Chunking:
        return Chunking(name, tuple(range(1, profile.chunk_count(name))))

    def step_ns(piece: Any, idle: bool) -> int:
        rows = sum(2 if mode == "guided" else 1 for mode in piece.modes) + piece.pad_rows
        return profile.step_ns(rows) + (profile.launch_ns(rows) if idle else 0)

    def chunk_ns(piece: Any, idle: bool) -> int:
        piece.image.hidden = 0
        return profile.chunk_ns(policy.chunking, piece.image.sample.chunks_done)

    model = TimedModel()
    hardware = SimpleNamespace(
        device=clock,
        model=model,
        at=lambda request: model,
        denoise=TimedLane(clock, step_ns),
        decode=[TimedLane(clock, chunk_ns) for _ in range(decode_lanes)],
        intake=TimedLane(clock),
        results=TimedLane(clock, lambda piece, idle: profile.overhead_ns("result_copy")),
        warm_up=lambda rows, cut, model: None,
        chunk_functions=lambda lane, cut, model: [None] * len(cut),
        hung=False,
    )
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(time, "monotonic_ns", lambda: clock.now_ns)
        patched.setattr(engine, "Intake", TimedIntake)
        patched.setattr(engine, "chunking_of", evenly_cut)
        patched.setattr(engine, "require_served", lambda requests, hardware, serving: None)
        machine = cast(Hardware, hardware)
        return run_real(requests, policy, profile, machine, stop=stop, budget=budget, max_concurrency=max_concurrency)
