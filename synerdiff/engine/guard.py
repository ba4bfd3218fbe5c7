"""Policies only read. What one has written to the view, its samples, their requests or its lanes is found before
records are made.

A sample's fixed fields and its request's are noted when it enters, the others when it ends; the worker counts steps,
skips, chunks and news by itself. Comparing costs a run about 7% of its time (and ours, which write nothing, are spared
it), where fields that refuse to be written would cost far more.
"""

from __future__ import annotations

from copy import deepcopy
from operator import attrgetter
from typing import Any

from synerdiff.core import LaneView, Mode, Phase, Request, Sample, SampleId, SkipBudget

_FIXED = (
    "id", "request", "image", "steps", "guided", "full", "full_rows", "default_mode", "batch_key", "entered_ns",
    "deadline_ns", "budget",
)  # fmt: skip
_MOVING = (
    "phase", "step_index", "skips_spent", "skips_left", "chunks_done", "admitted_ns", "denoised_ns",
    "decode_started_ns", "finished_ns",
)  # fmt: skip
_fixed, _moving = attrgetter(*_FIXED), attrgetter(*_MOVING)
_NOTED = ("admitted_ns", "denoised_ns", "decode_started_ns")
_MOST_CHUNKS = 10_000
_ASKED = tuple(Request.__slots__)
_asked = attrgetter(*_ASKED)
_BUDGET = tuple(SkipBudget.__slots__)
_budget = attrgetter(*_BUDGET)
_PHASE, _ADMITTED, _DENOISED = attrgetter("phase"), attrgetter("admitted_ns"), attrgetter("denoised_ns")
_DECODE_STARTED = attrgetter("decode_started_ns")
_SKIPPED, _LEFT = attrgetter("skipped_at"), attrgetter("skips_left")
_LANE = ("index", "gpu", "sample", "chunks_left", "exclusive", "forced", "started")
lane_state = attrgetter(*_LANE)
"""All that a lane shows."""
_COUNTS = {name: attrgetter(name) for name in ("step_index", "skips_spent", "chunks_done")}


class Guard:
    """What a worker knows of its samples besides what a policy can reach."""

    __slots__ = (
        "admitted_ns",
        "asked",
        "budgets",
        "chunks",
        "decode_started_ns",
        "denoised_ns",
        "ended",
        "entered",
        "lanes",
        "news",
        "skipped_at",
        "skips",
        "skips_given",
        "steps",
        "steps_given",
    )

    def __init__(self, lanes: list[LaneView]) -> None:
        self.entered: dict[SampleId, tuple[Any, ...]] = {}
        self.ended: dict[SampleId, tuple[Any, ...]] = {}
        self.admitted_ns: dict[SampleId, int] = {}
        self.denoised_ns: dict[SampleId, int] = {}
        self.decode_started_ns: dict[SampleId, int] = {}
        self.asked: dict[int, tuple[Request, tuple[Any, ...]]] = {}
        """Request id -> the request, and its fields when it entered."""
        self.skipped_at: dict[SampleId, list[int]] = {}
        self.budgets: dict[int, tuple[SkipBudget, SkipBudget]] = {}
        """Identity -> a skip budget, and a copy of it."""
        self.lanes = [*map(lane_state, lanes)]
        self.news = 0
        """Entries of the view's four lists of what has happened since the last decision."""
        self.skips_given = self.steps_given = self.steps = self.skips = self.chunks = 0
        """Skips and steps of the samples that have entered; steps, skips and chunks that they have taken."""

    def enter(self, sample: Sample) -> None:
        self.entered[sample.id] = _fixed(sample)
        request, budget = sample.request, sample.budget
        if not sample.image:
            self.asked[request.request_id] = request, _asked(request)
        if id(budget) not in self.budgets:
            self.budgets[id(budget)] = budget, deepcopy(budget)
        self.steps_given += sample.steps
        self.skips_given += sample.skips_left

    def end(self, sample: Sample) -> None:
        """It has ended, or what it ended as has changed."""
        self.ended[sample.id] = _moving(sample)

    def restore(self, samples: list[Sample], lanes: list[LaneView]) -> None:
        """Lanes, requests and samples as they were, so that what runs can end and what was finished be recorded.

        How far a sample is that has not ended is known to a step at best, so that is only kept within its bounds.
        """
        for lane, state in zip(lanes, self.lanes, strict=True):
            _put(lane, _LANE, state)
        for request, asked in self.asked.values():
            _put(request, _ASKED, asked)
        for budget, known in self.budgets.values():
            _put(budget, _BUDGET, _budget(known))
        for sample_id, entered in self.entered.items():
            sample = samples[sample_id]
            _put(sample, _FIXED, entered)
            denoised = sample_id in self.denoised_ns
            if sample_id in self.ended:
                _put(sample, _MOVING, self.ended[sample_id])
            else:
                admitted = sample_id in self.admitted_ns
                sample.phase = Phase.DECODING if denoised else Phase.ACTIVE if admitted else Phase.WAITING
                sample.finished_ns = -1
            for name in _NOTED:
                setattr(sample, name, getattr(self, name).get(sample_id, -1))
            sample.step_index = sample.steps if denoised else _within(sample.step_index, sample.steps)
            sample.chunks_done = _within(sample.chunks_done, _MOST_CHUNKS)
            sample.skipped_at = [at for at in self.skipped_at.get(sample_id, ()) if at < sample.step_index]
            sample.skips_spent = len(sample.skipped_at)

    def written(self, sample: Sample) -> str | None:
        """What was written to a sample of this worker, as part of a sentence; None for nothing."""
        entered = self.entered.get(sample.id)
        if entered is None:
            return "id of a sample"
        if (now := _fixed(sample)) != entered:
            return _named(_FIXED, entered, now, entered)
        ended = self.ended.get(sample.id)
        if ended is not None and (now := _moving(sample)) != ended:
            return _named(_MOVING, ended, now, entered)
        for name in _NOTED:
            if getattr(self, name).get(sample.id, -1) != getattr(sample, name):
                return f"{name} of sample {sample.name}"
        skipped = self.skipped_at.get(sample.id)
        if skipped != sample.skipped_at:
            return f"skipped_at of sample {sample.name}"
        if len(skipped or ()) != sample.skips_spent or (skipped and not _within_budget(sample, skipped)):
            return f"a skip count of sample {sample.name}"
        if sample.guided and sample.skips_left != sample.budget.skips(sample.steps) - sample.skips_spent:
            return f"skips_left of sample {sample.name}"
        return None

    def anything(self, samples: list[Sample], lanes: list[LaneView], chunk_count: int) -> str | None:
        """What was written to any sample or lane, as part of a sentence; None for nothing."""
        for key, (request, asked) in self.asked.items():
            if (now := _asked(request)) != asked:
                return f"{_changed(_ASKED, asked, now)} of request {key}"
        if any(budget != known for budget, known in self.budgets.values()):
            return "a skip budget"
        mine = [*map(samples.__getitem__, self.entered)]
        if not self._unwritten(samples, mine):
            for sample in mine:
                if (what := self.written(sample)) is not None:
                    return what
        for index, lane in enumerate(lanes):
            if lane_state(lane) != self.lanes[index]:
                return f"decode lane {index}"
        phases = [*map(_PHASE, mine)]
        if Phase.FAILED not in phases:
            for name, taken in (("step_index", self.steps), ("skips_spent", self.skips), ("chunks_done", self.chunks)):
                if sum(map(_COUNTS[name], mine)) != taken:
                    return f"{name} of a sample"
            all_done = self.steps_given, chunk_count * len(mine)
            if phases.count(Phase.DONE) == len(mine) and (self.steps, self.chunks) != all_done:
                return "step_index or chunks_done of a sample"
        return None

    def _unwritten(self, samples: list[Sample], mine: list[Sample]) -> bool:
        """The same as asking of each sample what was written, for all at once; False for what has to be asked."""
        of = samples.__getitem__
        return (
            not self.skips
            and [*map(_fixed, mine)] == [*self.entered.values()]
            and [*map(_moving, map(of, self.ended))] == [*self.ended.values()]
            and [*map(_ADMITTED, map(of, self.admitted_ns))] == [*self.admitted_ns.values()]
            and [*map(_DENOISED, map(of, self.denoised_ns))] == [*self.denoised_ns.values()]
            and [*map(_DECODE_STARTED, map(of, self.decode_started_ns))] == [*self.decode_started_ns.values()]
            and not any(map(_SKIPPED, mine))
            and sum(map(_LEFT, mine)) == self.skips_given
        )


def _put(target: object, names: tuple[str, ...], values: tuple[Any, ...]) -> None:
    for name, value in zip(names, values, strict=True):
        object.__setattr__(target, name, value)


def _within(count: object, most: int) -> int:
    return min(max(count, 0), most) if type(count) is int else 0


def _named(names: tuple[str, ...], before: tuple[Any, ...], now: tuple[Any, ...], entered: tuple[Any, ...]) -> str:
    return f"{_changed(names, before, now)} of sample {entered[1].request_id}.{entered[2]}"


def _changed(names: tuple[str, ...], before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    return next(name for name, a, b in zip(names, before, now, strict=True) if a != b)


def _within_budget(sample: Sample, skipped: list[int]) -> bool:
    """Whether its skips are what the budget allows one after the other."""
    run, before, left = 0, -2, sample.budget.skips(sample.steps)
    for index in skipped:
        run = run + 1 if index == before + 1 else 0
        if not sample.may_skip_at(index, left, run) or (sample.budget.mode is Mode.REUSE and index == run):
            return False
        before, left = index, left - 1
    return True
