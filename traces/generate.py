"""Generates traces from a validated description: same description, same requests.

Arrival processes give times in seconds from 0, sorted; mixes draw steps, images, guidance and LoRAs; sessions are
arrivals like GenTD26's, where users come back, at a rate that follows the hour and the day. MLPerf's are made again
from their seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synerdiff.core import NS_PER_S, InputError, LoraUse, Request
from traces.columns import MAX_ARRIVAL_S
from traces.gentd26_parameters import Gentd26Parameters, gentd26_parameters
from traces.spec import MAX_REQUESTS, TraceSpec, trace_spec


def generate(kind: str, **fields: Any) -> list[Request]:
    """The requests of ``TraceSpec(kind=kind, **fields)``, e.g. ``generate("poisson", requests=100, rate_per_s=2.0)``.

    Raises InputError for fields that do not fit.
    """
    return generate_trace(trace_spec({"kind": kind, **fields}, "generated trace"))


def _too_late() -> InputError:
    return InputError(f"The last request would arrive after {MAX_ARRIVAL_S} s; give fewer requests or a higher rate.")


def generate_trace(spec: TraceSpec) -> list[Request]:
    """The requests that the description stands for.

    Arrivals, mix and LoRAs have random streams of their own, so that another mix leaves the arrivals as they are.
    """
    arrivals_rng, mix_rng, loras_rng = (
        np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(spec.seed).spawn(3)
    )
    fitted = gentd26_parameters()
    arrivals_ns: list[int] | None = None
    if spec.kind == "mlperf":
        arrivals_ns = loadgen_schedule_ns(
            spec.seed, spec.mean_rate_per_s, spec.duration_s or 0.0, spec.min_requests or 0
        )[0]
        times_s, sessions = np.array(arrivals_ns) / NS_PER_S, np.arange(len(arrivals_ns))
    elif spec.kind == "gentd26-like":
        times_s, sessions = session_arrivals(arrivals_rng, spec, fitted)
    else:
        times_s = (mmpp_arrivals if spec.kind == "mmpp" else renewal_arrivals)(arrivals_rng, spec)
        sessions = np.arange(len(times_s))  # nobody comes back: every request is its own session
    if times_s[-1] > MAX_ARRIVAL_S:
        raise _too_late()
    loras = draw_loras(loras_rng, fitted, sessions) if spec.with_loras else [()] * len(times_s)
    if arrivals_ns is None:
        arrivals_ns = np.rint(times_s * NS_PER_S).astype(np.int64).tolist()
    if spec.shapes:
        weights = dict(enumerate(shape.weight for shape in spec.shapes))
        drawn = zip(arrivals_ns, _draw(mix_rng, weights, len(arrivals_ns)).tolist(), loras, strict=True)
        asked = [
            Request(
                *(0, 0),
                **shape.model_dump(exclude={"weight", "slo_s"}),
                slo_ns=None if shape.slo_s is None else round(shape.slo_s * NS_PER_S),
            )
            for shape in spec.shapes
        ]
        return [
            replace(asked[shape], request_id=i, arrival_ns=at_ns, loras=names)
            for i, (at_ns, shape, names) in enumerate(drawn)
        ]
    steps, images, guidance_scale = draw_steps_images(mix_rng, spec, fitted, sessions)
    columns = enumerate(zip(arrivals_ns, steps.tolist(), images.tolist(), loras, strict=True))
    return [Request(i, at_ns, n, count, guidance_scale, loras=names) for i, (at_ns, n, count, names) in columns]


Times = NDArray[np.float64]
_GAPS_PER_DRAW = 65_536


def renewal_arrivals(rng: np.random.Generator, spec: TraceSpec) -> Times:
    """Independent gaps with mean 1/rate: exponential (poisson) or gamma with the given cv.

    A gamma gap has shape 1/cv^2 and scale cv^2/rate, hence mean 1/rate and standard deviation cv/rate; the index of
    dispersion over long windows tends to cv^2. The first gap starts at 0.
    """
    mean_s = 1.0 / spec.mean_rate_per_s
    cv2 = 1.0 if spec.kind == "poisson" else (spec.cv or 2.0) ** 2
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
    ratio, share, burst_s = spec.burst_ratio or 5.0, spec.burst_share or 0.2, spec.burst_s or 60.0
    calm_s = burst_s * (1.0 - share) / share
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


def loadgen_schedule_ns(
    seed: int, rate_per_s: float, duration_s: float, min_requests: int = 0, most: int = MAX_REQUESTS
) -> tuple[list[int], int]:
    """(arrivals in ns, the instant at which the next query would have been), as LoadGen of MLPerf Inference draws them.

    Gaps are exponential: floor(-ln(1 - u) / rate * 10^9) ns with u = (first + second * 2^32) / 2^64 of two outputs of
    a 32-bit Mersenne Twister seeded with seed mod 2^32. The first query is sent at 0; queries are added until the last
    one is at or past ``duration_s`` and there are ``min_requests``. The public H100 run's log (Inference v4.1, SDXL,
    ``generated_query_count`` 9703 and ``generated_query_duration`` 600100727873) comes out exactly.

    Raises InputError when that would be more than ``most`` queries.
    """
    twister = np.random.RandomState(seed % 2**32)
    duration_ns = round(duration_s * NS_PER_S)
    arrivals: list[int] = []
    at_ns = 0
    while True:
        outputs = twister.randint(0, 2**32, _GAPS_PER_DRAW, dtype=np.uint32).tolist()
        for low, high in zip(outputs[::2], outputs[1::2], strict=True):
            arrivals.append(at_ns)
            at_ns += math.floor(-math.log(1 - (low + high * 2**32) / 2**64) / rate_per_s * NS_PER_S)
            if arrivals[-1] >= duration_ns and len(arrivals) >= min_requests:
                return arrivals, at_ns
            if len(arrivals) >= most:
                raise InputError(f"The schedule would have over {most} requests; give a lower rate or duration.")


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
    inside = times_s[times_s < (spec.duration_s or 0.0)]
    if not len(inside):
        raise InputError(f"No request arrives within {spec.duration_s:g} s at this rate and seed.")
    return inside


Integers = NDArray[np.int64]
UNGUIDED_STEPS = {"unguided-4": 4, "unguided-8": 8}
GUIDED_RANGES = {"guided-20-50": (20, 50)}
"""Steps drawn evenly from a range, both ends included."""


def draw_steps_images(
    rng: np.random.Generator, spec: TraceSpec, fitted: Gentd26Parameters, sessions: Integers
) -> tuple[Integers, Integers, float]:
    """Steps and images of each request, and the guidance scale of all. ``sessions``: the session of each request.

    Within a session a request repeats the draw before it with the fitted probability, which leaves the frequencies
    as they are.
    """
    n = len(sessions)
    if spec.asked == "fixed":
        scale = 7.5 if spec.guidance_scale is None else spec.guidance_scale
        return np.full(n, spec.steps or 30), np.full(n, spec.images or 1), scale
    pairs = np.array(list(fitted.steps_images))
    drawn = _draw(rng, fitted.steps_images, n)[_source(rng, sessions, fitted.repeat_steps_images)]
    if spec.asked in UNGUIDED_STEPS:
        return np.full(n, UNGUIDED_STEPS[spec.asked]), pairs[drawn, 1], 1.0
    if spec.asked in GUIDED_RANGES:
        low, high = GUIDED_RANGES[spec.asked]
        return rng.integers(low, high, n, endpoint=True), pairs[drawn, 1], 7.5
    return pairs[drawn, 0], pairs[drawn, 1], 7.5


def draw_loras(
    rng: np.random.Generator, fitted: Gentd26Parameters, sessions: Integers
) -> Sequence[tuple[LoraUse, ...]]:
    """The LoRAs of each request: how many, which (the most popular is L0000), and at which scale, as fitted.

    A request names no LoRA twice. Within a session the LoRAs of the request before are repeated with the fitted
    probability.
    """
    counts = np.array(list(fitted.lora_counts))[_draw(rng, fitted.lora_counts, len(sessions))]
    ranks = np.arange(1, fitted.lora_ids + 1)
    popularity = np.cumsum((ranks + fitted.lora_zipf_q) ** -fitted.lora_zipf_s)
    scales = list(fitted.lora_scales)
    drawn: list[tuple[LoraUse, ...]] = [()] * len(sessions)
    for index in np.flatnonzero(counts):
        chosen: dict[int, float] = {}
        while len(chosen) < counts[index]:
            rank = int(np.searchsorted(popularity, rng.random() * popularity[-1]))
            chosen.setdefault(rank, scales[int(_draw(rng, fitted.lora_scales, 1)[0])])
        drawn[index] = tuple(LoraUse(f"L{rank:04d}", scale) for rank, scale in chosen.items())
    return [drawn[source] for source in _source(rng, sessions, fitted.repeat_loras)]


def _draw(rng: np.random.Generator, shares: Mapping[Any, float], n: int) -> Integers:
    """Indices into the keys, as often as their shares say."""
    cumulative = np.cumsum(list(shares.values()))
    drawn: Integers = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right").astype(np.int64)
    return drawn


def _source(rng: np.random.Generator, sessions: Integers, repeat: float) -> Integers:
    """Whose draw each request uses: its own, or with probability ``repeat`` that of its session's request before it."""
    by_session = np.argsort(sessions, kind="stable")
    grouped = sessions[by_session]
    fresh = rng.random(len(sessions)) >= repeat
    fresh[0] = True
    fresh[1:] |= grouped[1:] != grouped[:-1]
    position = np.maximum.accumulate(np.where(fresh, np.arange(len(sessions)), 0))
    source = np.empty(len(sessions), dtype=np.int64)
    source[by_session] = by_session[position]
    return source


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
    order = levels = np.array(fitted.day_levels)
    sessions_s: list[Times] = []
    owners: list[NDArray[np.int64]] = []
    sessions = arrived = 0
    day = -1
    # What arrives before the end of a generated day is complete: later sessions cannot reach back.
    while day < 0 or not _complete(spec, sessions_s, arrived, day):
        if day * DAY_S > MAX_ARRIVAL_S:
            raise _too_late()
        if (day + 1) % len(levels) == 0:
            order = rng.permutation(levels)
        noise = rng.gamma(1 / fitted.hour_noise_cv2, fitted.hour_noise_cv2, 24)
        starting = rng.poisson(per_hour * order[(day + 1) % len(levels)] * noise)
        starts_s = day * DAY_S + (np.repeat(np.arange(24), starting) + rng.random(starting.sum())) * HOUR_S
        times, owner = _requests_of(rng, starts_s, rng.choice(sizes, len(starts_s), p=size_shares), fitted)
        sessions_s.append(times)
        owners.append(owner + sessions)
        sessions += len(starts_s)
        arrived += len(times)
        day += 1
        if arrived > 2 * MAX_REQUESTS:
            raise InputError(f"The trace would have over {MAX_REQUESTS} requests; give a lower rate or less time.")
    times, owner = np.concatenate(sessions_s), np.concatenate(owners)
    in_order = np.argsort(times, kind="stable")
    in_order = in_order[times[in_order] >= 0]
    chosen = in_order[: len(cut(times[in_order], spec))]
    return times[chosen], owner[chosen]


def _complete(spec: TraceSpec, sessions_s: list[Times], arrived: int, days: int) -> bool:
    if spec.duration_s is not None:
        return days * DAY_S >= spec.duration_s
    assert spec.requests is not None
    if arrived < spec.requests:
        return False
    end_s = days * DAY_S
    return sum(int(((times >= 0) & (times < end_s)).sum()) for times in sessions_s) >= spec.requests


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
