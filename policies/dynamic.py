"""Dynamic batching: starts at once with what waits; nobody joins until the batch is empty."""

from __future__ import annotations

from policies.base import BatchedPolicy, fifo_admissions, fitting, full_step
from synerdiff.core import ChunkLaunch, Decision, View


class Dynamic(BatchedPolicy):
    """Finished samples leave without padding and are decoded, holding the denoise lane, before the next step."""

    NAME = "dynamic"

    def decide(self, view: View) -> Decision:
        if not view.denoise_free:
            return Decision()
        if view.decoding:
            first = next(iter(view.decoding))
            return Decision(chunks=(ChunkLaunch(first.id, 1, exclusive=True),))
        if view.active:
            return Decision(step=full_step(fitting(view.active, view.max_rows)))
        batch = fifo_admissions(view, 0, 0, self.batch)
        return Decision(admit=tuple([sample.id for sample in batch]), step=full_step(batch))
