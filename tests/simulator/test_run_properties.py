"""What every run must show in its records, whatever the policy does."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import POLICIES, build_policy
from simulator import simulate
from synerdiff.core import RunResult, SkipBudget
from synerdiff.profile.tables import Profile
from tests.strategies import Whim, budgets, profiles, traces


def check_records(requests: Any, result: RunResult, chunk_count: Any, budget: SkipBudget) -> None:
    assert [record.request for record in result.requests] == list(requests)
    assert len(result.sample_names) == sum(request.images for request in requests)
    owner = [(request, image) for request in requests for image in range(request.images)]
    lanes, steps_of, chunks_of, exclusive = defaultdict(list), defaultdict(list), defaultdict(list), []
    for work in result.work:
        assert work.start_ns <= work.end_ns
        lanes[work.lane].append((work.start_ns, work.end_ns))
        if work.kind == "step":
            assert len(work.samples) == len(set(work.samples)) == len(work.modes)
            assert work.rows == work.pad_rows + sum(2 if mode == "g" else 1 for mode in work.modes)
            for sample, mode in zip(work.samples, work.modes, strict=True):
                steps_of[sample].append((work.start_ns, work.end_ns, mode))
        else:
            chunks_of[work.samples[0]].append((work.chunk, work.start_ns, work.end_ns))
            if work.exclusive:
                exclusive.append((work.start_ns, work.end_ns))
    for spans in lanes.values():  # lanes never overlap
        spans.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    for start, end in exclusive:  # an exclusive chunk shares its time with no step
        assert all(e <= start or s >= end for s, e in lanes["denoise"])
    done = {i for i, (request, _) in enumerate(owner) if result.requests[request.request_id].status == "done"}
    for sample, (request, image) in enumerate(owner):
        steps, chunks = steps_of[sample], chunks_of[sample]
        assert len(steps) <= request.steps
        modes = "".join(mode for _, _, mode in steps)
        assert modes == result.requests[request.request_id].modes[image]
        if request.guidance_scale <= 1:
            assert set(modes) <= {"c"}
        else:
            skipped = len(modes) - modes.count("g")
            assert skipped <= budget.skips(request.steps)
            assert "g" * min(len(modes), budget.warmup_steps) == modes[: budget.warmup_steps]
            longest = max((len(run) for run in modes.split("g")), default=0)
            assert longest <= budget.longest_run
        assert [chunk for chunk, _, _ in chunks] == list(range(len(chunks)))  # in order, each once
        if chunks:
            assert chunks[0][1] >= steps[-1][1]
            assert all(a[2] <= b[1] for a, b in pairwise(chunks))
        if sample in done:  # every request ends once, with all its work
            assert len(steps) == request.steps
            assert len(chunks) == chunk_count
    for record in result.requests:
        assert record.status in ("done", "rejected")
        if record.status == "done":
            assert record.request.arrival_ns <= record.admitted_ns < record.denoised_ns <= record.decode_started_ns
            assert record.decode_started_ns < record.finished_ns


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), profiles(), st.integers(0, 10**6), st.sampled_from(((0,), (0, 0), (1,))), budgets)
def test_records_of_any_legal_policy_are_sound(
    requests: Any, profile: Profile, seed: int, gpus: Any, budget: SkipBudget
) -> None:
    result = simulate(requests, Whim(seed, "cut"), profile, decode_gpus=gpus, budget=budget)
    check_records(requests, result, profile.chunk_count("cut"), budget)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(POLICIES)), traces(), profiles(), st.sampled_from(((0,), (0, 0), (1,))), budgets)
def test_records_of_every_registered_policy_are_sound(
    name: str, requests: Any, profile: Profile, gpus: Any, budget: SkipBudget
) -> None:
    policy = build_policy(name)
    result = simulate(requests, policy, profile, decode_gpus=gpus, budget=budget)
    check_records(requests, result, profile.chunk_count(policy.chunking), budget)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), profiles(), st.integers(0, 10**6))
def test_the_same_seed_gives_the_same_run_and_another_seed_other_times(
    requests: Any, profile: Profile, seed: int
) -> None:
    policy = Whim(1, "whole")
    first = simulate(requests, policy, profile, dispersion_seed=seed)
    again = simulate(requests, policy, profile, dispersion_seed=seed)
    assert first.work == again.work
    assert first.requests == again.requests


def test_dispersion_reproduces_the_measured_spread() -> None:
    import statistics

    from simulator.pieces import Times
    from synerdiff.profile.tables import Spread
    from tests.builders import affine_profile

    profile = affine_profile()
    profile.steps = {**profile.steps, 4: Spread(18_000_000, 17_000_000, 21_000_000, 50)}
    times = Times(profile, "whole", seed=3)
    drawn = sorted(times.step_ns(4) for _ in range(20_000))
    assert abs(statistics.median(drawn) - 18_000_000) < 60_000
    assert abs(drawn[2_000] - 17_000_000) < 100_000
    assert abs(drawn[18_000] - 21_000_000) < 150_000
