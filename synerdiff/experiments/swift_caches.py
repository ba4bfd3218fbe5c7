"""Loads per request by cache size, least recently and least frequently used, against Katz's published curves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from synerdiff.core import InputError
from synerdiff.experiments.swift_workload import MIXES, adapter_sets

FILE = "katz_trace_facts.json"
RULES = ("lru", "lfu")
SIZES = tuple(range(1, 11))
FITTED = ("lru", (1, 2, 4))
"""The points to which the trace model was fitted; all others are predictions."""
REQUESTS = 20_000


@dataclass(frozen=True, slots=True)
class CachePoint:
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
        return self.rule == FITTED[0] and self.size in FITTED[1]

    @property
    def error(self) -> float | None:
        """Loads per request off, modelled - published."""
        return None if self.published is None else self.loads_per_request - self.published


def loads_per_request(service: str, kind: str, rule: str, size: int, requests: int = REQUESTS, seed: int = 2) -> float:
    """Misses per request of one cache that holds ``size`` files, started empty."""
    from synerdiff.engine.caches import Cache

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
        path = data_folder / FILE
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
