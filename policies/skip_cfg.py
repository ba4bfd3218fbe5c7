"""Uniform skipping of guidance, whatever the load."""

from __future__ import annotations

from policies.continuous import ContinuousPolicy
from synerdiff.core import NOTHING, ChunkLaunch, Decision, Mode, Sample, SampleId, View


def behind_schedule(sample: Sample) -> bool:
    """Whether fewer skips are spent than an even spread over the steps after the warm-up asks for by now.

    Of S skips over N steps with W of warm-up, floor(S * (t - W + 1) / (N - W)) are due with step t.
    """
    warmup = sample.budget.warmup_steps
    total = sample.skips_spent + sample.skips_left
    due = total * (sample.step_index - warmup + 1) // max(1, sample.steps - warmup)
    return sample.skips_spent < due


class SkipCfg(ContinuousPolicy):
    """Continuous batching with serial decodes; each sample spends its skip budget evenly over its steps.

    Skips that the budget's run length forbids are made up for later.
    """

    NAME = "skip-cfg"

    def decide(self, view: View) -> Decision:
        if not view.denoise_free:
            return NOTHING
        if view.decoding:
            first = next(iter(view.decoding))
            return Decision(chunks=(ChunkLaunch(first.id, 1, exclusive=True),))
        members = self.members
        members.refresh(view)
        step: list[tuple[SampleId, Mode]] = []
        for sample in members.members:
            mode = sample.skip_mode
            step.append(sample.full if mode is None or not behind_schedule(sample) else (sample.id, mode))
        return Decision(admit=members.admit, step=tuple(step))
