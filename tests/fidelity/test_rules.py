"""Skip schedules, their equal-cost baselines, and the exact choice of steps from a calibration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synerdiff.core import CONDITIONAL, REUSE
from synerdiff.diffusion.solvers import Coefficients
from synerdiff.fidelity.calibration import choose_skips, end_gains
from synerdiff.fidelity.rules import (
    adaptive,
    calibrated,
    equal_cost_baselines,
    first,
    full,
    last,
    random_half,
    rules_to_judge,
    skips_to_calibrate,
    spread,
)


def drawn(rule: Any) -> str:
    letters = {REUSE: "r", CONDITIONAL: "c"}
    return "".join(letters[rule.mode] if step in rule.skipped else "G" for step in range(rule.run_steps))


@pytest.mark.parametrize(
    ("rule", "picture", "rows"),
    [
        (spread(25, 12), "GrGrGrGrGrGrGrGrGrGrGrGrG", 38),
        (spread(25, 16), "GrrGrrGrrGrrGrrGrrGrrGrrG", 34),
        (spread(25, 18), "GrrrGrrrGrrrGrrrGrrrGrrrG", 32),
        (spread(25, 16, warmup_steps=3), "GGGGrrrGrrrGrrrrGrrrGrrrG", 34),
        (spread(9, 4, mode=CONDITIONAL), "GcGcGcGcG", 14),
        (spread(5, 4), "Grrrr", 6),
        (last(5, 2, CONDITIONAL), "GGGcc", 8),
        (last(5, 2, REUSE), "GGGrr", 8),
        (last(3, 3, CONDITIONAL), "ccc", 3),
        (first(5, 2), "ccGGG", 8),
        (calibrated(6, (1, 3, 4)), "GrGrrG", 9),
        (full(4), "GGGG", 8),
    ],
)
def test_schedules(rule: Any, picture: str, rows: int) -> None:
    assert drawn(rule) == picture
    assert rule.rows == rows


@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(0, n - 1))))
def test_a_spread_schedule_keeps_its_promises(case: Any) -> None:
    steps, skips, warmup_steps = case
    if skips + warmup_steps >= steps:
        with pytest.raises(ValueError, match="cannot be skipped"):
            spread(steps, skips, warmup_steps)
        return
    rule = spread(steps, skips, warmup_steps)
    assert len(rule.skipped) == skips
    assert not rule.skipped & set(range(max(1, warmup_steps)))
    guided = sorted(set(range(warmup_steps, steps)) - rule.skipped)
    gaps = [b - a for a, b in itertools.pairwise(guided)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("part", ["all", "core"])
@pytest.mark.parametrize("steps", [5, 8, 13, 25, 50])
def test_rules_to_judge_differ_and_can_run(part: str, steps: int) -> None:
    rules = rules_to_judge(steps, part)
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.run_steps == steps
        assert rule.mode is not REUSE or 0 not in rule.skipped
    names = {rule.schedule for rule in rules}
    assert names == ({"spread", "last"} if part == "core" else {"spread", "last", "first", "adaptive", "random-half"})
    assert all(0 < skips < steps for skips in skips_to_calibrate(rules))
    against = equal_cost_baselines(steps, rules, (0.4,))
    assert all(baseline.run_steps < steps and not baseline.skipped for baseline in against)
    costs = {baseline.rows for baseline in against}
    # The baseline of a rule never costs more, and at most one row less.
    assert all({rule.rows, rule.rows - 1} & costs for rule in rules if not rule.varies)


def test_a_random_half_differs_by_image_and_stays_within_the_rule() -> None:
    rule = random_half(spread(25, 16))
    own = [rule.own_skips(seed) for seed in range(200)]
    assert own == [rule.own_skips(seed) for seed in range(200)]
    assert len(set(own)) > 150
    assert all(skips <= rule.skipped for skips in own)
    assert 7 < sum(map(len, own)) / 200 < 9
    assert rule.varies
    assert adaptive(25, 0.99).varies
    assert not full(25).varies


@given(st.integers(2, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.randoms())))
def test_the_chosen_steps_cost_least_of_all_choices(case: Any) -> None:
    steps, skips, draw = case
    cost = np.array([[draw.randint(0, 40) if run else 0 for run in range(steps)] for _ in range(steps)], float)

    def total(skipped: Any) -> float:
        guided = [step for step in range(steps) if step not in skipped]
        return sum(cost[a][b - a - 1] for a, b in itertools.pairwise([*guided, steps]))  # type: ignore[no-any-return]

    chosen = choose_skips(cost, skips)
    assert len(chosen) == skips
    assert 0 not in chosen
    assert total(chosen) == min(total(other) for other in itertools.combinations(range(1, steps), skips))


def test_all_steps_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match="4 of 4 steps"):
        choose_skips(np.zeros((4, 4)), 4)


def test_an_error_at_the_end_is_what_the_solver_makes_of_it() -> None:
    """One step before the end the gain is the noise's coefficient; earlier a multistep solver adds the x0 it keeps."""
    table = [
        Coefficients(0.5, 9, 2.0, 9, -3.0, 0.0),
        Coefficients(0.25, 9, 1.0, 9, -5.0, 0.5),
        Coefficients(1, 9, 1, 9, -7.0, 0.1),
    ]
    assert end_gains(table) == pytest.approx([-3.0 * 0.25 + 0.5 * 2.0 * 1.0, -5.0 + 0.1 * 1.0, -7.0])
