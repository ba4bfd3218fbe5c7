"""Continuous (step-level) batching: samples join and leave the batch at every step.

``continuous-serial`` decodes between steps, holding the denoise lane; ``continuous-parallel`` runs each whole decode
beside the steps, naively; ``chunked`` does the same with decodes cut into chunks. ``skip-cfg`` is ``continuous-serial``
that skips guidance uniformly, whatever the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from policies.base import BATCH, BatchedPolicy, Parameter, decode_alone
from policies.decode_costs import CHUNKING, chosen_chunking
from policies.step_batch import Order, StepBatch
from policies.turns import OLDEST, TURN_PARAMETERS, TurnBatch
from synerdiff.core import NOTHING, ChunkLaunch, Decision, Mode, Sample, SampleId, View, WorkerInfo
from synerdiff.profile.tables import Profile


class ContinuousPolicy(BatchedPolicy):
    """What policies with continuous batching share: the members of the coming step, and whose turn it is."""

    turns: TurnBatch | None = None
    """Where batch keys take turns: the members too."""

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        super().reset(worker, profile)
        self.members = StepBatch(self.batch, self.limits)
        self.turns = None
        if self.parameters.get("turn", OLDEST) != OLDEST:
            self.members = self.turns = self.taking_turns(worker, profile)

    def taking_turns(self, worker: WorkerInfo, profile: Profile, order: Order | None = None) -> TurnBatch:
        """The batch that resolutions share by turns."""
        turn, max_wait_s = self.parameters["turn"], self.parameters["turn_max_wait_s"]
        return TurnBatch(self.batch, self.limits, turn, max_wait_s, profile, worker, self.rows_of, order)

    def rows_of(self, members: Sequence[Sample], rows: int) -> int:
        """Rows of a step of these members, who take ``rows`` with full guidance."""
        return rows


class ContinuousSerial(ContinuousPolicy):
    """Admits in the decision that launches a step; every decode holds the denoise lane before the next step."""

    NAME = "continuous-serial"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (BATCH, *TURN_PARAMETERS)

    def decide(self, view: View) -> Decision:
        turns = self.turns
        if turns is not None:
            turns.hear(view)
        if not view.denoise_free:
            return NOTHING
        if view.decoding:
            return decode_alone(view)
        members = self.members
        members.refresh(view)
        if turns is not None and members.step:
            turns.launched()
        return Decision(members.admit, (), members.step)


class SkipCfg(ContinuousSerial):
    """Continuous batching with serial decodes; each sample spends its skip budget evenly over its steps.

    Skips that the budget's run length forbids are made up for later.
    """

    NAME = "skip-cfg"

    def decide(self, view: View) -> Decision:
        decision = super().decide(view)
        if not decision.step:
            return decision
        step: list[tuple[SampleId, Mode]] = []
        for sample in self.members.members:
            mode = sample.skip_mode
            step.append(sample.full if mode is None or not behind_schedule(sample) else (sample.id, mode))
        return Decision(decision.admit, (), tuple(step))


def behind_schedule(sample: Sample) -> bool:
    """Whether fewer skips are spent than an even spread over the steps after the warm-up asks for by now.

    Of S skips over N steps with W of warm-up, floor(S * (t - W + 1) / (N - W)) are due with step t.
    """
    warmup = sample.budget.warmup_steps
    total = sample.skips_spent + sample.skips_left
    due = total * (sample.step_index - warmup + 1) // max(1, sample.steps - warmup)
    return sample.skips_spent < due


class ContinuousParallel(ContinuousPolicy):
    """The same admission; each decode runs beside, whole, on the lowest free decode lane. The queue is unbounded."""

    NAME = "continuous-parallel"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (BATCH, *TURN_PARAMETERS)

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        super().reset(worker, profile)
        self.chunk_count = profile.chunk_count(self.chunking)

    def decide(self, view: View) -> Decision:
        turns = self.turns
        if turns is not None:
            turns.hear(view)
        launches: tuple[ChunkLaunch, ...] = ()
        if view.decoding:
            free = [lane.index for lane in view.decode_lanes if lane.free]
            if free:
                ready = (sample for sample in view.decoding if not sample.launched)
                launches = tuple(
                    [ChunkLaunch(sample.id, self.chunk_count, lane) for lane, sample in zip(free, ready, strict=False)]
                )
        if not view.denoise_free:
            return Decision(chunks=launches)
        members = self.members
        members.refresh(view)
        if turns is not None and members.step:
            turns.launched()
        return Decision(members.admit, (), members.step, 0, launches)


class Chunked(ContinuousParallel):
    """Continuous batching whose decodes run beside the steps in chunks, back to back; guidance is never skipped.

    It is continuous-parallel with another cut, so it shows what cutting alone does: something only where a chunk
    contends less with a step than the whole decode does.
    """

    NAME = "chunked"
    PARAMETERS = (BATCH, CHUNKING, *TURN_PARAMETERS)

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.chunking = chosen_chunking(self.parameters["chunking"], profile)
        super().reset(worker, profile)
