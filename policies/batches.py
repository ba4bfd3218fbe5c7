"""Batches that nobody joins while they run: ``static`` fills and pads one, ``dynamic`` starts with what waits."""

from __future__ import annotations

from itertools import islice

from policies.base import BATCH, BatchedPolicy, Parameter, decode_alone, fifo_admissions, fitting, full_step, limits_at
from synerdiff.core import NS_PER_S, Decision, Sample, View


class Static(BatchedPolicy):
    """Waits for a full batch, for ``max_wait_s`` after the oldest sample's entry, or for the end of arrivals.

    The batch is the first samples with the oldest's batch key. A finished sample's rows stay as padding until the
    slowest ends; then all are decoded one by one while the denoise lane is held. A partial batch is not padded.
    """

    NAME = "static"
    PARAMETERS = (
        BATCH,
        Parameter("max_wait_s", float, 1.0, 0.0, 3600.0, "s", "longest wait of the oldest sample for a full batch"),
    )

    def decide(self, view: View) -> Decision:
        if not view.denoise_free:
            return Decision()
        if view.active:
            max_rows = limits_at(next(iter(view.active)), self.batch, view.max_rows, self.limits)[1]
            members = fitting(view.active, max_rows)
            room = max_rows - sum(sample.full_rows for sample in members)
            padding = sum(sample.full_rows for sample in view.decoding)
            return Decision(step=full_step(members), pad_rows=min(padding, room))
        if view.decoding:
            return decode_alone(view)
        if not view.waiting:
            return Decision()
        batch, full = self._next_batch(view)
        oldest = batch[0]
        due_ns = oldest.entered_ns + round(self.parameters["max_wait_s"] * NS_PER_S)
        if full or view.closed or view.now_ns >= due_ns:
            return Decision(admit=tuple([sample.id for sample in batch]), step=full_step(batch))
        return Decision(wake_at_ns=due_ns)

    def _next_batch(self, view: View) -> tuple[list[Sample], bool]:
        """The first samples with the oldest's key, and whether no more fit."""
        first = next(iter(view.waiting))
        most, max_rows = limits_at(first, self.batch, view.max_rows, self.limits)
        batch: list[Sample] = []
        rows = 0
        for sample in islice((s for s in view.waiting if s.batch_key == first.batch_key), most):
            if rows + sample.full_rows > max_rows:
                return batch, True
            rows += sample.full_rows
            batch.append(sample)
        return batch, len(batch) == most


class Dynamic(BatchedPolicy):
    """Starts at once with what waits; nobody joins until the batch is empty.

    Finished samples leave without padding and are decoded, holding the denoise lane, before the next step.
    """

    NAME = "dynamic"

    def decide(self, view: View) -> Decision:
        if not view.denoise_free:
            return Decision()
        if view.decoding:
            return decode_alone(view)
        if view.active:
            return Decision(step=full_step(fitting(view.active, view.max_rows)))
        batch = fifo_admissions(view, 0, 0, self.batch, self.limits)
        return Decision(admit=tuple([sample.id for sample in batch]), step=full_step(batch))
