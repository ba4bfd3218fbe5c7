"""Several batch keys (contract, rule 16): whose turn it is, hand-computed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import InputError, Request, SkipBudget
from tests.builders import make_profile
from tests.simulator.test_reference import assert_engines_agree
from tests.simulator.test_resolutions import LARGE, SMALL, at, sized, sized_profiles
from tests.strategies import budgets

PLAIN = make_profile({2: 100, 4: 150, 8: 240}, {"whole": [10]})
TURNING = ("continuous-serial", "continuous-parallel", "chunked", "auto", "skip-cfg")


def ask(request_id: int, key: str, steps: int, arrival_ns: int = 0, **fields: Any) -> Request:
    return Request(request_id, arrival_ns, steps, base_model=key, **fields)


def steps_of(requests: Any, turn: str, profile: Any = PLAIN, **parameters: Any) -> list[tuple[int, tuple[int, ...]]]:
    """(start, samples) of every step."""
    policy = build_policy("continuous-serial", {"turn": turn, **parameters})
    work = simulate(requests, policy, profile).work
    return [(record.start_ns, record.samples) for record in work if record.kind == "step"]


def test_oldest_serves_one_key_to_its_end() -> None:
    requests = [ask(0, "a", 2), ask(1, "b", 1), ask(2, "a", 2)]
    # Sample 2 does not overtake 1; decodes of 10 between.
    assert steps_of(requests, "oldest") == [(0, (0,)), (100, (0,)), (210, (1,)), (320, (2,)), (420, (2,))]


def test_drr_visits_in_turn_and_deducts_what_a_step_takes() -> None:
    # Full batch of 2: 4 rows, 150. a alone takes 100 a step, b with two samples 150.
    requests = [ask(0, "a", 3), ask(1, "b", 2), ask(2, "b", 2)]
    assert steps_of(requests, "drr", batch=2) == [
        (0, (0,)),  # a: 150 - 100 = 50, not enough for the next
        (100, (1, 2)),  # b: 150 - 150 = 0
        (250, (0,)),  # a: 50 + 150 - 100 = 100,
        (350, (0,)),  # enough for one more: 0, and its end
        (460, (1, 2)),  # b alone is left: 0 + 150 - 150
    ]


def test_a_key_that_returns_joins_last_with_nothing() -> None:
    # a ends at 100 and has nobody while its decode runs, to 110; it returns at 105, behind b and c.
    requests = [ask(0, "a", 1), ask(1, "b", 2), ask(2, "c", 2), ask(3, "a", 1, arrival_ns=105)]
    assert steps_of(requests, "drr", batch=1) == [
        (0, (0,)),
        (110, (1,)),
        (210, (2,)),
        (310, (3,)),
        (420, (1,)),
        (530, (2,)),
    ]


def test_srtf_takes_the_key_with_the_least_work_to_its_nearest_end() -> None:
    # a: 3 steps at 2 rows, 300. b: nearest end 1 step at 4 rows, 150. c: 2 steps at 2 rows, 200.
    requests = [ask(0, "a", 3), ask(1, "b", 1), ask(2, "b", 4), ask(3, "c", 2)]
    assert steps_of(requests, "srtf", batch=2)[:4] == [
        (0, (1, 2)),
        (160, (3,)),  # b: 3 steps at 2 rows, 300; c: 200
        (260, (3,)),
        (370, (0,)),  # a and b: 300 both; a entered earlier
    ]


def test_srtf_lets_nobody_wait_longer_than_stated() -> None:
    # b has 1 step and another after it always; a has waited 300 ns at 330 and goes first.
    requests = [ask(0, "a", 5), *(ask(1 + i, "b", 1, arrival_ns=100 * i) for i in range(6))]
    taken = steps_of(requests, "srtf", batch=1, turn_max_wait_s=300e-9)
    assert taken[:5] == [(0, (1,)), (110, (2,)), (220, (3,)), (330, (0,)), (430, (4,))]


def test_keys_of_several_resolutions_have_their_own_times_and_batches() -> None:
    small = make_profile({2: 100, 4: 150}, {"whole": [10]})
    large = make_profile({2: 400}, {"whole": [20]})
    profile = sized(small, large)
    requests = [at(0, 0, LARGE, 2), at(1, 0, LARGE, 2), at(2, 0, SMALL, 4), at(3, 0, SMALL, 4)]
    # A visit adds 400, the largest full step. Large has room for one sample; small takes 150 a step, so two a visit.
    assert steps_of(requests, "drr", profile) == [
        (0, (0,)),
        (400, (2, 3)),
        (550, (2, 3)),
        (700, (0,)),  # 0 + 400; its end, decode of 20
        (1120, (2, 3)),  # 100 + 400 - 150
        (1270, (2, 3)),  # 350 - 150; their end, two decodes of 10
        (1440, (1,)),
        (1840, (1,)),
    ]


@pytest.mark.parametrize("turn", ["drr", "srtf"])
@pytest.mark.parametrize("name", TURNING)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    drawn=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4), st.sampled_from("aab")), min_size=1, max_size=8),
    profile=sized_profiles(),
    budget=budgets,
    most=st.sampled_from((None, None, 3)),
)
def test_engines_agree_whoever_has_the_turn(
    turn: str, name: str, drawn: Any, profile: Any, budget: SkipBudget, most: int | None
) -> None:
    requests, now_ns = [], 0
    for index, (gap_ns, steps, key) in enumerate(drawn):
        now_ns += gap_ns
        requests.append(at(index, now_ns, SMALL, steps, base_model=key))
    parameters: dict[str, Any] = {"turn": turn, "turn_max_wait_s": 4e-7}
    parameters |= {"chunking": "whole"} if name == "chunked" else {}
    policy = build_policy(name, parameters)
    assert_engines_agree(requests, policy, profile.only(SMALL), (0,), budget, most)


@pytest.mark.parametrize("name", ["continuous-serial", "continuous-parallel", "auto"])
@pytest.mark.parametrize("turn", ["oldest", "drr", "srtf"])
def test_everyone_is_served_in_the_end(name: str, turn: str) -> None:
    cells = {2: (1_200_000, 1_500_000)}
    profile = sized(PLAIN, make_profile({2: 300}, {"whole": [30]}, cells))
    requests = [at(i, 90 * i, LARGE if i % 3 == 0 else SMALL, 2 + i % 4) for i in range(60)]
    result = simulate(requests, build_policy(name, {"turn": turn}), profile)
    assert {record.status for record in result.requests} == {"done"}


def test_an_unknown_turn_is_refused() -> None:
    with pytest.raises(InputError, match="turn is 'mine'; allowed is one of oldest, drr, srtf"):
        build_policy("auto", {"turn": "mine"})
