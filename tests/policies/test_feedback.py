"""The controller: direction, dead band, clamps, anti-windup, and the threshold that decodes can sustain."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from policies.feedback import ThetaController
from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import PPM, SkipBudget
from tests.builders import affine_profile, requests_at

LOW, HIGH, GAIN = 750_000, 970_000, 50_000


def controller() -> ThetaController:
    return ThetaController(LOW, HIGH, GAIN, GAIN)


def settle(control: ThetaController, waiting: int, steps: int, sustainable: int = PPM) -> int:
    for _ in range(steps):
        control.update(waiting, 8, sustainable)
    return control.theta_ppm


def test_a_long_queue_raises_theta_and_a_short_one_lowers_it() -> None:
    start = controller().theta_ppm
    assert start == (LOW + HIGH) // 2
    assert settle(controller(), 20, 30) > start
    assert settle(controller(), 0, 5) < start


def test_theta_rises_with_every_step_of_a_long_queue() -> None:
    control = controller()
    settle(control, 20, 20)
    seen = [settle(control, 20, 1) for _ in range(3)]
    assert seen == sorted(seen)


def test_the_dead_band_keeps_theta() -> None:
    """2 to 6 waiting samples are 0.25 to 0.75 batches of 8."""
    for waiting in (2, 4, 6):
        control = controller()
        control._queue = waiting * PPM
        assert settle(control, waiting, 50) == (LOW + HIGH) // 2


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(10_000, PPM)), max_size=200))
def test_theta_stays_within_its_bounds(updates: Any) -> None:
    control = controller()
    for waiting, sustainable in updates:
        theta = control.update(waiting, 8, sustainable)
        assert theta <= min(HIGH, sustainable)
        assert theta >= min(LOW, sustainable)


def test_it_reaches_both_bounds() -> None:
    assert settle(controller(), 100, 200) == HIGH
    assert settle(controller(), 0, 400) == LOW


def test_it_does_not_wind_up() -> None:
    """However long the queue was long, theta comes down as fast."""
    briefly, long = controller(), controller()
    settle(briefly, 17, 300)
    settle(long, 100, 5_000)
    assert briefly.theta_ppm == long.theta_ppm == HIGH
    falls = [[settle(control, 0, 1) for _ in range(40)] for control in (briefly, long)]
    assert falls[0] == falls[1]
    assert falls[0][-1] < HIGH


def test_it_does_not_wind_up_below_what_is_sustainable() -> None:
    """While decodes hold theta down, a long queue stores nothing: with them gone it starts from where it was."""
    control = ThetaController(LOW, HIGH, 10_000, 10_000)
    settle(control, 100, 1_000, sustainable=600_000)
    assert control.theta_ppm == 600_000
    # The error is 1.25 batches: once in proportion, and once in the integral.
    assert settle(control, 100, 1) <= (LOW + HIGH) // 2 + 2 * 12_500


def test_policy_never_asks_for_more_than_decodes_can_sustain() -> None:
    """T(4) = 18 ms, one decode beside costs 30 * 2 * (1 - 1/2) = 30 ms: 2 steps of 9 ms a sample sustain 18/48."""
    profile = affine_profile(slowdowns={1: (2 * PPM, 2 * PPM), 32: (2 * PPM, 2 * PPM)})
    policy: Any = build_policy("synerdiff-feedback", {"batch": 2, "trail": 1_000, "chunking": "whole"})
    simulate(requests_at(*[0] * 40, steps=2), policy, profile, budget=SkipBudget(300_000))
    assert len(policy.trail) > 20
    assert max(theta for _, theta, _ in policy.trail) == 375_000
    assert all(theta <= 375_000 for _, theta, _ in policy.trail[:-2])


def test_the_trail_is_as_long_as_asked_for() -> None:
    profile = affine_profile()
    for size in (0, 3):
        policy: Any = build_policy("synerdiff-feedback", {"trail": size})
        simulate(requests_at(0, 5, 9, steps=4), policy, profile)
        assert len(policy.trail) == size
    assert policy.trail[0] == (0, policy.trail[0][1], 1)
