"""Whose step comes next where samples of several batch keys are active (contract: several batch keys)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

from policies.base import Limits, Parameter, limits_at
from policies.step_batch import Order, StepBatch
from synerdiff.core import NS_PER_S, BatchKey, Phase, Sample, View, WorkerInfo
from synerdiff.profile.tables import Profile

OLDEST, DRR, SRTF = "oldest", "drr", "srtf"
TURN = Parameter(
    "turn",
    str,
    OLDEST,
    help="with several batch keys: that of the oldest sample, deficit round robin, or the shortest remaining time",
    choices=(OLDEST, DRR, SRTF),
)
TURN_MAX_WAIT = Parameter(
    "turn_max_wait_s", float, 10.0, 0.0, 1e6, "s", "srtf: a batch key without a step for so long goes first"
)
TURN_PARAMETERS = (TURN, TURN_MAX_WAIT)
RowsOf = Callable[[Sequence[Sample], int], int]
"""(members of a step, their rows with full guidance) -> the rows that it would take."""


class Candidate(NamedTuple):
    """The step that a batch key would take."""

    key: BatchKey
    members: list[Sample]
    admitted: list[Sample]
    rows: int
    time_ns: int
    """Solo, at the rows that it would take."""


def size_of(key: BatchKey) -> tuple[int, int] | None:
    """(height, width) in pixels of the key's requests."""
    return None if key[1] is None or key[2] is None else (key[1], key[2])


class TurnBatch(StepBatch):
    """The members of the coming step when batch keys take turns: ``drr`` or ``srtf``.

    Admission is by key, in the order of ``order`` (by default of entry, ties by sample id). To be told of everything at
    every decision (``hear``), before ``refresh``; and when the step is launched (``launched``).
    """

    __slots__ = (
        "_candidate", "_deficit_ns", "_entries", "_max_wait_ns", "_order", "_pending", "_profile", "_ring",
        "_rows_of", "_sample_rows", "_since_ns", "_turn", "_waiting", "drr",
    )  # fmt: skip

    def __init__(
        self,
        limit: int,
        limits: Limits,
        turn: str,
        max_wait_s: float,
        profile: Profile,
        worker: WorkerInfo,
        rows_of: RowsOf,
        order: Order | None = None,
    ) -> None:
        super().__init__(limit, limits)
        self.drr = turn == DRR
        self._max_wait_ns = round(max_wait_s * NS_PER_S)
        self._profile, self._sample_rows, self._rows_of, self._order = profile, worker.sample_rows, rows_of, order
        self._waiting: dict[BatchKey, list[tuple[tuple[int, ...], int, Sample]]] = {}
        """By key, in the order of admission."""
        self._entries: dict[BatchKey, tuple[int, int]] = {}
        """When the first of the samples of each key entered waiting, and its id."""
        self._ring: list[BatchKey] = []
        """Keys with waiting or active samples; with drr the first one has, or next gets, the turn."""
        self._since_ns: dict[BatchKey, int] = {}
        """Since when each of them is without a step."""
        self._deficit_ns: dict[BatchKey, int] = {}
        self._turn: BatchKey | None = None
        """The key that has the turn."""
        self._pending: tuple[list[BatchKey], dict[BatchKey, int]] = ([], {})
        """Ring and deficits once the chosen step is launched."""
        self._candidate: Candidate | None = None

    # --- who is there -------------------------------------------------------------------------------------------

    def hear(self, view: View) -> None:
        """Take in what has happened since the last decision."""
        for sample in view.arrived:
            place = () if self._order is None else self._order(sample, view.now_ns)
            insort(self._waiting.setdefault(sample.batch_key, []), (place, sample.id, sample))
        for key in {sample.batch_key for sample in view.step_done}:
            self._since_ns[key] = view.now_ns
        entries: dict[BatchKey, tuple[int, int]] = {}
        for key, waiting in list(self._waiting.items()):
            if view.gone:
                waiting[:] = [entry for entry in waiting if entry[2].phase is Phase.WAITING]
            if waiting:
                # Without an order of its own the first is the oldest.
                oldest = waiting if self._order is not None else waiting[:1]
                entries[key] = min((sample.entered_ns, sample.id) for _, _, sample in oldest)
            else:
                del self._waiting[key]
        for sample in view.active:
            key, entry = sample.batch_key, (sample.entered_ns, sample.id)
            entries[key] = min(entry, entries.get(key, entry))
        self._entries = entries
        for key in [key for key in self._ring if key not in entries]:
            self._ring.remove(key)
            del self._deficit_ns[key]
            self._turn = None if self._turn == key else self._turn
        for key in [key for key in self._since_ns if key not in entries]:
            del self._since_ns[key]
        for key in sorted((key for key in entries if key not in self._deficit_ns), key=lambda key: entries[key]):
            self._ring.append(key)
            self._deficit_ns[key] = 0
            self._since_ns[key] = entries[key][0]

    # --- whose turn it is ---------------------------------------------------------------------------------------

    def refresh(self, view: View) -> None:
        """Choose the key of the coming step, and its members."""
        chosen = self._candidate = (
            (self._by_deficit(view) if self.drr else self._shortest(view)) if self._ring else None
        )
        if chosen is None:
            self._keep([], (), 0, -1)
        else:
            self._keep(chosen.members, tuple([sample.id for sample in chosen.admitted]), chosen.rows, -1)

    def launched(self) -> None:
        """The chosen step is launched in this decision."""
        chosen = self._candidate
        assert chosen is not None
        if chosen.admitted:
            del self._waiting[chosen.key][: len(chosen.admitted)]
        if self.drr:
            self._ring, self._deficit_ns = self._pending
            self._turn = chosen.key

    def _by_deficit(self, view: View) -> Candidate:
        ring, deficit_ns, turn = list(self._ring), dict(self._deficit_ns), self._turn
        visit_ns = max(self._full_ns(key, view) for key in ring)
        if turn is None:
            turn = ring[0]
            deficit_ns[turn] += visit_ns
        while (candidate := self._step_of(turn, view)).time_ns > deficit_ns[turn]:
            ring.append(ring.pop(0))
            turn = ring[0]
            deficit_ns[turn] += visit_ns
        deficit_ns[turn] -= candidate.time_ns
        self._pending = (ring, deficit_ns)
        return candidate

    def _shortest(self, view: View) -> Candidate:
        overdue = [key for key in self._ring if view.now_ns - self._since_ns[key] >= self._max_wait_ns]
        if overdue:
            first = min(overdue, key=lambda key: (self._since_ns[key], self._entries[key]))
            return self._step_of(first, view)
        candidates = [self._step_of(key, view) for key in self._ring]

        def remaining(one: Candidate) -> tuple[int, tuple[int, int]]:
            steps = min([sample.steps_left for sample in one.members], default=0)
            return steps * one.time_ns, self._entries[one.key]

        return min(candidates, key=remaining)

    def _step_of(self, key: BatchKey, view: View) -> Candidate:
        members = [sample for sample in view.active if sample.batch_key == key]
        waiting = self._waiting.get(key, [])
        batch, max_rows = limits_at(members[0] if members else waiting[0][2], self.limit, view.max_rows, self.limits)
        rows = sum([sample.full_rows for sample in members])
        admitted: list[Sample] = []
        while rows > max_rows:  # they were lowered
            rows -= members.pop().full_rows
        for _, _, sample in waiting[: max(0, batch - len(members))]:
            if rows + sample.full_rows > max_rows:
                break
            rows += sample.full_rows
            admitted.append(sample)
        members += admitted
        return Candidate(key, members, admitted, rows, self._at(key).step_ns(self._rows_of(members, rows)))

    def _full_ns(self, key: BatchKey, view: View) -> int:
        """Solo time of the key's step at full batch and guidance."""
        profile = self._at(key)
        size = size_of(key)
        batch, rows = self.limits.get(size, (self.limit, view.max_rows)) if size else (self.limit, view.max_rows)
        return profile.step_ns(min(batch * self._sample_rows, rows, view.max_rows))

    def _at(self, key: BatchKey) -> Profile:
        return self._profile.at(size_of(key))
