"""On lanes that keep exactly to a profile's times, the hardware engine makes the simulator's run to the nanosecond."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import POLICIES, build_policy
from simulator import simulate
from synerdiff.core import REUSE, ContractError, Decision, Request, SkipBudget, View, WorkerInfo
from synerdiff.profile.tables import Profile
from tests.builders import make_profile, requests_at
from tests.exact_lanes import rehearse
from tests.strategies import Whim


def uncontended(overheads: Any = None) -> Profile:
    return make_profile(
        {1: 100, 2: 130, 4: 200, 8: 350, 16: 600}, {"whole": [170], "c3": [50, 70, 50]}, overheads=overheads
    )


REQUESTS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1.0, 7.5])),
    min_size=1,
    max_size=12,
)


def trace_of(drawn: Any) -> list[Request]:
    requests, arrival_ns = [], 0
    for index, (gap_ns, steps, images, guidance) in enumerate(drawn):
        arrival_ns += gap_ns
        requests.append(Request(index, arrival_ns, steps, images, guidance))
    return requests


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    drawn=REQUESTS,
    seed=st.integers(0, 10_000),
    lanes=st.integers(1, 3),
    lead_ns=st.sampled_from([0, 0, 20, 90, 5_000]),
    chunking=st.sampled_from(["whole", "c3"]),
)
def test_whatever_a_policy_does_both_engines_make_the_same_run(
    drawn: Any, seed: int, lanes: Any, lead_ns: Any, chunking: str
) -> None:
    requests = trace_of(drawn)
    profile = uncontended({"decision_lead": lead_ns})
    budget = SkipBudget(500_000, 1, 1, REUSE)
    simulated_policy, real_policy = Whim(seed, chunking), Whim(seed, chunking)
    simulated = simulate(requests, simulated_policy, profile, decode_gpus=(0,) * lanes, budget=budget)
    real = rehearse(requests, real_policy, profile, lanes, budget)
    assert real.error is None
    assert real_policy.asked == simulated_policy.asked
    assert real.result.work == simulated.work
    assert real.result.requests == simulated.requests
    assert real.result.decisions == simulated.decisions


@pytest.mark.parametrize("lead_ns", [0, 40])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_makes_the_same_run_on_both_engines(name: str, lead_ns: int) -> None:
    requests = trace_of([(60 + 37 * i % 90, 2 + i % 3, 1 + i % 2, 1.0 if i % 5 == 4 else 7.5) for i in range(40)])
    profile = uncontended({"decision_lead": lead_ns})
    parameters = {"chunking": "c3"} if "chunking" in [p.name for p in getattr(POLICIES[name], "PARAMETERS", ())] else {}
    budget = SkipBudget(400_000, 1, 1, REUSE)
    simulated = simulate(requests, build_policy(name, parameters), profile, budget=budget)
    real = rehearse(requests, build_policy(name, parameters), profile, 1, budget)
    assert real.error is None
    assert real.result.work == simulated.work
    assert real.result.requests == simulated.requests


def test_a_broken_contract_ends_the_run_and_keeps_what_was_finished() -> None:
    class Sleepy:
        chunking = "whole"
        inner = build_policy("continuous-serial")

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.inner.reset(worker, profile)

        def decide(self, view: View) -> Any:
            return self.inner.decide(view) if view.now_ns < 1000 else Decision()

    real = rehearse(requests_at(0, 0.01), Sleepy(), uncontended())
    assert isinstance(real.error, ContractError)
    assert "nothing can arrive and no wake is set" in str(real.error)
    assert [record.status for record in real.result.requests] == ["done", "unfinished"]


def test_a_stopped_run_keeps_what_was_finished() -> None:
    stop = threading.Event()

    class Stopper:
        chunking = "whole"
        inner = build_policy("continuous-serial")

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.inner.reset(worker, profile)

        def decide(self, view: View) -> Any:
            if view.now_ns >= 2000:
                stop.set()
            return self.inner.decide(view)

    real = rehearse(requests_at(0, 0.001, 0.002, 0.005), Stopper(), uncontended(), stop=stop)
    assert real.error is None
    assert [record.status for record in real.result.requests] == ["done", "done", "unfinished", "unfinished"]
    assert [(fault.kind, fault.detail) for fault in real.faults] == [("stopped", "2 of 4 samples had not ended")]
    last = max(record.end_ns for record in real.result.work)
    assert last == real.result.end_ns, "what ran when it was stopped is finished and recorded"
