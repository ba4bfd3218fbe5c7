"""What SynerDiff launches, told from the records: the threshold is kept, and what breaks it is marked as forced."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.registry import build_policy
from policies.synerdiff import SynerDiff
from simulator import simulate
from synerdiff.core import PPM, Request, RunResult, SkipBudget
from synerdiff.profile.tables import Profile
from tests.builders import MS, affine_profile, make_profile, requests_at

BETWEEN = {1: (1_200_000, 1_300_000), 32: (1_800_000, 1_900_000)}


def steps_of(result: RunResult) -> list[Any]:
    return [w for w in result.work if w.kind == "step"]


def chunks_of(result: RunResult) -> list[Any]:
    return [w for w in result.work if w.kind == "chunk"]


def price(profile: Profile, chunking: str, rows: int, chunks: Any) -> Any:
    """What the plan must take a step with these chunks for, from the formulas."""
    step_ns = profile.step_ns(rows)
    wall = progress = 0
    for chunk in chunks:
        s_u, s_v = profile.slowdown_ppm(rows, chunking, chunk)
        time_ns = -(-profile.chunk_ns(chunking, chunk) * s_v // PPM)
        wall += time_ns
        progress += min(time_ns, time_ns * PPM // s_u)
    if progress <= step_ns:
        return step_ns + wall - progress
    assert len(chunks) == 1, "only a single chunk may be longer than its step"
    return max(step_ns, wall)


def assert_threshold_kept(profile: Profile, chunking: str, theta_ppm: Any, result: RunResult, guided_rows: Any) -> Any:
    """Each launch beside a step that is not marked as forced was paid for by the credit of the steps before it."""
    theta = Fraction(theta_ppm, PPM)
    chunks = chunks_of(result)
    credit, checked = Fraction(0), 0
    for step in steps_of(result):
        full_ns = profile.step_ns(guided_rows * len(step.samples))
        beside = [c for c in chunks if c.start_ns < step.end_ns and c.end_ns > step.start_ns]
        begun = [c for c in beside if c.start_ns >= step.start_ns and not c.forced]
        exempt = any(c.forced for c in beside if c.start_ns <= step.start_ns)
        if begun and not exempt:
            checked += 1
            predicted = price(profile, chunking, step.rows, [c.chunk for c in begun])
            assert full_ns + credit >= theta * predicted
        if not exempt:
            most = 4 * (1 - theta) * full_ns
            credit = max(-most, min(most, credit + full_ns - theta * (step.end_ns - step.start_ns)))
    return checked


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(5, 60),
    st.sampled_from((1_100_000, 1_500_000, 2_500_000)),
    st.sampled_from((0.6, 0.85, 0.95)),
    st.integers(1, 4),
    st.sampled_from((0, 300_000)),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=14),
)
def test_the_threshold_is_kept_except_by_forced_launches(
    decode_ms: Any, slowdown: Any, theta: Any, batch: Any, skips: Any, arrivals: Any
) -> None:
    profile = affine_profile(decode_ms=decode_ms, slowdowns={1: (slowdown, slowdown), 32: (slowdown, slowdown)})
    now, requests = 0, []
    for number, (gap, steps) in enumerate(arrivals):
        now += gap * MS
        requests.append(Request(number, now, steps))
    policy = build_policy("synerdiff", {"theta": theta, "batch": batch})
    result = simulate(requests, policy, profile, budget=SkipBudget(skips, warmup_steps=1))
    assert_threshold_kept(profile, "c4", round(theta * PPM), result, 2)


def test_the_check_of_the_threshold_sees_launches() -> None:
    profile = affine_profile(slowdowns=BETWEEN)
    result = simulate(requests_at(*[0] * 12, steps=6), build_policy("synerdiff", {"theta": 0.6}), profile)
    assert assert_threshold_kept(profile, "c4", 600_000, result, 2) > 3
    naive = simulate(requests_at(*[0] * 12, steps=6), build_policy("chunked"), profile)
    with pytest.raises(AssertionError):
        assert_threshold_kept(profile, "c4", 970_000, naive, 2)


def test_over_a_saturated_run_steps_keep_their_share() -> None:
    profile = affine_profile(slowdowns=BETWEEN, decode_ms=40)
    for theta in (0.7, 0.85):
        policy = build_policy("synerdiff", {"theta": theta, "batch": 4})
        result = simulate([Request(i, 0, 12 + i % 5) for i in range(60)], policy, profile)
        assert not any(c.forced for c in chunks_of(result))
        last = max(i for i, step in enumerate(steps_of(result)) if len(step.samples) == 4)
        full = steps_of(result)[: last + 1]
        took = sum(step.end_ns - step.start_ns for step in full)
        assert theta * took <= sum(profile.step_ns(2 * len(step.samples)) for step in full)


def test_with_no_step_to_come_chunks_are_launched_one_by_one() -> None:
    """The step that an arrival starts at 50 ms meets one chunk of 25 ms; the next is planned at the step's end."""
    profile = affine_profile(decode_ms=100)
    result = simulate(requests_at(0, 50, steps=2), build_policy("synerdiff", {"theta": 0.5}), profile)
    first = [c for c in chunks_of(result) if c.samples == (0,)]
    # One such step at theta 0.5 pays for 28 ms with one chunk, so a chunk goes beside each; the last ones meet none.
    assert [c.start_ns // MS for c in first] == [28, 64, 89, 114]
    assert not any(c.exclusive or c.forced for c in chunks_of(result))


def test_a_decode_is_forced_after_its_longest_wait() -> None:
    """The decode costs 0.8 * 12 ms of credit; the first step earns 3.6 and each later one 2.8, so it waits for two."""
    profile = affine_profile(slowdowns={1: (2 * PPM, 2 * PPM), 32: (2 * PPM, 2 * PPM)}, decode_ms=12)
    requests = [Request(0, 0, 1), Request(1, 0, 20)]
    parameters = {"theta": 0.8, "chunking": "whole"}
    patient = simulate(requests, build_policy("synerdiff", parameters), profile)
    assert patient.requests[0].denoised_ns == 18 * MS
    assert next((c.start_ns // MS, c.forced) for c in chunks_of(patient)) == (18 + 2 * 14, False)
    impatient = simulate(requests, build_policy("synerdiff", {**parameters, "max_decode_wait_s": 0.014}), profile)
    assert next((c.start_ns // MS, c.forced) for c in chunks_of(impatient)) == (18 + 14, True)


@pytest.mark.parametrize(("slowdown", "exclusive"), [(1_900_000, False), (2_100_000, True)])
def test_without_a_feasible_plan_the_cheaper_of_beside_and_exclusive_is_forced(slowdown: int, exclusive: bool) -> None:
    profile = affine_profile(slowdowns={1: (slowdown, slowdown), 32: (slowdown, slowdown)})
    requests = [Request(0, 0, 2), Request(1, 0, 30)]
    result = simulate(requests, build_policy("synerdiff", {"theta": 1.0}), profile)
    first = [c for c in chunks_of(result) if c.samples == (0,)]
    assert first[0].start_ns == result.requests[0].denoised_ns
    assert {(c.forced, c.exclusive) for c in first} == {(True, exclusive)}


class Indebted(SynerDiff):
    """In debt by 3 % of a step at first: an idle step at theta 0.98 repays 2 %."""

    def account(self, now_ns: Any) -> None:
        super().account(now_ns)
        if not hasattr(self, "lent"):
            self.lent = True
            self.credit_ns = -3 * self.step_full_ns // 100


def test_a_debt_is_repaid_before_anything_is_forced() -> None:
    profile = affine_profile(slowdowns={1: (2 * PPM, 2 * PPM), 32: (2 * PPM, 2 * PPM)}, decode_ms=200)
    requests = [Request(0, 0, 1), Request(1, 0, 30)]
    lent = simulate(requests, Indebted(theta=0.98, horizon=1), profile)
    debtless = simulate(requests, build_policy("synerdiff", {"theta": 0.98, "horizon": 1}), profile)
    first, second = chunks_of(lent)[0], chunks_of(debtless)[0]
    assert (first.forced, second.forced) == (True, True)
    assert second.start_ns == debtless.requests[0].denoised_ns
    assert first.start_ns == steps_of(lent)[1].end_ns


def test_lanes_on_another_gpu_take_whole_decodes_at_once() -> None:
    profile = affine_profile(slowdowns={1: (3 * PPM, 3 * PPM), 32: (3 * PPM, 3 * PPM)})
    result = simulate(requests_at(0, 0, 0, steps=2), build_policy("synerdiff"), profile, decode_gpus=(1, 1))
    assert [c.lane for c in chunks_of(result) if c.chunk == 0] == ["decode0", "decode1", "decode0"]
    assert {c.end_ns - c.start_ns for c in chunks_of(result)} == {7_500_000}
    assert not any(c.exclusive or c.forced for c in chunks_of(result))


def test_a_plan_may_reach_into_the_second_image() -> None:
    """Both decodes fit beside the long step that follows: the second one starts when the first one's chunks end."""
    profile = make_profile({1: 10 * MS, 8: 200 * MS}, {"whole": [20 * MS], "c4": [5 * MS] * 4})
    requests = [Request(0, 0, 1), Request(1, 0, 1), Request(2, 0, 3), Request(3, 0, 3)]
    result = simulate(requests, build_policy("synerdiff"), profile)
    starts = [(c.samples[0], c.start_ns // MS) for c in chunks_of(result)][:8]
    assert starts == [(0, 200), (0, 205), (0, 210), (0, 215), (1, 220), (1, 225), (1, 230), (1, 235)]
