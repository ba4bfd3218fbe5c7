"""What a trace is like: load, mix, popularity and burstiness. Pure functions of its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from synerdiff.core import NS_PER_S, Request
from traces.scaling import rate_per_s

WINDOWS_S = (1, 10, 60, 300, 600, 3600, 10_800, 86_400)
FEWEST_WINDOWS = 5
TOP_RANKS = (1, 5, 10, 50, 100)

Key = TypeVar("Key", int, float)


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """Arrivals counted in consecutive whole windows from the first arrival's instant."""

    window_s: int
    windows: int
    mean: float
    largest: int
    index_of_dispersion: float
    """Variance / mean of the counts (population variance): 1 for a Poisson process at every window length."""

    @property
    def peak_to_mean(self) -> float:
        return self.largest / self.mean


@dataclass(frozen=True, slots=True)
class Popularity:
    """How unevenly names are used: draws in all, distinct names, and the share of the most used ones."""

    draws: int
    distinct: int
    top_share: dict[int, float]
    """By rank r <= distinct: share of the draws that the r most used names take."""


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Shares count requests, not images. What is undefined (a single request has no rate) is None."""

    requests: int
    span_s: float
    """Last arrival - first arrival."""
    rate_per_s: float | None
    """(requests - 1) / span."""
    samples: int
    """Images in all."""
    sample_steps: int
    """Sum of steps * images: what the denoiser has to do."""
    gap_cv: float | None
    """Standard deviation / mean of the inter-arrival times."""
    steps: dict[int, float]
    images: dict[int, float]
    guidance_scale: dict[float, float]
    loras_per_request: dict[int, float]
    controlnets_per_request: dict[int, float]
    loras: Popularity
    controlnets: Popularity
    base_models: Popularity
    windows: tuple[WindowCounts, ...]

    @property
    def lora_share(self) -> float:
        """Share of requests with at least one LoRA."""
        return 1 - self.loras_per_request.get(0, 0.0)

    @property
    def guided_share(self) -> float:
        """Share of requests with a guidance scale above 1 (two denoiser rows per sample)."""
        return sum(share for scale, share in self.guidance_scale.items() if scale > 1)


def describe(requests: Sequence[Request]) -> TraceSummary:
    """Summarise at least one request, sorted by arrival."""
    times_ns = np.array([request.arrival_ns for request in requests], dtype=np.int64)
    span_ns = int(times_ns[-1] - times_ns[0])
    return TraceSummary(
        requests=len(requests),
        span_s=span_ns / NS_PER_S,
        rate_per_s=rate_per_s(requests) if span_ns else None,
        samples=sum(request.images for request in requests),
        sample_steps=sum(request.steps * request.images for request in requests),
        gap_cv=gap_cv(times_ns),
        steps=shares(request.steps for request in requests),
        images=shares(request.images for request in requests),
        guidance_scale=shares(request.guidance_scale for request in requests),
        loras_per_request=shares(len(request.loras) for request in requests),
        controlnets_per_request=shares(len(request.controlnets) for request in requests),
        # A LoRA is one thing to load at whatever scale it is used.
        loras=popularity(use.file for request in requests for use in request.loras),
        controlnets=popularity(use.name for request in requests for use in request.controlnets),
        base_models=popularity(request.base_model for request in requests),
        windows=tuple(
            window_counts(times_ns, window_s)
            for window_s in WINDOWS_S
            if span_ns >= FEWEST_WINDOWS * window_s * NS_PER_S
        ),
    )


def gap_cv(times_ns: NDArray[np.int64]) -> float | None:
    """Coefficient of variation of the gaps between sorted arrivals, None when it is undefined."""
    gaps = np.diff(times_ns)
    if len(gaps) < 2 or not gaps.any():
        return None
    return float(gaps.std() / gaps.mean())


def window_counts(times_ns: NDArray[np.int64], window_s: int) -> WindowCounts:
    """Counts in whole windows from the first arrival on; what is left over at the end is not counted.

    Needs a span of at least one window.
    """
    since_ns = times_ns - times_ns[0]
    windows = int(since_ns[-1] // (window_s * NS_PER_S))
    index = since_ns // (window_s * NS_PER_S)
    # Most short windows are empty: count the others only, so that memory does not grow with the span.
    counts = np.unique(index[index < windows], return_counts=True)[1].astype(np.float64)
    mean = counts.sum() / windows
    variance = (counts**2).sum() / windows - mean**2
    return WindowCounts(window_s, windows, float(mean), int(counts.max()), float(variance / mean))


def shares(values: Iterable[Key]) -> dict[Key, float]:
    """Share of each value, largest first, then by value."""
    counts = Counter(values)
    total = sum(counts.values())
    return {key: n / total for key, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def popularity(names: Iterable[Hashable]) -> Popularity:
    counts = sorted(Counter(names).values(), reverse=True)
    total = sum(counts)
    return Popularity(
        draws=total,
        distinct=len(counts),
        top_share={rank: sum(counts[:rank]) / total for rank in TOP_RANKS if rank <= len(counts)},
    )
