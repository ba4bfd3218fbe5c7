"""The contract's cases run on both engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pytest

from policies.base import Policy
from simulator import simulate
from synerdiff.core import NO_SKIPS, Request, RunResult, SkipBudget
from synerdiff.profile.tables import Profile
from tests.exact_lanes import rehearse


class Play(Protocol):
    """Plays a trace on one engine; raises what ended the run early."""

    def __call__(
        self, requests: Sequence[Request], policy: Policy, profile: Profile, lanes: int = 1, budget: SkipBudget = ...
    ) -> RunResult: ...


def simulated(
    requests: Sequence[Request], policy: Policy, profile: Profile, lanes: int = 1, budget: SkipBudget = NO_SKIPS
) -> RunResult:
    return simulate(requests, policy, profile, decode_gpus=(0,) * lanes, budget=budget)


def run(
    requests: Sequence[Request], policy: Policy, profile: Profile, lanes: int = 1, budget: SkipBudget = NO_SKIPS
) -> RunResult:
    real = rehearse(requests, policy, profile, lanes, budget)
    if real.error is not None:
        raise real.error
    return real.result


@pytest.fixture(params=[simulated, run], ids=["simulator", "real_runner"])
def play(request: pytest.FixtureRequest) -> Play:
    """Each engine in turn; the runner's lanes keep exactly to the profile's times."""
    engine: Play = request.param
    return engine
