"""Continuous (step-level) batching: samples join and leave the batch at every step.

``continuous-serial`` decodes between steps, holding the denoise lane; ``continuous-parallel`` runs each whole decode
beside the steps, naively.
"""

from __future__ import annotations

from policies.base import BatchedPolicy, fifo_admissions, full_step
from synerdiff.core import ChunkLaunch, Decision, Sample, View


def continuous_batch(view: View, batch: int) -> tuple[list[Sample], list[Sample]]:
    """(samples to admit, samples of the coming step): active samples first, then the newly admitted.

    An active batch that no longer fits (``max_rows`` was lowered) is stepped as far as its first samples fit.
    """
    members = list(view.active)
    rows = sum([sample.full_rows for sample in members])
    while rows > view.max_rows:
        rows -= members.pop().full_rows
    if len(members) < len(view.active):
        return [], members
    admitted = fifo_admissions(view, len(members), rows, batch)
    return admitted, members + admitted


class ContinuousSerial(BatchedPolicy):
    """Admits in the decision that launches a step; every decode holds the denoise lane before the next step."""

    NAME = "continuous-serial"

    def decide(self, view: View) -> Decision:
        if not view.denoise_free:
            return Decision()
        if view.decoding:
            first = next(iter(view.decoding))
            return Decision(chunks=(ChunkLaunch(first.id, 1, exclusive=True),))
        admitted, members = continuous_batch(view, self.batch)
        return Decision(admit=tuple([sample.id for sample in admitted]), step=full_step(members))


class ContinuousParallel(BatchedPolicy):
    """The same admission; each decode runs beside, whole, on the lowest free decode lane. The queue is unbounded."""

    NAME = "continuous-parallel"

    def decide(self, view: View) -> Decision:
        launches: tuple[ChunkLaunch, ...] = ()
        if view.decoding:
            free = [lane.index for lane in view.decode_lanes if lane.free]
            if free:
                ready = (sample for sample in view.decoding if not sample.launched)
                launches = tuple([ChunkLaunch(sample.id, 1, lane) for lane, sample in zip(free, ready, strict=False)])
        if not view.denoise_free:
            return Decision(chunks=launches)
        admitted, members = continuous_batch(view, self.batch)
        return Decision(
            admit=tuple([sample.id for sample in admitted]),
            step=full_step(members),
            chunks=launches,
        )
