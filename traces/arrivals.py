"""Seeded arrival processes: times in seconds from 0, sorted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synerdiff.core import InputError
from traces.spec import MAX_REQUESTS, TraceSpec

Times = NDArray[np.float64]
_GAPS_PER_DRAW = 65_536


def renewal_arrivals(rng: np.random.Generator, spec: TraceSpec) -> Times:
    """Independent gaps with mean 1/rate: exponential (poisson) or gamma with the given cv.

    A gamma gap has shape 1/cv^2 and scale cv^2/rate, hence mean 1/rate and standard deviation cv/rate; the index of
    dispersion over long windows tends to cv^2. The first gap starts at 0.
    """
    mean_s = 1.0 / spec.mean_rate_per_s
    cv2 = 1.0 if spec.kind == "poisson" else (2.0 if spec.cv is None else spec.cv) ** 2
    times: list[Times] = []
    count, last_s = 0, 0.0
    while not _enough(spec, count, last_s):
        if spec.kind == "poisson":
            gaps = rng.exponential(mean_s, _GAPS_PER_DRAW)
        else:
            gaps = rng.gamma(1.0 / cv2, mean_s * cv2, _GAPS_PER_DRAW)
        times.append(last_s + np.cumsum(gaps))
        last_s = float(times[-1][-1])
        count += _GAPS_PER_DRAW
    return cut(np.concatenate(times), spec)


def mmpp_arrivals(rng: np.random.Generator, spec: TraceSpec) -> Times:
    """Poisson arrivals whose rate alternates between two values (a two-state Markov-modulated Poisson process).

    Sojourns are exponential: bursts of mean burst_s that take burst_share of the time. Rates are such that their mean
    is rate_per_s and their quotient burst_ratio. The state at 0 is drawn from the stationary distribution.
    """
    ratio, share, burst_s, calm_s = mmpp_parameters(spec)
    calm_rate = spec.mean_rate_per_s / (1.0 - share + share * ratio)
    in_burst = bool(rng.random() < share)
    times: list[Times] = []
    count, now_s = 0, 0.0
    while not _enough(spec, count, now_s):
        length_s = rng.exponential(burst_s if in_burst else calm_s)
        if spec.duration_s is not None:
            length_s = min(length_s, spec.duration_s - now_s)
        arrivals = rng.poisson(length_s * calm_rate * (ratio if in_burst else 1.0))
        times.append(now_s + np.sort(rng.random(arrivals)) * length_s)
        count += arrivals
        now_s += length_s
        in_burst = not in_burst
    return cut(np.concatenate(times), spec)


def mmpp_parameters(spec: TraceSpec) -> tuple[float, float, float, float]:
    """(burst ratio, burst share, mean burst, mean calm) with the defaults filled in."""
    ratio = 5.0 if spec.burst_ratio is None else spec.burst_ratio
    share = 0.2 if spec.burst_share is None else spec.burst_share
    burst_s = 60.0 if spec.burst_s is None else spec.burst_s
    return ratio, share, burst_s, burst_s * (1.0 - share) / share


def _enough(spec: TraceSpec, count: int, now_s: float) -> bool:
    if count > 2 * MAX_REQUESTS:
        raise InputError(f"The trace would have over {MAX_REQUESTS} requests; give a lower rate or a shorter duration.")
    if spec.requests is not None:
        return count >= spec.requests
    assert spec.duration_s is not None
    return now_s >= spec.duration_s


def cut(times_s: Times, spec: TraceSpec) -> Times:
    """The first ``requests`` of sorted times, or those before ``duration_s``."""
    if spec.requests is not None:
        return times_s[: spec.requests]
    kept = times_s[times_s < (spec.duration_s or 0.0)]
    if not len(kept):
        raise InputError(f"No request arrives within {spec.duration_s:g} s at this rate and seed.")
    return kept
