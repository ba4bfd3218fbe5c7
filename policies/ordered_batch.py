"""A step batch whose admissions go by an order of the policy's own instead of first in first out."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush, heapreplace

from policies.step_batch import StepBatch
from synerdiff.core import Phase, Sample, View

Order = Callable[[Sample, int], tuple[int, ...]]
"""(sample, now in ns) -> its place in the order, least first. As time passes a sample may move back, never forward."""


class OrderedBatch(StepBatch):
    """Admits the first by ``order``, ties by sample id, without overtaking across batch keys.

    To be told at every decision who has arrived (``arrive``), before ``refresh``.
    """

    __slots__ = ("_heap", "_offered", "order")

    def __init__(self, limit: int, order: Order) -> None:
        super().__init__(limit)
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
        while active + len(taken) < self.limit:
            sample = self.first(view.now_ns)
            if sample is None or (key is not None and sample.batch_key != key):
                break
            rows += sample.full_rows
            if rows > view.max_rows:
                break
            key = sample.batch_key
            heappop(self._heap)
            taken.append(sample)
        return taken
