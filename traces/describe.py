"""What a trace is like: load, mix, popularity and burstiness. Pure functions of its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from synerdiff.core import NS_PER_S, Request
from traces.scaling import rate_per_s

WINDOWS_S = (1, 10, 60, 300, 600, 3600, 10_800, 86_400)
FEWEST_WINDOWS = 5
TOP_RANKS = (1, 5, 10, 50, 100)
LONGEST_GAPS = 3
REPLAYED = (459, 20)
"""Requests that a window worth replaying holds: enough to claim a P99 (``requests_for_p99_claim``), or a few."""

Key = TypeVar("Key", int, float, str)


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
        """Most requests of a window over the mean."""
        return self.largest / self.mean


@dataclass(frozen=True, slots=True)
class ReplayWindow:
    """A part of the trace worth replaying: seconds of the trace as written, the end excluded."""

    why: str
    start_s: int
    end_s: int
    requests: int


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
    resolutions: dict[str, float]
    """By ``HxW``; "the profile's" where a request names none."""
    prompts: int
    """Requests that bring one."""
    duplicates: int
    """Requests that equal an earlier one of their instant in everything but their number."""
    gaps_s: tuple[tuple[float, float], ...]
    """(length, start) of the longest times without an arrival, longest first."""
    replay: tuple[ReplayWindow, ...]

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
        resolutions=shares("the profile's" if r.height is None else f"{r.height}x{r.width}" for r in requests),
        prompts=sum(bool(request.prompt) for request in requests),
        duplicates=len(requests) - len({replace(request, request_id=0) for request in requests}),
        gaps_s=longest_gaps_s(times_ns),
        replay=replay_windows(times_ns),
    )


def longest_gaps_s(times_ns: NDArray[np.int64]) -> tuple[tuple[float, float], ...]:
    """(length, start) of the longest gaps between sorted arrivals, at most three, longest first."""
    gaps = np.diff(times_ns)
    longest = np.argsort(-gaps, kind="stable")[:LONGEST_GAPS]
    return tuple((float(gaps[i]) / NS_PER_S, float(times_ns[i]) / NS_PER_S) for i in longest if gaps[i] > 0)


def replay_windows(times_ns: NDArray[np.int64]) -> tuple[ReplayWindow, ...]:
    """The busiest, the median and the calmest of the shortest windows that hold `REPLAYED` requests on average.

    Windows are whole, start at multiples of their length from the first arrival's second, and hold a request. None
    where the trace has fewer than three windows of which each would hold enough.
    """
    start_s = int(times_ns[0] // NS_PER_S)
    span_s = int(times_ns[-1] // NS_PER_S) - start_s
    for enough in REPLAYED:
        for length_s in WINDOWS_S:
            whole = span_s // length_s
            if whole < 3 or len(times_ns) < enough * whole:
                continue
            index, counts = np.unique((times_ns // NS_PER_S - start_s) // length_s, return_counts=True)
            index, counts = index[index < whole], counts[index < whole]
            order = np.argsort(-counts, kind="stable")
            picks = {"busiest": order[0], "median": order[len(order) // 2], "calmest": order[-1]}
            return tuple(
                ReplayWindow(why, start, start + length_s, int(counts[pick]))
                for why, pick in picks.items()
                for start in [start_s + int(index[pick]) * length_s]
            )
    return ()


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
    """How concentrated draws are: the share of all draws that the most frequent names take, by rank."""
    counts = sorted(Counter(names).values(), reverse=True)
    total = sum(counts)
    return Popularity(
        draws=total,
        distinct=len(counts),
        top_share={rank: sum(counts[:rank]) / total for rank in TOP_RANKS if rank <= len(counts)},
    )
