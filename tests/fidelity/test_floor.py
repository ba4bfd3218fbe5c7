"""From a floor on fidelity to a skip budget, and from a run's modes to its fidelity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import CONDITIONAL, NO_SKIPS, REUSE, InputError, Request, Sample, SkipBudget
from synerdiff.fidelity.floor import budget_from_floor, floor_for_requests, image_ssim, run_ssim
from synerdiff.fidelity.table import FidelityTable
from synerdiff.profile.tables import Head
from tests.builders import affine_profile, requests_at
from tests.fidelity.test_table import HEAD, fewer_steps, score

ROWS = (
    score((1, 3), 0.99),
    score((1, 2, 4), 0.97),
    score((1, 2, 3, 4, 5), 0.90),
    score((4, 5), 0.985, CONDITIONAL),
    score(None, 0.999, CONDITIONAL, schedule="adaptive", rows=7.0),
    fewer_steps(5, 0.98),
    fewer_steps(4, 0.972),
    fewer_steps(3, 0.95),
    score((1, 3), 0.96, scale=7.5),
    score((1, 2, 4), 0.975, scale=7.5),
    score((2, 4), 0.98, steps=8),
    score((1, 2, 4), 0.96, steps=8, mode=CONDITIONAL),
    score((1, 2, 3, 4, 5), 0.9999, solver="EulerDiscreteScheduler"),
    score((1, 2, 3, 4), 0.9999, solver="EulerDiscreteScheduler", steps=12),
)
TABLE = FidelityTable(Path("table"), HEAD, ROWS)


def chosen(min_ssim: float, *kinds: tuple[int, float], table: FidelityTable = TABLE) -> Any:
    return budget_from_floor(table, min_ssim, kinds, "digits", 32)


@pytest.mark.parametrize(
    ("min_ssim", "skipped"),
    [(0.98, {1, 3}), (0.985, {1, 3}), (0.9651, None), (0.965, {1, 2, 4}), (0.9, {1, 2, 4}), (0.895, {1, 2, 3, 4, 5})],
)
def test_the_cheapest_rule_whose_lower_bound_reaches_the_floor(min_ssim: float, skipped: set[int] | None) -> None:
    """The interval reaches 0.005 below each mean."""
    budget = chosen(min_ssim, (6, 4.0)).budget
    if skipped is None:
        skipped = {1, 3}
    assert budget.eligible_steps == {6: frozenset(skipped)}
    assert budget.mode is REUSE
    assert budget.skips(6) == len(skipped)


def test_a_budget_allows_the_rules_steps_and_no_others() -> None:
    budget = chosen(0.965, (6, 4.0)).budget
    assert (budget.warmup_steps, budget.longest_run, budget.fraction_ppm) == (1, 2, 500_000)
    sample = Sample(0, Request(0, 0, 6, guidance_scale=4.0), 0, 0, budget)
    sample.had_guided_step = True
    letters = []
    for step in range(6):
        sample.step_index = step
        skip = sample.skip_mode
        letters.append("g" if skip is None else "r")
        sample.skips_left -= skip is not None
        sample.skip_run = sample.skip_run + 1 if skip else 0
    assert "".join(letters) == "grrgrg"


def test_engines_skip_exactly_those_steps() -> None:
    budget = chosen(0.965, (6, 4.0), (8, 4.0)).budget
    requests = requests_at(0, 0, 0, steps=6, guidance_scale=4.0)
    requests.append(replace(requests[0], request_id=3, steps=8))
    policy = build_policy("load-skip", {"skip_queue": 0})
    result = simulate(requests, policy, affine_profile(), budget=budget)
    assert [record.modes for record in result.requests] == [("grrgrg",)] * 3 + [("ggrgrggg",)]
    table_ssim = run_ssim(TABLE, [(modes, 4.0, len(modes)) for record in result.requests for modes in record.modes])
    assert table_ssim == pytest.approx((3 * 0.97 + 0.98) / 4)


def test_every_guidance_scale_asked_for_must_reach_the_floor() -> None:
    assert chosen(0.966, (6, 7.5)).budget.eligible_steps == {6: {1, 2, 4}}
    both = chosen(0.965, (6, 4.0), (6, 7.5))
    assert both.budget.eligible_steps == {6: {1, 2, 4}}
    assert both.rules[6].ssim == 0.97
    with pytest.raises(InputError, match=r"no rule for 6 steps reaches an SSIM of 0\.98 .*; the best reaches 0\.9650"):
        chosen(0.98, (6, 4.0), (6, 7.5))


def test_step_counts_share_the_mode_that_costs_less() -> None:
    both = chosen(0.95, (6, 4.0), (8, 4.0))
    assert both.budget.mode is REUSE
    assert both.budget.eligible_steps == {6: {1, 2, 4}, 8: {2, 4}}
    assert [both.budget.skips(steps) >= len(found) for steps, found in both.budget.eligible_steps.items()] == [True] * 2
    assert chosen(0.95, (8, 4.0)).budget.mode is CONDITIONAL
    apart = FidelityTable(Path("table"), HEAD, (score(), score((2,), mode=CONDITIONAL, steps=8)))
    with pytest.raises(InputError, match=r"no single skip mode reaches an SSIM of 0\.9 at every step count"):
        chosen(0.9, (6, 4.0), (8, 4.0), table=apart)


def test_fewer_steps_that_are_cheaper_are_named() -> None:
    choice = chosen(0.965, (6, 4.0))
    assert choice.fewer_steps[6].run_steps == 4
    assert "4 steps with full guidance would do with 67%" in choice.lines()[0]
    assert chosen(0.979, (6, 4.0)).fewer_steps == {}


def test_unguided_requests_need_nothing() -> None:
    assert chosen(0.97, (4, 1.0), (60, 0.0)).budget == NO_SKIPS
    assert chosen(0.97, (4, 1.0), (6, 4.0)).budget.eligible_steps == {6: {1, 3}}


@pytest.mark.parametrize(
    ("min_ssim", "kind", "model", "resolution", "message"),
    [
        (1.0, (6, 4.0), "digits", 32, "the fidelity floor is 1; an SSIM above 0 and below 1 is needed"),
        (float("nan"), (6, 4.0), "digits", 32, "the fidelity floor is nan"),
        (0.97, (6, 4.0), "sdxl", 32, "this fidelity table is of model 'digits'; the profile is of 'sdxl'"),
        (0.97, (6, 4.0), "digits", [64, 32], "is for 32x32 pixels; the profile is for 64x32"),
        (0.97, (7, 4.0), "digits", 32, "does not cover 7 steps at guidance scale 4 with DDIMScheduler; it has 6 steps"),
        (0.97, (6, 5.0), "digits", 32, "does not cover 6 steps at guidance scale 5 with DDIMScheduler"),
        (0.97, (12, 4.0), "digits", 32, "it has 6 steps at guidance 4 and 7.5; 8 steps at guidance 4."),
        (0.999, (6, 4.0), "digits", 32, "no rule for 6 steps reaches an SSIM of 0.999"),
    ],
)
def test_what_the_table_cannot_say_is_an_error(
    min_ssim: Any, kind: Any, model: str, resolution: list[int] | int, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        budget_from_floor(TABLE, min_ssim, [kind], model, resolution)
    assert message in str(caught.value)


def test_the_solver_that_runs_decides_which_rows_count() -> None:
    euler = budget_from_floor(TABLE, 0.99, [(6, 4.0)], "digits", 32, "EulerDiscreteScheduler")
    assert euler.budget.eligible_steps == {6: {1, 2, 3, 4, 5}}  # type: ignore[comparison-overlap]
    with pytest.raises(InputError, match="with DEISMultistepScheduler; it has nothing with that solver"):
        budget_from_floor(TABLE, 0.99, [(6, 4.0)], "digits", 32, "DEISMultistepScheduler")


def test_requests_on_a_profile(tmp_path: Path) -> None:
    profile = affine_profile()
    profile.head = Head(model="digits", resolutions=((32, 32),))
    from synerdiff.fidelity.table import write_fidelity

    write_fidelity(tmp_path, HEAD, ROWS)
    requests = requests_at(0, 1, steps=6, guidance_scale=4.0)
    assert floor_for_requests(0.98, requests, profile, tmp_path).budget.eligible_steps == {6: {1, 3}}  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("modes", "scale", "steps", "expected"),
    [
        ("gggggg", 4.0, None, 1.0),
        ("grgrgg", 4.0, None, 0.99),
        ("grgggg", 4.0, None, 0.99),  # part of a rule: at least that rule
        ("ggrggg", 4.0, None, 0.97),
        ("grrrgg", 4.0, None, 0.90),
        ("ggggcg", 4.0, None, 0.985),
        ("gggg", 4.0, 6, 0.972),
        ("cccccc", 1.0, None, 1.0),  # unguided: nothing is skipped
    ],
)
def test_the_fidelity_of_an_image(modes: str, scale: float, steps: int | None, expected: float) -> None:
    assert image_ssim(TABLE, modes, scale, steps) == expected


@pytest.mark.parametrize("modes", ["gccggg", "grgrcc", "cgggggg", "ggggg" * 3])
def test_images_that_no_rule_covers(modes: str) -> None:
    with pytest.raises(InputError, match="the table has no rule that covers"):
        image_ssim(TABLE, modes, 4.0, 6)


def test_the_fidelity_of_a_run() -> None:
    assert run_ssim(TABLE, [("gggggg;grgrgg", 4.0, 6), ("gggg", 4.0, 6), ("", 4.0, 6)]) == pytest.approx(
        (1 + 0.99 + 0.972) / 3
    )
    with pytest.raises(InputError, match="no images"):
        run_ssim(TABLE, [("", 4.0, 6)])
    assert SkipBudget() == NO_SKIPS
