"""Which adapters requests ask for: popularity as in Katz's production trace, and how often a request repeats another.

The trace itself is not redistributable, and its curves were read off published plots. What stands here are parameters:
the popularity of LoRAs is a Zipf-Mandelbrot fit, that of ControlNets the share of each rank. Repetition is a model of
ours: with probability ``repeat`` a request asks for exactly what the d-th request before it asked for, d drawn with
weight d^-``decay`` (d up to 1000); else it draws its adapters anew, without one twice. Its parameters were fitted to
the published loads per request of an LRU cache of 1, 2 and 4 files; everything else is prediction (``cache_curves``).
"""

from __future__ import annotations

import json
import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from synerdiff.core import NS_PER_S, ControlNetUse, InputError, LoraUse, Request
from synerdiff.engine.adapters import Cache
from synerdiff.schema import Section

SOURCE = "Katz's production trace, read off the plots of modelscope/Katz (commit 3552744), about +-0.01 loads"
_FARTHEST = 1000

CURVES_FILE = "katz_trace_facts.json"
RULES = ("lru", "lfu")
SIZES = tuple(range(1, 11))
FITTED = ("lru", (1, 2, 4))
"""The points to which the trace model was fitted; all others are predictions."""
REQUESTS = 20_000


@dataclass(frozen=True, slots=True)
class AdapterMix:
    """One kind of adapter in one service. ``per_request``: mean number of them; fractions are drawn."""

    per_request: float
    repeat: float
    decay: float
    zipf_mandelbrot: tuple[float, int, float] | None = None
    """Popularity of rank r is in proportion to (r + q)^-s, r from 1 to N; given as (s, N, q)."""
    cumulative: tuple[float, ...] = ()
    """Or: share of the ranks up to each."""

    def popularity(self) -> list[float]:
        """Cumulative popularity by rank, 1 at the end."""
        if self.zipf_mandelbrot is None:
            return [*self.cumulative[:-1], 1.0]
        s, n, q = self.zipf_mandelbrot
        sums = list(accumulate((rank + q) ** -s for rank in range(1, n + 1)))
        return [value / sums[-1] for value in sums]


MIXES: dict[tuple[str, str], AdapterMix] = {
    ("A", "lora"): AdapterMix(1.9, 0.3, 2.0, zipf_mandelbrot=(0.965, 6321, 1.439)),
    ("B", "lora"): AdapterMix(1.0, 0.5, 1.0, zipf_mandelbrot=(1.209, 16510, 0.273)),
    ("A", "controlnet"): AdapterMix(
        1.8, 0.6, 1.5,
        cumulative=(
            0.3108, 0.5641, 0.7352, 0.8932, 0.9755, 0.9867, 0.9891, 0.9903, 0.9914, 0.9923, 0.993, 0.9936, 0.9942,
            0.9948, 0.9954, 1.0,
        ),
    ),
    ("B", "controlnet"): AdapterMix(
        1.8, 0.6, 1.5,
        cumulative=(
            0.2222, 0.357, 0.4918, 0.6083, 0.7152, 0.8056, 0.8783, 0.9447, 0.9619, 0.9747, 0.9874, 0.9942, 0.9967,
            0.9974, 0.9981, 1.0,
        ),
    ),
}  # fmt: skip
"""(service, kind) -> mix. ControlNets beyond the 16th (0.4% and 0.1% of the uses) count as the 16th."""


def adapter_sets(service: str, kind: str, seed: int) -> Iterator[tuple[str, ...]]:
    """An endless stream of what requests ask for, named by rank (``lora1`` is the most popular)."""
    if (service, kind) not in MIXES:
        known = ", ".join(f"{a} {b}" for a, b in MIXES)
        raise InputError(f"there is no adapter mix '{service} {kind}'; known are {known}.")
    mix = MIXES[service, kind]
    source = random.Random(seed)
    popularity = mix.popularity()
    distances = list(accumulate(distance**-mix.decay for distance in range(1, _FARTHEST + 1)))
    past: list[tuple[str, ...]] = []
    whole, part = int(mix.per_request), mix.per_request - int(mix.per_request)
    while True:
        if past and source.random() < mix.repeat:
            distance = bisect(distances, source.random() * distances[-1]) + 1
            asked = past[-min(distance, len(past))]
        else:
            ranks: list[int] = []
            count = whole + (source.random() < part)
            while len(ranks) < count:
                rank = bisect(popularity, source.random()) + 1
                if rank not in ranks:
                    ranks.append(rank)
            asked = tuple([f"{kind}{rank}" for rank in ranks])
        past.append(asked)
        if len(past) > 2 * _FARTHEST:
            del past[:_FARTHEST]
        yield asked


class AdapterTrace(Section):
    """Poisson arrivals of guided requests with a service's ControlNets, and a share of them with its LoRAs."""

    service: Literal["A", "B"] = "A"
    lora_share: float = Field(ge=0, le=1)
    steps: int = Field(default=50, ge=1, le=1000)
    rate_per_s: float = Field(default=1.0, gt=0, le=1e6)
    requests: int = Field(ge=1, le=10_000_000)
    seed: int = Field(ge=0)


def adapter_requests(trace: AdapterTrace) -> list[Request]:
    """The requests; another rate or share leaves everything else as it is."""
    arrivals, wishes = random.Random(trace.seed), random.Random(trace.seed + 1_000_000)
    loras, controlnets = (adapter_sets(trace.service, kind, trace.seed) for kind in ("lora", "controlnet"))
    now_s = 0.0
    made = []
    for number in range(trace.requests):
        now_s += arrivals.expovariate(trace.rate_per_s)
        asked = next(loras) if wishes.random() < trace.lora_share else ()
        uses, guides = tuple(map(LoraUse, asked)), tuple(map(ControlNetUse, next(controlnets)))
        made.append(Request(number, round(now_s * NS_PER_S), trace.steps, loras=uses, controlnets=guides))
    return made


@dataclass(frozen=True, slots=True)
class CachePoint:
    """Loads per request of one cache, by the model of Katz's adapters, beside the published number."""

    service: str
    kind: str
    rule: str
    size: int
    """Files that the cache holds."""
    loads_per_request: float
    published: float | None
    """None when the published curves are not at hand."""

    @property
    def fitted(self) -> bool:
        """Whether the mix's constants were fitted on this point."""
        return self.rule == FITTED[0] and self.size in FITTED[1]

    @property
    def error(self) -> float | None:
        """Loads per request off, modelled - published."""
        return None if self.published is None else self.loads_per_request - self.published


def loads_per_request(service: str, kind: str, rule: str, size: int, requests: int = REQUESTS, seed: int = 2) -> float:
    """Misses per request of one cache that holds ``size`` files, started empty."""
    cache = Cache(size, rule)
    misses = 0
    for asked in islice(adapter_sets(service, kind, seed), requests):
        for name in asked:
            if not cache.use(name):
                cache.put(name)
                misses += 1
    return misses / requests


def cache_curves(data_folder: Path | None = None, requests: int = REQUESTS) -> list[CachePoint]:
    """Every service, kind, rule and size; beside the published values when their folder is given."""
    facts = None
    if data_folder is not None:
        path = data_folder / CURVES_FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the published cache curves cannot be read ({error}).") from None
    return [
        CachePoint(
            service,
            kind,
            rule,
            size,
            loads_per_request(service, kind, rule, size, requests),
            None if facts is None else facts[f"loads_per_request_{rule.upper()}_{service}"][kind][size - 1],
        )
        for service, kind in MIXES
        for rule in RULES
        for size in SIZES
    ]
