"""Confidence intervals: Student's t over seeds, means of blocks within a run, order statistics for percentiles, paired
log-ratios between policies, and how many requests a P99 claim needs. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import atan, ceil, cos, exp, inf, log, log1p, pi, sin, sqrt
from statistics import fmean, stdev

from synerdiff.core import InputError


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the bounds of its confidence interval; infinite bounds mean that there are too few values."""

    value: float
    low: float
    high: float
    n: int


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t with that many degrees of freedom.

    The finite series for whole degrees: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = atan(t / sqrt(degrees))
    cosine = cos(angle)
    term = cosine if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / pi * (angle + sin(angle) * total) if degrees % 2 else sin(angle) * total


@lru_cache(maxsize=1024)
def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence: the half width of a two-sided interval in standard errors."""
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"no t quantile for {degrees} degrees of freedom and confidence {confidence}")
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent values (one per seed), with the t interval; one value has infinite bounds."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, -inf, inf, len(values))
    half = t_quantile(confidence, len(values) - 1) * stdev(values) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


BLOCKS = 10
"""Blocks of one run from which an interval is made."""
SHORTEST_BLOCK = 10
BLOCK_CONFIDENCE = 0.98
"""Of the t interval of block means that is printed as one of 95%: latencies of queues are skewed, so means that are too
low come with intervals that are too narrow. Chosen on M/D/1 queues and judged on others (``benchmarks/queue_words.py``)."""


def blocks_interval(values: Sequence[float], needed: int | None) -> Interval:
    """Mean of consecutive, correlated values of one run: 95% interval by the means of 10 equal blocks of them.

    ``needed``: of ``values_for_interval``; infinite bounds where there are fewer values, or it is None. The last
    len % 10 values are left out of the interval's width, not of the mean.
    """
    mean = fmean(values)
    if needed is None or len(values) < needed:
        return Interval(mean, -inf, inf, len(values))
    half = t_quantile(BLOCK_CONFIDENCE, BLOCKS - 1) * stdev(block_means(values)) / sqrt(BLOCKS)
    return Interval(mean, mean - half, mean + half, len(values))


def block_means(values: Sequence[float]) -> list[float]:
    """Means of 10 equal blocks of the values; the last len % 10 are in none."""
    size = len(values) // BLOCKS
    return [fmean(values[i * size : (i + 1) * size]) for i in range(BLOCKS)]


@lru_cache(maxsize=1024)
def values_for_interval(load: float | None) -> int | None:
    """Requests of one run, warm-up and tail aside, from which their mean has an interval; None from load 1 on and where
    there is no load.

    Queues forget within about S / (1 - load)^2 (relaxation time of a single-server queue in heavy traffic; S: service
    time per place in the batch). A block is 20 times that long: 20 load / (1 - load)^2 requests, at least 10. The load
    is raised by three standard errors of the rate of so many Poisson arrivals: where a run that happens to have few
    arrivals gets an interval and one that has many gets none, those that are printed lie too low.
    """
    if load is None or not load < 1:
        return None
    count = BLOCKS * SHORTEST_BLOCK
    while (least := load * (1 + 3 / sqrt(count))) >= 1 or count < BLOCKS * ceil(20 * least / (1 - least) ** 2):
        count += max(1, count // 100)
    return count


def rises(values: Sequence[float], confidence: float = 0.99) -> bool:
    """Whether values of one run rise from its start to its end: the slope of 10 block means, by a one-sided t test.

    Least squares with 8 degrees of freedom. False with fewer than two values a block.
    """
    if len(values) < 2 * BLOCKS:
        return False
    means = block_means(values)
    places = [i - (BLOCKS - 1) / 2 for i in range(BLOCKS)]
    spread = sum(x * x for x in places)
    slope = sum(x * y for x, y in zip(places, means, strict=True)) / spread
    rest = sum((y - fmean(means) - slope * x) ** 2 for x, y in zip(places, means, strict=True))
    return slope > t_quantile(2 * confidence - 1, BLOCKS - 2) * sqrt(rest / (BLOCKS - 2) / spread)


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """Geometric mean over seeds of a / b, with its interval; below 1 means that a is smaller."""

    ratio: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        """``0.943 [0.921, 0.966]``; one seed has no interval."""
        return f"{self.ratio:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.seeds > 1 else "")


def paired_log_ratio(a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95) -> PairedRatio:
    """Compare two policies that ran on the same arrivals and steps: t interval of log(a/b), seed by seed.

    ``a`` and ``b`` map seeds to one positive value per run. InputError when seeds differ or a value is not positive.
    """
    if sorted(a) != sorted(b) or not a:
        raise InputError(f"only runs of the same seeds can be paired; found {sorted(a)} and {sorted(b)}.")
    for values in (a, b):
        for seed, value in values.items():
            if not 0 < value < inf:
                raise InputError(f"a ratio needs positive values; seed {seed} has {value}.")
    interval = t_interval([log(a[seed] / b[seed]) for seed in sorted(a)], confidence)
    return PairedRatio(exp(interval.value), exp(interval.low), exp(interval.high) if interval.high < inf else inf, interval.n)


def binomial_at_most(k: int, n: int, p: float) -> float:
    """P(at most k of n independent trials succeed)."""
    if k >= n:
        return 1.0
    term, total = n * log1p(-p), 0.0
    for i in range(k + 1):
        total += exp(term)
        term += log((n - i) / (i + 1)) + log(p / (1 - p))
    return min(1.0, total)


@lru_cache(maxsize=1024)
def requests_for_p99_claim(over: int = 0, confidence: float = 0.99, quantile: float = 0.99) -> int:
    """Requests that a run needs to claim, with this confidence, that P99 is at most a limit that ``over`` exceeded.

    The least n with P(Binomial(n, 1 - quantile) <= over) <= 1 - confidence: 459, 662, 838, ..., 2010 for 0, 1, 2,
    ..., 10. Requests are taken as independent.
    """
    low, high = over, 2 * over + 2
    while binomial_at_most(over, high, 1 - quantile) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = binomial_at_most(over, middle, 1 - quantile) <= 1 - confidence
        low, high = (low, middle) if enough else (middle, high)
    return high


def p99_upper_bound(values: Sequence[float], confidence: float = 0.99) -> float:
    """The smallest measured value that P99 can be claimed, with this confidence, not to exceed; infinite if none."""
    over = _rank(len(values), 1 - 0.99, 1 - confidence) - 1
    return sorted(values)[len(values) - 1 - over] if over >= 0 else inf


def percentile_interval(values: Sequence[float], quantile: float, confidence: float = 0.95) -> Interval:
    """A percentile (linear between order statistics) with bounds that are order statistics.

    Bounds come from the binomial distribution and assume independent values; within one run latencies are correlated,
    so prefer the interval over seeds. A side on which there are too few values is infinite.
    """
    ordered = sorted(values)
    n = len(ordered)
    place = quantile * (n - 1)
    below = int(place)
    above = min(below + 1, n - 1)
    value = ordered[below] + (ordered[above] - ordered[below]) * (place - below)
    low_rank = _rank(n, quantile, (1 - confidence) / 2)
    high_rank = n + 1 - _rank(n, 1 - quantile, (1 - confidence) / 2)
    low = ordered[low_rank - 1] if low_rank >= 1 else -inf
    high = ordered[high_rank - 1] if high_rank <= n else inf
    return Interval(value, low, high, n)


@lru_cache(maxsize=4096)
def _rank(n: int, quantile: float, tail: float) -> int:
    """The largest rank r with P(Binomial(n, quantile) <= r - 1) <= tail; 0 when there is none."""
    low, high = 0, n + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if binomial_at_most(middle - 1, n, quantile) <= tail else (low, middle)
    return low
