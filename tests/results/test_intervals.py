"""Quantiles and intervals against published tables and hand-computed values."""

from __future__ import annotations

from math import exp, inf, log, sqrt
from random import Random

import pytest

from synerdiff.core import InputError
from synerdiff.results.intervals import (
    Interval,
    binomial_at_most,
    blocks_interval,
    p99_upper_bound,
    paired_log_ratio,
    percentile_interval,
    requests_for_p99_claim,
    rises,
    t_interval,
    t_quantile,
    values_for_interval,
)


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 4, 2.7764), (0.95, 9, 2.2622),
        (0.95, 19, 2.0930), (0.95, 30, 2.0423), (0.95, 120, 1.9799), (0.99, 1, 63.6567), (0.99, 2, 9.9248),
        (0.99, 5, 4.0321), (0.99, 10, 3.1693), (0.90, 7, 1.8946),
    ],
)  # fmt: skip
def test_t_quantiles_of_the_printed_table(confidence: float, degrees: int, expected: float) -> None:
    assert t_quantile(confidence, degrees) == pytest.approx(expected, abs=6e-5)


def test_t_quantile_tends_to_the_normal_one() -> None:
    assert t_quantile(0.95, 1_000_001) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("confidence", "degrees"), [(0.95, 0), (1.0, 3), (0.0, 3)])
def test_t_quantile_refuses_what_does_not_exist(confidence: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no t quantile"):
        t_quantile(confidence, degrees)


def test_t_interval_by_hand() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    half = 4.302653 / sqrt(3)
    assert (found.value, found.n) == (2.0, 3)
    assert found.high - found.value == pytest.approx(half, rel=1e-6)
    assert t_interval([5.0]) == Interval(5.0, -inf, inf, 1)


def test_a_rise_is_told_from_scatter() -> None:
    random = Random(1)
    flat = [[random.gauss(5, 1) for _ in range(100)] for _ in range(200)]
    assert sum(map(rises, flat)) <= 6  # 1% of 200, give or take
    assert all(rises([value + i / 30 for i, value in enumerate(values)]) for values in flat)
    assert not rises([1.0] * 100)
    assert not rises([float(i) for i in range(19)])


def test_an_interval_needs_ten_blocks_that_are_long_for_the_load() -> None:
    """At load 0.5 raised to 0.5 * (1 + 3 / sqrt(592)) = 0.5617: 10 blocks of 20 * 0.5617 / 0.4383^2 = 58.5 requests."""
    assert [values_for_interval(load) for load in (0.0, 0.01, 0.5, 1.0, 1.4, None)] == [100, 100, 592, None, None, None]
    rising = [values_for_interval(load) or 0 for load in (0.3, 0.5, 0.7, 0.9, 0.99)]
    assert rising == sorted(set(rising))


def test_an_interval_of_blocks_by_hand() -> None:
    """Blocks 1, 1, ..., 1, 11 (the last value in none): mean 2, standard deviation sqrt(10); t of 98% with 9: 2.8214."""
    values = [*[0.0, 2.0] * 9, 11.0, 11.0, 9.0]
    found = blocks_interval(values, 21)
    assert found.value == 49 / 21
    assert found.high - found.value == pytest.approx(2.8214 * sqrt(10) / sqrt(10), rel=1e-4)
    assert found.value - found.low == pytest.approx(2.8214, rel=1e-4)
    for needed in (22, None):
        assert blocks_interval(values, needed) == Interval(49 / 21, -inf, inf, 21)


@pytest.mark.parametrize(("over", "needed"), [(0, 459), (1, 662), (2, 838), (10, 2010)])
def test_requests_for_a_p99_claim(over: int, needed: int) -> None:
    assert requests_for_p99_claim(over) == needed
    assert binomial_at_most(over, needed, 0.01) <= 0.01 < binomial_at_most(over, needed - 1, 0.01)


@pytest.mark.parametrize(("count", "bound"), [(458, inf), (459, 458), (661, 660), (662, 660), (2010, 1999)])
def test_p99_bound_is_the_order_statistic_that_may_be_claimed(count: int, bound: float) -> None:
    assert p99_upper_bound([float(i) for i in range(count)]) == bound


def test_binomial_by_hand() -> None:
    assert binomial_at_most(1, 3, 0.5) == pytest.approx(0.5)
    assert binomial_at_most(3, 3, 0.5) == 1.0


def test_median_interval_of_ten_values() -> None:
    """P(Binomial(10, 1/2) <= 1) = 1.07% <= 2.5% < P(<= 2): the second and the ninth of ten bound the median."""
    assert percentile_interval([float(i) for i in range(1, 11)], 0.5) == Interval(5.5, 2.0, 9.0, 10)


def test_a_percentile_with_too_few_values_is_open() -> None:
    found = percentile_interval([3.0, 1.0, 2.0], 0.99)
    assert (found.value, found.high) == (pytest.approx(2.98), inf)  # type: ignore[comparison-overlap]


def test_paired_log_ratio_by_hand() -> None:
    found = paired_log_ratio({1: 2.0, 2: 8.0}, {2: 4.0, 1: 2.0})
    half = 12.706205 * (log(2) / sqrt(2)) / sqrt(2)
    assert found.ratio == pytest.approx(sqrt(2))
    assert found.high == pytest.approx(sqrt(2) * exp(half), rel=1e-6)
    assert found.low == pytest.approx(sqrt(2) * exp(-half), rel=1e-6)
    assert paired_log_ratio({1: 2.0}, {1: 4.0}).high == inf


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({1: 1.0}, {2: 1.0}, "only runs of the same seeds"),
        ({}, {}, "only runs of the same seeds"),
        ({1: 0.0}, {1: 1.0}, "seed 1 has 0.0"),
        ({1: 1.0}, {1: float("nan")}, "seed 1 has nan"),
    ],
)
def test_paired_log_ratio_messages(a: dict[int, float], b: dict[int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        paired_log_ratio(a, b)
