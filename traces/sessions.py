"""Arrivals like GenTD26's: users come in sessions, at a rate that follows the hour and the day."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synerdiff.core import InputError
from traces.arrivals import Times, cut
from traces.gentd26_parameters import Gentd26Parameters
from traces.spec import MAX_REQUESTS, TraceSpec

DAY_S = 86_400
HOUR_S = 3600


def session_arrivals(
    rng: np.random.Generator, spec: TraceSpec, fitted: Gentd26Parameters
) -> tuple[Times, NDArray[np.int64]]:
    """Sorted times in seconds from midnight of the first day, and the session of each.

    Sessions start as a Poisson process whose rate is constant within an hour: rate / requests per session * level of
    the day * profile of the hour * gamma noise of mean 1. Day levels are the fitted ones, in a new random order for
    every 22 days. A session has as many requests as fitted, with lognormal gaps between them. A higher rate means
    more sessions; the pace inside a session stays. One day before the start is generated too, for the sessions that
    reach into it.
    """
    per_hour = spec.mean_rate_per_s / fitted.requests_per_session * HOUR_S * np.array(fitted.hour_profile)
    sizes = np.array(list(fitted.session_requests))
    size_shares = np.array(list(fitted.session_requests.values()))
    size_shares /= size_shares.sum()
    levels = np.array(fitted.day_levels)
    order = levels
    found: list[Times] = []
    owners: list[NDArray[np.int64]] = []
    sessions = arrived = 0
    day = -1
    # What arrives before the end of a generated day is complete: later sessions cannot reach back.
    while day < 0 or not _complete(spec, found, arrived, day):
        if (day + 1) % len(levels) == 0:
            order = rng.permutation(levels)
        noise = rng.gamma(1 / fitted.hour_noise_cv2, fitted.hour_noise_cv2, 24)
        starting = rng.poisson(per_hour * order[(day + 1) % len(levels)] * noise)
        starts_s = day * DAY_S + (np.repeat(np.arange(24), starting) + rng.random(starting.sum())) * HOUR_S
        times, owner = _requests_of(rng, starts_s, rng.choice(sizes, len(starts_s), p=size_shares), fitted)
        found.append(times)
        owners.append(owner + sessions)
        sessions += len(starts_s)
        arrived += len(times)
        day += 1
        if arrived > 2 * MAX_REQUESTS:
            raise InputError(f"The trace would have over {MAX_REQUESTS} requests; give a lower rate or less time.")
    times, owner = np.concatenate(found), np.concatenate(owners)
    in_order = np.argsort(times, kind="stable")
    in_order = in_order[times[in_order] >= 0]
    kept = in_order[: len(cut(times[in_order], spec))]
    return times[kept], owner[kept]


def _complete(spec: TraceSpec, found: list[Times], arrived: int, days: int) -> bool:
    if spec.duration_s is not None:
        return days * DAY_S >= spec.duration_s
    assert spec.requests is not None
    if arrived < spec.requests:
        return False
    end_s = days * DAY_S
    return sum(int(((times >= 0) & (times < end_s)).sum()) for times in found) >= spec.requests


def _requests_of(
    rng: np.random.Generator, starts_s: Times, sizes: NDArray[np.int64], fitted: Gentd26Parameters
) -> tuple[Times, NDArray[np.int64]]:
    """Times of all requests of some sessions, session after session, and the index of their session."""
    owner = np.repeat(np.arange(len(starts_s)), sizes)
    gaps = np.minimum(rng.lognormal(fitted.gap_log_mean, fitted.gap_log_sd, len(owner)), fitted.gap_cap_s)
    first = np.cumsum(sizes) - sizes
    gaps[first] = 0.0
    elapsed = np.cumsum(gaps)
    return np.repeat(starts_s, sizes) + elapsed - np.repeat(elapsed[first], sizes), owner
