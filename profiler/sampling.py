"""How many samples a point gets, and what is kept of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from synerdiff.profile.tables import Spread
from synerdiff.results.intervals import percentile_interval

STABLE = 0.05
WARM_UP_ROUNDS = 10
FEWEST = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """When a point has been measured often enough.

    It has ``most`` samples; or at least ``least``, and the 95% interval of their median is narrower than
    ``width`` times the median, or ``cap_s`` seconds have passed. After five times ``cap_s`` three samples do.
    """

    least: int
    most: int
    width: float
    cap_s: float

    def enough(self, samples: Sequence[int], spent_s: float) -> bool:
        """Whether so many samples (ns), taken in so long, settle a cell."""
        if len(samples) >= self.most or (len(samples) >= FEWEST and spent_s > 5 * self.cap_s):
            return True
        if len(samples) < self.least:
            return False
        return spent_s > self.cap_s or median_width(samples) <= self.width


FULL_GPU = Rule(least=10, most=50, width=0.01, cap_s=4.0)
FULL_CPU = Rule(least=10, most=50, width=0.03, cap_s=3.0)
QUICK = Rule(least=5, most=10, width=0.1, cap_s=0.5)


def median_width(samples: Sequence[int]) -> float:
    """Width of the 95% interval of the median (order statistics), as a share of the median."""
    interval = percentile_interval(samples, 0.5)
    return (interval.high - interval.low) / interval.value


def spread_of(samples: Sequence[int]) -> Spread:
    """Median, p10 and p90 as whole numbers (linear between order statistics, halves to even), and how many."""
    ordered = sorted(samples)

    def at(share: float) -> int:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return round(ordered[below] + (ordered[above] - ordered[below]) * (place - below))

    return Spread(at(0.5), at(0.1), at(0.9), len(ordered))


def warm_up(run: Callable[[int], Sequence[int]], cap_s: float) -> None:
    """Run in threes until two medians in a row differ by less than 5%, or the time is over.

    ``run(n)`` returns n durations.
    """
    until = time.monotonic() + cap_s
    before = median(run(3))
    for _ in range(WARM_UP_ROUNDS):
        now = median(run(3))
        if abs(now - before) <= STABLE * before or time.monotonic() > until:
            return
        before = now
