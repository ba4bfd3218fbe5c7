"""A policy that writes to what it may only read is found out before anything is recorded, in both engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from policies.registry import build_policy
from synerdiff.core import (
    GUIDED,
    REUSE,
    ContractError,
    Decision,
    Mode,
    Phase,
    Request,
    SkipBudget,
    View,
    WorkerInfo,
)
from synerdiff.profile.tables import Profile
from tests.builders import make_profile
from tests.engine.conftest import Play

PROFILE = make_profile({2: 100, 4: 150}, {"whole": [40], "c2": [20, 20]})
SLOW_DECODES = make_profile({2: 100, 4: 150}, {"whole": [400]})
BUDGET = SkipBudget(500_000, 1, 1, REUSE)
REQUESTS = [Request(0, 0, steps=4), Request(1, 10, steps=4), Request(2, 900, steps=3)]


class Writes:
    """The policy `name`; writes before or after each of its decisions."""

    def __init__(self, write: Callable[[View], None], name: str, before: bool) -> None:
        self.inner, self.write, self.before = build_policy(name), write, before
        self.chunking = "whole"

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.inner.reset(worker, profile)

    def decide(self, view: View) -> Decision:
        if self.before:
            self.write(view)
        decision = self.inner.decide(view)
        if not self.before:
            self.write(view)
        return decision


def to_sample(field: str, value: Any) -> Callable[[View], None]:
    def write(view: View) -> None:
        for sample in [*view.waiting, *view.active, *view.decoding][:1]:
            setattr(sample, field, value(sample) if callable(value) else value)

    return write


def to_view(field: str, value: Any) -> Callable[[View], None]:
    return lambda view: setattr(view, field, value)


def to_lane(field: str, value: Any) -> Callable[[View], None]:
    return lambda view: setattr(view.decode_lanes[0], field, value)


SAMPLES = [
    ("steps", 1),
    ("steps", 50),
    ("steps", "x"),
    ("step_index", lambda sample: sample.step_index + 1),
    ("step_index", lambda sample: max(0, sample.step_index - 1)),
    ("step_index", 0),
    ("skips_left", 99),
    ("request", None),
    ("guided", False),
    ("full_rows", 1),
    ("batch_key", ()),
    ("admitted_ns", 7),
    ("denoised_ns", 5),
    ("decode_started_ns", 5),
    ("chunks_done", 1),
    ("id", 77),
    ("image", 5),
    ("entered_ns", 1),
    ("deadline_ns", 1),
    ("budget", SkipBudget(1_000_000, 0, 99, REUSE)),
    ("skipped_at", [0]),
    ("skips_spent", 3),
    ("full", (1, GUIDED)),
    ("default_mode", Mode.CONDITIONAL),
]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("policy", ["dynamic", "skip-cfg"])
@pytest.mark.parametrize(("field", "value"), SAMPLES)
def test_samples(play: Play, field: str, value: Any, policy: str, before: bool) -> None:
    with pytest.raises(ContractError, match="policy 'Writes' at "):
        play(REQUESTS, Writes(to_sample(field, value), policy, before), PROFILE, budget=BUDGET)


@pytest.mark.parametrize("field", ["finished_ns", "phase", "step_index", "steps", "skips_spent"])
def test_samples_that_have_ended(play: Play, field: str) -> None:
    def write(view: View) -> None:
        for sample, _ in view.gone:
            setattr(sample, field, Phase.REJECTED if field == "phase" else 2)

    with pytest.raises(ContractError, match=f"it wrote {field} of sample 0.0, which it may only read"):
        play(REQUESTS, Writes(write, "dynamic", True), PROFILE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("now_ns", 5), ("closed", 3), ("running", (9,)), ("denoise_free", None), ("max_rows", 10**6), ("waiting", [])],
)
def test_the_view(play: Play, field: str, value: Any) -> None:
    with pytest.raises(ContractError, match="policy 'Writes' at "):
        play(REQUESTS, Writes(to_view(field, value), "dynamic", False), PROFILE)


@pytest.mark.parametrize("field", ["decode_lanes", "arrived", "step_done", "chunk_done", "gone"])
def test_a_field_of_the_view_that_is_replaced_by_an_equal_one(play: Play, field: str) -> None:
    with pytest.raises(ContractError, match="it wrote its view, which it may only read"):
        play(REQUESTS, Writes(lambda view: setattr(view, field, [*getattr(view, field)]), "dynamic", False), PROFILE)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("how", ["clear()", "append(None)", "pop()", "extend(news)", "insert(0, None)"])
@pytest.mark.parametrize("field", ["arrived", "step_done", "chunk_done", "gone"])
def test_what_has_happened_is_for_reading(play: Play, field: str, how: str, before: bool) -> None:
    def write(view: View) -> None:
        if news := getattr(view, field):
            eval(f"news.{how}", {"news": news})

    with pytest.raises(ContractError, match=r"at .* s: (it wrote to the view|decide raised )"):
        play(REQUESTS, Writes(write, "continuous-parallel", before), PROFILE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index", 1),
        ("gpu", 1),
        ("sample", None),
        ("sample", "x"),
        ("chunks_left", 0),
        ("chunks_left", 2),
        ("exclusive", True),
        ("forced", True),
        ("started", False),
    ],
)
def test_lanes(play: Play, field: str, value: Any) -> None:
    with pytest.raises(ContractError, match="policy 'Writes' at "):
        play(REQUESTS, Writes(to_lane(field, value), "continuous-parallel", False), SLOW_DECODES)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 1), ("arrival_ns", -5), ("slo_ns", 10**12), ("guidance_scale", 1.0), ("prompt", "x")]
)
@pytest.mark.parametrize("policy", ["dynamic", "skip-cfg"])
def test_requests_that_are_written_past_their_refusal(play: Play, field: str, value: Any, policy: str) -> None:
    def write(view: View) -> None:
        for sample, _ in view.gone:
            object.__setattr__(sample.request, field, value)

    with pytest.raises(ContractError, match=f"it wrote {field} of request 0, which it may only read"):
        play(REQUESTS, Writes(write, policy, True), PROFILE, budget=BUDGET)


def test_budgets_and_their_tables(play: Play) -> None:
    def write(view: View) -> None:
        for sample in view.waiting:
            assert sample.budget.eligible_steps is not None
            sample.budget.eligible_steps[4] = frozenset(range(4))

    budget = SkipBudget(500_000, 1, 1, REUSE, {4: frozenset({2}), 3: frozenset({1})})
    with pytest.raises(ContractError, match="it wrote a skip budget, which it may only read"):
        play(REQUESTS, Writes(write, "dynamic", True), PROFILE, budget=budget)


def test_lanes_are_no_list(play: Play) -> None:
    with pytest.raises(ContractError, match="decide raised AttributeError"):
        play(REQUESTS, Writes(lambda view: view.decode_lanes.append(None), "dynamic", True), PROFILE)  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", ["dynamic", "skip-cfg", "continuous-parallel", "static", "load-skip", "synerdiff"])
def test_policies_that_only_read_pass(play: Play, policy: str) -> None:
    result = play(REQUESTS, Writes(lambda view: None, policy, True), PROFILE, budget=BUDGET)
    assert [record.status for record in result.requests] == ["done"] * 3
