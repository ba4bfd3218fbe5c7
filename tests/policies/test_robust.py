"""No policy breaks the contract or stalls, on whatever profile, trace and view; and no budget is ever exceeded."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import POLICIES, build_policy
from simulator import simulate
from synerdiff.core import CONDITIONAL, REUSE, Request, RunResult, SkipBudget, View, WorkerInfo
from synerdiff.profile.tables import Profile
from tests.builders import make_profile

NAMES = ("step_dispatch", "chunk_dispatch", "decision_lead", "text_encode", "result_copy")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Squeezed:
    """A policy whose view now and then has fewer rows, as after an out-of-memory error; they only go down."""

    def __init__(self, inner: Any, seed: int, least: int) -> None:
        self.inner, self.draw, self.least = inner, random.Random(seed), least
        self.rows = 1 << 30
        self.NAME = inner.NAME

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.inner.reset(worker, profile)
        self.chunking = self.inner.chunking

    def decide(self, view: View) -> Any:
        if self.draw.random() < 0.2:
            self.rows = max(self.least, min(self.rows, view.max_rows) - self.draw.randint(0, 4))
        view.max_rows = min(view.max_rows, self.rows)
        return self.inner.decide(view)


times = st.integers(1, 300)


@st.composite
def profiles(draw: Any) -> Profile:
    """Buckets or eager; slowdowns below 1 up to severe; decodes from the shortest to longer than all steps."""
    rows = sorted(draw(st.sets(st.integers(2, 15), max_size=3)) | {1, 16})
    ppm = st.sampled_from((600_000, 999_999, 1_000_000, 1_000_001, 1_400_000, 2_000_000, 6_000_000))
    decode = st.sampled_from((1, 40, 400, 20_000))
    cut = draw(st.lists(decode, min_size=1, max_size=5))
    ends = {1: (draw(ppm), draw(ppm)), 16: (draw(ppm), draw(ppm))}
    overheads = {name: draw(st.sampled_from((0, 0, 3, 60))) for name in NAMES}
    chunks = {"whole": [draw(decode)], draw(st.sampled_from(("c4", "other"))): cut}
    steps = {r: draw(times) for r in rows}
    return make_profile(steps, chunks, ends, overheads=overheads, eager=draw(st.booleans()))


@st.composite
def traces(draw: Any) -> Any:
    arrival, requests = 0, []
    for number in range(draw(st.integers(1, 12))):
        arrival += draw(st.sampled_from((0, 0, 1, 60, 400, 5_000)))
        requests.append(
            Request(
                number,
                arrival,
                steps=draw(st.integers(1, 8)),
                images=draw(st.sampled_from((1, 1, 2, 4))),
                guidance_scale=draw(st.sampled_from((7.5, 7.5, 1.0))),
                base_model=draw(st.sampled_from(("", "", "", "b"))),
                slo_ns=draw(st.sampled_from((None, 1, 500, 5_000, 1_000_000))),
            )
        )
    return requests


budgets = st.builds(
    SkipBudget,
    fraction_ppm=st.sampled_from((0, 300_000, 1_000_000)),
    warmup_steps=st.integers(0, 3),
    longest_run=st.integers(1, 3),
    mode=st.sampled_from((CONDITIONAL, REUSE)),
)
gpus = st.sampled_from(((0,), (0, 0), (1,), (1, 0), (0, 1), (1, 1)))
batches = st.sampled_from((None, 1, 2, 8))


def assert_whole_and_within_budget(requests: Any, result: RunResult, budget: SkipBudget) -> None:
    """Every image is done, in all its steps and chunks, and no sample skipped more, earlier or longer than allowed."""
    assert [record.status for record in result.requests] == ["done"] * len(requests)
    for request, record in zip(requests, result.requests, strict=True):
        for modes in record.modes:
            assert len(modes) == request.steps
            if request.guidance_scale <= 1:
                assert set(modes) == {"c"}
                continue
            letter = "r" if budget.mode is REUSE else "c"
            assert set(modes) <= {"g", letter}
            assert modes.count(letter) <= budget.skips(request.steps)
            assert letter not in modes[: budget.warmup_steps]
            assert letter * (budget.longest_run + 1) not in modes
            assert budget.mode is not REUSE or modes[0] == "g"


@pytest.mark.parametrize("name", POLICIES)
@quick
@given(traces(), profiles(), gpus, budgets, batches)
def test_every_run_ends_and_keeps_the_budget(
    name: str, requests: Any, profile: Profile, decode_gpus: Any, budget: SkipBudget, batch: Any
) -> None:
    policy = build_policy(name, {} if batch is None else {"batch": batch})
    result = simulate(requests, policy, profile, decode_gpus=decode_gpus, budget=budget)
    assert_whole_and_within_budget(requests, result, budget)
    for record in result.work:
        assert record.end_ns > record.start_ns
    # Exclusive chunks and steps never overlap.
    held = [(w.start_ns, w.end_ns) for w in result.work if w.exclusive or w.kind == "step"]
    for (_, end), (start, _) in zip(sorted(held), sorted(held)[1:], strict=False):
        assert end <= start


@pytest.mark.parametrize("name", POLICIES)
@quick
@given(traces(), profiles(), gpus, budgets, st.integers(0, 10**6), st.integers(2, 5))
def test_rows_may_be_lowered_at_any_time(
    name: str, requests: Any, profile: Profile, decode_gpus: Any, budget: SkipBudget, seed: int, least: Any
) -> None:
    policy = Squeezed(build_policy(name), seed, least)
    result = simulate(requests, policy, profile, decode_gpus=decode_gpus, budget=budget)
    assert_whole_and_within_budget(requests, result, budget)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_object_serves_a_second_run(name: str) -> None:
    """reset leaves nothing behind."""
    slowdowns = {1: (1_300_000, 1_500_000), 16: (1_600_000, 1_800_000)}
    profile = make_profile({1: 30, 16: 200}, {"whole": [90], "c4": [20, 25, 20, 25]}, slowdowns)
    budget = SkipBudget(400_000, warmup_steps=1)
    requests = [Request(i, 37 * i * i, steps=5 + i % 4, images=1 + i % 3, slo_ns=4_000) for i in range(12)]
    later = [replace(request, arrival_ns=request.arrival_ns + 11) for request in requests]
    policy = build_policy(name)
    simulate(later, policy, profile, budget=budget)
    again = simulate(requests, policy, profile, budget=budget)
    assert again.work == simulate(requests, build_policy(name), profile, budget=budget).work
