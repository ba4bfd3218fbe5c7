"""Who takes the coming step under continuous (step-level) batching, and in which modes."""

from __future__ import annotations

from collections.abc import Iterable

from policies.base import fifo_admissions, full_step
from synerdiff.core import Mode, Sample, SampleId, View

StepModes = tuple[tuple[SampleId, Mode], ...]


class StepBatch:
    """The members of the coming step: active samples first, then newly admitted ones.

    Admission is first in first out, without overtaking across batch keys, up to ``limit`` samples and the rows there
    are. The last answer is kept while nobody joins or leaves, which is most steps. Samples become active only by this
    batch's own admissions, so an unchanged count means unchanged members.
    """

    __slots__ = ("_count", "admit", "limit", "members", "rows", "step", "steps_sum", "version")

    def __init__(self, limit: int) -> None:
        self.limit = limit
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
        return fifo_admissions(view, active, rows, self.limit)

    def _keep(self, members: list[Sample], admit: tuple[SampleId, ...], rows: int, count: int) -> None:
        self.members, self.admit, self.rows, self._count = members, admit, rows, count
        self.version += 1
        self.step = full_step(members)
        self.steps_sum = sum([sample.steps for sample in members])


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
