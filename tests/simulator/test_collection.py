"""Garbage collection is as before after a simulation, whatever it was and however it ended."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from policies.registry import build_policy
from simulator import simulate
from simulator.engine import ALLOCATIONS
from synerdiff.core import ContractError, Decision, View, WorkerInfo
from synerdiff.profile.tables import Profile
from tests.builders import affine_profile, requests_at


class Watching:
    """Serves as continuous-serial does, and notes the threshold in force; at the end it may break the contract."""

    def __init__(self, breaks: bool) -> None:
        self.inner = build_policy("continuous-serial")
        self.chunking = self.inner.chunking
        self.breaks = breaks
        self.seen: set[int] = set()

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.inner.reset(worker, profile)

    def decide(self, view: View) -> Any:
        self.seen.add(gc.get_threshold()[0])
        return Decision(admit=(99,)) if self.breaks else self.inner.decide(view)


@pytest.mark.parametrize(("before", "during"), [(700, ALLOCATIONS), (0, 0), (ALLOCATIONS + 1, ALLOCATIONS + 1)])
def test_collections_are_rare_during_a_simulation_and_as_before_afterwards(before: Any, during: Any) -> None:
    """A threshold of 0 (collection switched off) or above is the caller's and stays."""
    kept = gc.get_threshold()
    gc.set_threshold(before, 11, 12)
    try:
        for breaks in (False, True):
            policy = Watching(breaks)
            if breaks:
                with pytest.raises(ContractError):
                    simulate(requests_at(0), policy, affine_profile())
            else:
                simulate(requests_at(0), policy, affine_profile())
            assert policy.seen == {during}
            assert gc.get_threshold() == (before, 11, 12)
    finally:
        gc.set_threshold(*kept)
