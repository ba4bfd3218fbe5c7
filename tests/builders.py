"""Small profiles and requests for tests, in readable units, and a policy that plays a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from synerdiff.core import Decision, Request, View, WorkerInfo
from synerdiff.profile.tables import Corun, Profile, Spread

MS = 1_000_000


def exact(value: int) -> Spread:
    return Spread(value, value, value, 1)


def make_profile(
    steps_ns: dict[int, int],
    chunks_ns: dict[str, list[int]],
    slowdowns: dict[int, tuple[int, int]] | None = None,
    *,
    overheads: dict[str, int] | None = None,
    launches: dict[int, int] | None = None,
    eager: bool = False,
) -> Profile:
    """``slowdowns``: rows -> (step ppm, chunk ppm), the same for every chunk; none given means no contention.
    ``launches``: rows -> what a step takes longer on an idle lane."""
    cells = slowdowns or {min(steps_ns): (1_000_000, 1_000_000), max(steps_ns): (1_000_000, 1_000_000)}
    corun = {
        (chunking, chunk): {rows: Corun(exact(u), exact(v), False) for rows, (u, v) in cells.items()}
        for chunking, times in chunks_ns.items()
        for chunk in range(len(times))
    }
    return Profile(
        name="test",
        provenance="measured",
        row_buckets=None if eager else tuple(sorted(steps_ns)),
        steps={rows: exact(time_ns) for rows, time_ns in sorted(steps_ns.items())},
        chunks={chunking: tuple(exact(time_ns) for time_ns in times) for chunking, times in chunks_ns.items()},
        corun=corun,
        overheads={name: exact(value) for name, value in (overheads or {}).items()},
        step_launch={rows: exact(value) for rows, value in (launches or {}).items()},
    )


def affine_profile(base_ms: float = 10, per_row_ms: float = 2, decode_ms: float = 30, **more: Any) -> Profile:
    """T(R) = base + per_row * R for 1..32 rows, a whole decode and its quarters."""
    rows = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    steps = {r: round((base_ms + per_row_ms * r) * MS) for r in rows}
    quarter = round(decode_ms * MS / 4)
    return make_profile(steps, {"whole": [4 * quarter], "c4": [quarter] * 4}, **more)


def requests_at(*arrivals_ms: float, steps: int = 2, **fields: Any) -> list[Request]:
    return [Request(i, round(ms * MS), steps, **fields) for i, ms in enumerate(arrivals_ms)]


class Script:
    """Plays decisions in order; each may be a function of the view. Remembers when and why it was asked."""

    NAME = "script"

    def __init__(self, *decisions: Decision | Callable[[View], Decision], chunking: str = "whole") -> None:
        self.decisions, self.chunking = list(decisions), chunking
        self.asked: list[int] = []

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        pass

    def decide(self, view: View) -> Decision:
        self.asked.append(view.now_ns)
        decision = self.decisions.pop(0) if self.decisions else Decision()
        return decision(view) if callable(decision) else decision
