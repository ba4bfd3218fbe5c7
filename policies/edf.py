"""Earliest deadline first; guidance skipped when a deadline would else be missed."""

from __future__ import annotations

from policies.base import BATCH, Parameter, limits_at
from policies.load_skip import WHOLE, CheapestPlacement, Launches
from policies.step_batch import OrderedBatch, skipping_step
from synerdiff.core import NOTHING, NS_PER_S, Decision, Sample, View, WorkerInfo
from synerdiff.profile.tables import Profile

_NEVER_NS = 1 << 62
"""The deadline of a sample that has none."""


def urgency(sample: Sample, now_ns: int) -> tuple[int, int]:
    """Sorts by deadline; missed deadlines go last (by entry), samples without one before them."""
    deadline_ns = _NEVER_NS if sample.deadline_ns is None else sample.deadline_ns
    return (1, 0) if deadline_ns <= now_ns else (0, deadline_ns)


class Edf(CheapestPlacement):
    """Admits and decodes by earliest deadline, and skips guidance while a deadline is in danger.

    Missed deadlines go last, samples without a deadline before them. A sample is in danger when, at full guidance in
    the coming batch, it would end later than ``slack_s`` before its deadline; a waiting one starts at the earliest
    when the first active sample ends, and steps at its own resolution. Decodes go where they cost least.
    """

    NAME = "edf"
    PARAMETERS = (
        BATCH,
        Parameter("slack_s", float, 0.0, 0.0, 3600.0, "s", "skip guidance when less than this is left to a deadline"),
        WHOLE,
    )

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.chunking = self.parameters["chunking"]
        super().reset(worker, profile)
        self.members = self.earliest = OrderedBatch(self.batch, urgency, self.limits)
        self.slack_ns = round(self.parameters["slack_s"] * NS_PER_S)

    def decide(self, view: View) -> Decision:
        members = self.earliest
        members.arrive(view)
        if not view.denoise_free:
            return NOTHING
        members.refresh(view)
        step, rows = members.step, members.rows
        if members.members and self.in_danger(view.now_ns):
            step, rows = skipping_step(members.members)
        launches: Launches = ()
        if view.decoding:
            decoding = sorted(view.decoding, key=lambda sample: (urgency(sample, view.now_ns), sample.id))
            launches = self.place(view, decoding, rows)
            if launches and launches[-1].exclusive:
                return Decision(chunks=launches)
        return Decision(admit=members.admit, step=step, chunks=launches)

    def in_danger(self, now_ns: int) -> bool:
        """Whether a member of the coming step, or the most urgent waiting sample, has too little slack."""
        members, rows = self.members.members, self.members.rows
        costs = self.costs_of(members[0], members[0])
        step_ns = costs.step_ns(rows)
        ready_ns = now_ns + sum(costs.solo) + self.slack_ns
        for sample in members:
            deadline_ns = sample.deadline_ns
            if deadline_ns is not None and now_ns < deadline_ns < ready_ns + sample.steps_left * step_ns:
                return True
        first = self.earliest.first(now_ns)
        if first is None or first.deadline_ns is None or first.deadline_ns <= now_ns:
            return False
        costs = self.costs_of(first, first)
        own_rows = min(rows, limits_at(first, self.batch, rows, self.limits)[1])
        until_ns = min(sample.steps_left for sample in members) * step_ns + first.steps * costs.step_ns(own_rows)
        return bool(first.deadline_ns < now_ns + until_ns + sum(costs.solo) + self.slack_ns)
