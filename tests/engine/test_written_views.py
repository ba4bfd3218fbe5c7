"""A policy that writes to what it may only read is found out before anything is recorded, in both engines."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
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


def test_a_budget_is_as_it_was_for_the_next_run(play: Play) -> None:
    def write(view: View) -> None:
        for sample, _ in view.gone:
            object.__setattr__(sample.budget, "fraction_ppm", 1)

    budget = SkipBudget(500_000, 1, 1, REUSE)
    with pytest.raises(ContractError, match="it wrote a skip budget, which it may only read"):
        play(REQUESTS, Writes(write, "dynamic", True), PROFILE, budget=budget)
    assert budget == SkipBudget(500_000, 1, 1, REUSE)


def test_which_steps_were_skipped_is_known_without_the_sample(play: Play) -> None:
    def write(view: View) -> None:
        for sample, _ in view.gone:
            if sample.skipped_at is not None:
                sample.skipped_at = [at + 1 for at in sample.skipped_at]

    budget = SkipBudget(250_000, 1, 1, REUSE)
    with pytest.raises(ContractError, match=r"it wrote skipped_at of sample 0\.0, which it may only read"):
        play(REQUESTS, Writes(write, "skip-cfg", True), PROFILE, budget=budget)


class WritesToWhatItWasGiven:
    """Serves as `continuous-parallel`, and writes in one of its hooks, once."""

    chunking = "whole"

    def __init__(self, write: Callable[[WorkerInfo, Profile], object], hook: str) -> None:
        self.inner, self.write, self.hook = build_policy("continuous-parallel"), write, hook

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.given = worker, profile
        self.inner.reset(worker, profile)
        if self.hook == "reset":
            self.write(worker, profile)

    def decide(self, view: View) -> Decision:
        if self.hook == "decide":
            self.write(*self.given)
        return self.inner.decide(view)


def put(target: Any, name: str, value: Any) -> None:
    object.__setattr__(target, name, value)


def without_steps(worker: WorkerInfo, profile: Profile) -> None:
    if hasattr(profile, "steps"):
        del profile.steps


GIVEN = [
    ("max_rows of its worker", lambda worker, profile: put(worker, "max_rows", 99)),
    ("decode_gpus of its worker", lambda worker, profile: put(worker, "decode_gpus", (7,))),
    ("steps of its profile", lambda worker, profile: profile.steps.update({2: profile.steps[4]})),
    ("steps of its profile", lambda worker, profile: setattr(profile, "steps", None)),
    ("chunks of its profile", lambda worker, profile: profile.chunks.update(whole=profile.chunks["c2"])),
    ("corun of its profile", lambda worker, profile: profile.corun["whole", 0].clear()),
    ("corun of its profile", lambda worker, profile: put(profile.corun["whole", 0][2], "held_out", True)),
    ("overheads of its profile", lambda worker, profile: profile.overheads.update(text_encode=profile.steps[4])),
    ("speed_ppm of its profile", lambda worker, profile: setattr(profile, "speed_ppm", 2_000_000)),
    ("head of its profile", lambda worker, profile: profile.head.notes.update(mine=1)),
    (
        "something (AttributeError) to its profile",
        without_steps,
    ),
]


@pytest.mark.parametrize("hook", ["reset", "decide"])
@pytest.mark.parametrize(("what", "write"), GIVEN)
def test_what_reset_gives_is_for_reading(
    play: Play, what: str, write: Callable[[WorkerInfo, Profile], object], hook: str
) -> None:
    profile = deepcopy(PROFILE)
    with pytest.raises(ContractError) as error:
        play(REQUESTS, WritesToWhatItWasGiven(write, hook), profile)
    at = "" if hook == "reset" else r" at 0\.\d{9} s"
    assert re.fullmatch(
        rf"policy 'WritesToWhatItWasGiven'{at}: {hook} wrote {re.escape(what)}, which it may only read\.",
        str(error.value),
    )
    assert profile == PROFILE


def test_what_a_profile_remembers_is_not_the_engine_s(play: Play) -> None:
    """Its memory of look-ups is no table: a policy that fills it in advance changes its own copy alone."""

    def fill(worker: WorkerInfo, profile: Profile) -> None:
        profile._step_memo.update(dict.fromkeys(range(1, 5), 1))

    plain = play(REQUESTS, build_policy("continuous-parallel"), PROFILE)
    written = play(REQUESTS, WritesToWhatItWasGiven(fill, "reset"), deepcopy(PROFILE))
    assert written.work == plain.work


def test_lanes_are_no_list(play: Play) -> None:
    with pytest.raises(ContractError, match="decide raised AttributeError"):
        play(REQUESTS, Writes(lambda view: view.decode_lanes.append(None), "dynamic", True), PROFILE)  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", ["dynamic", "skip-cfg", "continuous-parallel", "static", "load-skip", "synerdiff"])
def test_policies_that_only_read_pass(play: Play, policy: str) -> None:
    result = play(REQUESTS, Writes(lambda view: None, policy, True), PROFILE, budget=BUDGET)
    assert [record.status for record in result.requests] == ["done"] * 3
