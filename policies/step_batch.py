"""Who takes the coming step under continuous batching, first in first out or by an order, and in which modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush, heapreplace

from policies.base import NO_LIMITS, Limits, fifo_admissions, full_step, limits_at
from synerdiff.core import Mode, Phase, Sample, SampleId, View

StepModes = tuple[tuple[SampleId, Mode], ...]
Order = Callable[[Sample, int], tuple[int, ...]]
"""(sample, now in ns) -> its place in the order, least first. As time passes a sample may move back, never forward."""


class StepBatch:
    """The members of the coming step: active samples first, then newly admitted ones.

    Admission is first in first out, without overtaking across batch keys, up to ``limit`` samples and the rows there
    are. The last answer is kept while nobody joins or leaves, which is most steps. Samples become active only by this
    batch's own admissions, so an unchanged count means unchanged members.
    """

    __slots__ = ("_count", "admit", "limit", "limits", "members", "rows", "step", "steps_sum", "version")

    def __init__(self, limit: int, limits: Limits = NO_LIMITS) -> None:
        self.limit, self.limits = limit, limits
        self.members: list[Sample] = []
        self.admit: tuple[SampleId, ...] = ()
        """To be admitted in the decision that launches this step, and in no other."""
        self.rows = 0
        """Rows with full guidance."""
        self.step: StepModes = ()
        """The step with full guidance."""
        self.steps_sum = 0
        """Steps that the members take in all, from their first to their last."""
        self.version = 0
        """Counts the changes, so that others can keep what they derive from the members."""
        self._count = -1

    def refresh(self, view: View) -> None:
        """Bring everything up to date with the view."""
        count = len(view.active)
        if count == self._count and self.rows <= view.max_rows and (count >= self.limit or not view.waiting):
            self.admit = ()
            return
        members = list(view.active)
        rows = sum([sample.full_rows for sample in members])
        if rows > view.max_rows:
            # The rows were lowered: step as far as the first members fit, and admit nobody.
            while rows > view.max_rows:
                rows -= members.pop().full_rows
            self._keep(members, (), rows, -1)
            return
        admitted = self._admissions(view, count, rows)
        members += admitted
        rows += sum([sample.full_rows for sample in admitted])
        self._keep(members, tuple([sample.id for sample in admitted]), rows, len(members))

    def _admissions(self, view: View, active: int, rows: int) -> list[Sample]:
        return fifo_admissions(view, active, rows, self.limit, self.limits)

    def _keep(self, members: list[Sample], admit: tuple[SampleId, ...], rows: int, count: int) -> None:
        self.members, self.admit, self.rows, self._count = members, admit, rows, count
        self.version += 1
        self.step = full_step(members)
        self.steps_sum = sum([sample.steps for sample in members])


class OrderedBatch(StepBatch):
    """Admits the first by ``order``, ties by sample id, without overtaking across batch keys.

    To be told at every decision who has arrived (``arrive``), before ``refresh``.
    """

    __slots__ = ("_heap", "_offered", "order")

    def __init__(self, limit: int, order: Order, limits: Limits = NO_LIMITS) -> None:
        super().__init__(limit, limits)
        self.order = order
        self._heap: list[tuple[tuple[int, ...], int, Sample]] = []
        self._offered: list[Sample] = []
        """Taken for the coming step; they wait again when that step is not launched."""

    def arrive(self, view: View) -> None:
        """Take in the samples that have entered since the last decision."""
        for sample in view.arrived:
            self._push(sample, view.now_ns)

    def _push(self, sample: Sample, now_ns: int) -> None:
        heappush(self._heap, (self.order(sample, now_ns), sample.id, sample))

    def refresh(self, view: View) -> None:
        for sample in self._offered:
            if sample.phase is Phase.WAITING:
                self._push(sample, view.now_ns)
        self._offered = []
        super().refresh(view)

    def first(self, now_ns: int) -> Sample | None:
        """The first waiting sample that is not taken; those whose place has moved back are put there on the way."""
        heap = self._heap
        while heap:
            place, _, sample = heap[0]
            if sample.phase is not Phase.WAITING:
                heappop(heap)
                continue
            now_at = self.order(sample, now_ns)
            if now_at == place:
                return sample
            heapreplace(heap, (now_at, sample.id, sample))
        return None

    def _admissions(self, view: View, active: int, rows: int) -> list[Sample]:
        taken = self._offered
        key = next(iter(view.active)).batch_key if active else None
        while (sample := self.first(view.now_ns)) is not None and key in (None, sample.batch_key):
            most, max_rows = limits_at(sample, self.limit, view.max_rows, self.limits)
            rows += sample.full_rows
            if active + len(taken) >= most or rows > max_rows:
                break
            key = sample.batch_key
            heappop(self._heap)
            taken.append(sample)
        return taken


def skipping_step(members: Iterable[Sample]) -> tuple[StepModes, int]:
    """The step in which every member that may skip guidance does, and its rows."""
    step: list[tuple[SampleId, Mode]] = []
    rows = 0
    for sample in members:
        mode = sample.skip_mode
        if mode is None:
            step.append(sample.full)
            rows += sample.full_rows
        else:
            step.append((sample.id, mode))
            rows += 1
    return tuple(step), rows
