"""The SimPy engine agrees exactly with the plain loop, on random traces, profiles and policies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import POLICIES, build_policy
from simulator import simulate
from synerdiff.core import SkipBudget
from synerdiff.profile.tables import Profile
from tests.reference_engine import reference_simulate
from tests.strategies import Whim, budgets, profiles, traces

HOST = (0, 0, 3, 90)
"""sample_host, ns."""


def assert_engines_agree(
    requests: Any, policy: Any, profile: Profile, gpus: Any, budget: SkipBudget, most: int | None = None
) -> None:
    expected_work, expected_stages, _, *sent = reference_simulate(requests, policy, profile, gpus, budget, most)
    asked = list(getattr(policy, "asked", []))
    result = simulate(requests, policy, profile, decode_gpus=gpus, budget=budget, max_concurrency=most)
    if most is not None:
        assert {record.request.request_id: record.request.arrival_ns for record in result.requests} == sent[0]
        assert [record.request.intended_ns for record in result.requests] == [r.arrival_ns for r in requests]
    assert [tuple(record) for record in result.work] == expected_work
    assert asked == list(getattr(policy, "asked", []))
    for request, record in zip(requests, result.requests, strict=True):
        images = [expected_stages[f"{request.request_id}.{i}"] for i in range(request.images)]
        assert record.modes == tuple(image[4] for image in images)
        if all(image[5] == "done" for image in images):
            assert record.status == "done"
            last = max(range(request.images), key=lambda i: (images[i][3], i))
            assert images[last][:4] == tuple(record[1:5])
        else:
            assert record.status == "rejected"
            assert record.finished_ns == -1


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    traces(),
    profiles(HOST),
    st.sampled_from(("whole", "cut")),
    st.integers(0, 10**6),
    st.sampled_from(((0,), (0, 0), (1,), (0, 1))),
    budgets,
)
def test_engines_agree_on_any_legal_policy(
    requests: Any, profile: Profile, chunking: str, seed: int, gpus: Any, budget: SkipBudget
) -> None:
    assert_engines_agree(requests, Whim(seed, chunking), profile, gpus, budget)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), profiles(), st.integers(0, 10**6), st.sampled_from(((0,), (0, 0), (0, 1))), budgets, st.integers(1, 4))
def test_engines_agree_in_a_closed_loop(
    requests: Any, profile: Profile, seed: int, gpus: Any, budget: SkipBudget, most: int
) -> None:
    assert_engines_agree(requests, Whim(seed, "cut"), profile, gpus, budget, most)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), profiles(), st.sampled_from(((0,), (0, 0))), st.integers(1, 4))
def test_engines_agree_on_every_policy_in_a_closed_loop(
    name: str, requests: Any, profile: Profile, gpus: Any, most: int
) -> None:
    assert_engines_agree(requests, build_policy(name), profile, gpus, SkipBudget(), most)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces(), profiles(HOST), st.sampled_from(((0,), (0, 0), (1,))), budgets)
def test_engines_agree_on_every_registered_policy(
    name: str, requests: Any, profile: Profile, gpus: Any, budget: SkipBudget
) -> None:
    assert_engines_agree(requests, build_policy(name), profile, gpus, budget)
