"""The dynamic program against brute force, its answer to infeasible plans, and the costs it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.decode_costs import DecodeCosts, chosen_chunking
from policies.planner import Planner
from synerdiff.core import PPM, InputError
from synerdiff.profile.tables import Profile
from tests.builders import MS, affine_profile, make_profile


def brute_force(
    profile: Profile,
    rows: int,
    eligible: Sequence[int],
    first: int,
    images: int,
    theta_ppm: int,
    credit_ns: int,
    skips: int,
    horizon: int,
    penalty_ns: int,
) -> int | None:
    """The least objective over every sequence of actions, straight from the formulas; None when none is feasible."""
    count = profile.chunk_count("cut")
    chunks = [*range(first, count)] + [*range(count)] * (images - 1)

    def step_ns(n: int) -> int:
        return profile.step_ns(n) + profile.overhead_ns("step_dispatch")

    def terms(n: int, chunk: int) -> tuple[int, int]:
        """(wall, progress) beside a step of n rows."""
        s_u, s_v = profile.slowdown_ppm(n, "cut", chunk)
        solo = profile.chunk_ns("cut", chunk) + profile.overhead_ns("chunk_dispatch")
        wall = (solo * s_v + PPM - 1) // PPM
        return wall, min(wall, wall * PPM // s_u)

    best: int | None = None

    def explore(j: int, done: int, spent: int, elapsed: int) -> None:
        nonlocal best
        if j == horizon:
            return
        for skip in (False, True):
            n = rows - (eligible[j] if skip and j < len(eligible) else 0)
            if skip and (n == rows or spent == skips or step_ns(n) >= step_ns(rows)):
                continue
            for m in range(len(chunks) - done + 1):
                parts = [terms(n, chunk) for chunk in chunks[done : done + m]]
                wall = sum(part[0] for part in parts)
                progress = sum(part[1] for part in parts)
                if progress <= step_ns(n):
                    duration = step_ns(n) + wall - progress
                elif m == 1:
                    duration = max(step_ns(n), wall)
                else:
                    continue
                then = elapsed + duration
                if (j + 1) * step_ns(rows) + credit_ns < Fraction(theta_ppm, PPM) * then:
                    continue
                if done + m == len(chunks):
                    objective = elapsed + wall + penalty_ns * (spent + skip)
                    best = objective if best is None else min(best, objective)
                else:
                    explore(j + 1, done + m, spent + skip, then)

    explore(0, 0, 0, 0)
    return best


ppm = st.integers(600_000, 4_000_000)


@st.composite
def instances(draw: Any) -> Any:
    rows = draw(st.integers(2, 10))
    count = draw(st.integers(1, 3))
    images = draw(st.integers(1, 2))
    horizon = draw(st.integers(1, 5 if count * images > 4 else 6))
    steps = {1: draw(st.integers(1, 120))}
    for n in (4, 7, 10):
        steps[n] = max(steps.values()) + draw(st.integers(0, 120))
    profile = make_profile(
        steps,
        {"whole": [9], "cut": draw(st.lists(st.integers(1, 200), min_size=count, max_size=count))},
        {1: (draw(ppm), draw(ppm)), 10: (draw(ppm), draw(ppm))},
        overheads={"step_dispatch": draw(st.integers(0, 9)), "chunk_dispatch": draw(st.integers(0, 9))},
        eager=draw(st.booleans()),
    )
    eligible = draw(st.lists(st.integers(0, rows // 2), max_size=horizon))
    return (
        profile,
        rows,
        eligible,
        draw(st.integers(0, count - 1)),
        images,
        draw(st.sampled_from((500_000, 750_000, 900_000, 970_000, 1_000_000))),
        draw(st.integers(-200, 200)),
        draw(st.integers(0, 4)),
        horizon,
        draw(st.sampled_from((0, 5, 50))),
    )


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(instances())
def test_the_plan_is_the_best_there_is(instance: Any) -> None:
    profile, rows, eligible, first, images, theta_ppm, credit_ns, skips, horizon, penalty_ns = instance
    planner = Planner(DecodeCosts(profile, "cut"), horizon, penalty_ns)
    plan = planner.plan(rows, eligible, first, images, theta_ppm, credit_ns, skips)
    expected = brute_force(*instance)
    assert (plan and plan.objective_ns) == expected
    if plan is None:
        return
    assert sum(chunks for chunks, _ in plan.actions) == profile.chunk_count("cut") * images - first
    assert plan.skips == sum(skip for _, skip in plan.actions) <= skips
    assert len(plan.actions) <= horizon
    for j, (_, skip) in enumerate(plan.actions):
        assert not skip or eligible[j] > 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(instances())
def test_all_chunks_at_once_is_known_without_planning(instance: Any) -> None:
    profile, rows, eligible, first, images, theta_ppm, credit_ns, skips, horizon, penalty_ns = instance
    planner = Planner(DecodeCosts(profile, "cut"), horizon, penalty_ns)
    at_once_ns = planner.at_once_ns(rows, first, images)
    step_ns = DecodeCosts(profile, "cut").step_ns(rows)
    if at_once_ns < 0 or (step_ns + credit_ns) * PPM < theta_ppm * at_once_ns:
        return
    plan = planner.plan(rows, eligible, first, images, theta_ppm, credit_ns, skips)
    assert plan is not None
    assert plan.actions == ((profile.chunk_count("cut") * images - first, False),)
    assert plan.elapsed_ns == at_once_ns


def test_chunks_wait_for_credit_and_skips_earn_it() -> None:
    """T = 42 ms at 16 rows, 26 at 8. A chunk takes 20 ms beside and costs 10; theta 0.9 earns 4.2 a step."""
    profile = make_profile(
        {8: 26 * MS, 16: 42 * MS},
        {"whole": [20 * MS], "cut": [10 * MS] * 2},
        {8: (2 * PPM, 2 * PPM), 16: (2 * PPM, 2 * PPM)},
    )
    planner = Planner(DecodeCosts(profile, "cut"), 8, 20 * MS)
    at_once = planner.plan(16, [], 0, 1, 500_000, 0, 0)
    assert at_once is not None
    assert (at_once.actions, at_once.objective_ns, at_once.elapsed_ns) == (((2, False),), 40 * MS, 62 * MS)
    patient = planner.plan(16, [], 0, 1, 900_000, 0, 0)
    assert patient is not None
    # A chunk costs 0.9 * 10 ms: after three steps 12.6 ms are there, after five 21.
    assert [chunks for chunks, _ in patient.actions] == [0, 0, 1, 0, 1]
    assert patient.objective_ns == (4 * 42 + 10 + 20) * MS
    relieved = planner.plan(16, [8] * 8, 0, 1, 900_000, 0, 4)
    assert relieved is not None
    assert relieved.actions == ((2, True),)
    assert relieved.objective_ns == (40 + 20) * MS
    dear = Planner(DecodeCosts(profile, "cut"), 8, 1_000 * MS).plan(16, [8] * 8, 0, 1, 900_000, 0, 4)
    assert dear is not None
    assert dear.actions == patient.actions
    assert planner.plan(16, [], 0, 1, 1_000_000, 0, 0) is None


def test_a_chunk_longer_than_a_step_is_priced_as_one_step_of_its_wall_time() -> None:
    profile = make_profile(
        {1: 10 * MS, 2: 10 * MS}, {"whole": [60 * MS], "cut": [60 * MS]}, {1: (2 * PPM, PPM), 2: (2 * PPM, PPM)}
    )
    planner = Planner(DecodeCosts(profile, "cut"), 8, 0)
    plan = planner.plan(2, [], 0, 1, 500_000, 0, 0)
    assert plan is not None
    # 4 idle steps of 10 ms and one of 60 ms: 5 * 10 >= 0.5 * 100.
    assert plan.actions == ((0, False),) * 4 + ((1, False),)
    assert (plan.objective_ns, plan.elapsed_ns) == (100 * MS, 100 * MS)


def test_costs_by_hand() -> None:
    """c = 9 + 1 ms; s_u = 1.25, s_v = 2: wall 20 ms, progress 16 ms, lost 4 ms."""
    profile = make_profile(
        {1: 5 * MS, 2: 8 * MS},
        {"whole": [9 * MS]},
        {1: (1_250_000, 2_000_000), 2: (3_000_000, 2_000_000)},
        overheads={"chunk_dispatch": MS, "step_dispatch": 2 * MS},
    )
    costs = DecodeCosts(profile, "whole")
    assert costs.step_ns(2) == 10 * MS
    assert [part[0] for part in costs.beside(1)] == [20 * MS, 16 * MS, 4 * MS]
    assert costs.overlap_pays(1, 0)
    assert not costs.overlap_pays(2, 0)


@pytest.mark.parametrize(("s_u", "s_v", "pays"), [(2_000_000, 2_000_000, True), (2_000_001, 2_000_000, False)])
def test_the_break_even_point_is_exact(s_u: int, s_v: int, pays: bool) -> None:
    """1/s_u + 1/s_v = 1 to the last digit, whatever the chunk's length."""
    for solo in (1, 3, 7_000_001):
        profile = make_profile({1: 5, 2: 9}, {"whole": [solo]}, {1: (s_u, s_v), 2: (s_u, s_v)})
        costs = DecodeCosts(profile, "whole")
        assert costs.overlap_pays(1, 0) is costs.overlap_pays(2, 0) is pays


def test_lost_time_is_never_negative() -> None:
    profile = make_profile({1: 50, 2: 90}, {"whole": [30]}, {1: (700_000, 900_000), 2: (700_000, 900_000)})
    assert DecodeCosts(profile, "whole").beside(1).lost == (0,)


def test_default_chunking() -> None:
    assert chosen_chunking(None, affine_profile()) == "c4"
    assert chosen_chunking(None, make_profile({1: 1, 2: 2}, {"whole": [1]})) == "whole"
    assert chosen_chunking("whole", affine_profile()) == "whole"
    with pytest.raises(InputError, match="profile 'test' has no chunking 'c9'; it has whole, c4"):
        chosen_chunking("c9", affine_profile())
