"""What a trace asks of a profile: resolutions, latency limits, steps, and how its arrivals are stretched to a load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from synerdiff.core import NS_PER_S, InputError, Request
from synerdiff.profile.capacity import solo_latencies_ns
from synerdiff.profile.tables import Profile
from synerdiff.results.metrics import SLO_FACTOR
from traces.columns import MAX_SLO_S
from traces.scaling import check_time_scale, rate_per_s, time_scale_for_rate


def fitted(
    requests: Sequence[Request], profile: Profile, slo_seconds: float | None = None, slo_multiple: float | None = None
) -> list[Request]:
    """The requests as this profile serves them: an empty height and width become its first resolution; one that it does
    not have is refused.

    A request without an SLO of its own gets ``slo_seconds``, or ``slo_multiple`` times its solo latency; when both are
    None it has none, and policies see no deadline.
    """
    size = profile.head.size
    known = ((None, None), *(profile.head.resolutions or (None,)))
    for request in requests:
        if (request.height, request.width) not in known:
            asked = f"{request.height}x{request.width} pixels"
            if request.size is None:
                asked = f"a {'width' if request.height is None else 'height'} alone"
            raise InputError(
                f"request {request.request_id} asks for {asked}; profile '{profile.name}' was made for "
                f"{profile.head.pixels}."
            )
    height, width = size or (None, None)
    requests = [
        request if request.size is not None else replace(request, height=height, width=width) for request in requests
    ]
    limits_ns: list[int | None] = [None] * len(requests)
    if slo_seconds is not None:
        if not 1e-6 <= slo_seconds <= MAX_SLO_S:
            raise InputError(f"The SLO is {slo_seconds:g} s; a number from 0.000001 to {MAX_SLO_S} is needed.")
        limits_ns = [round(slo_seconds * NS_PER_S)] * len(requests)
    elif slo_multiple is not None:
        limits_ns = [round(slo_multiple * solo_ns) for solo_ns in solo_latencies_ns(requests, profile)]
    return [
        replace(request, slo_ns=limit_ns if request.slo_ns is None else request.slo_ns)
        for request, limit_ns in zip(requests, limits_ns, strict=True)
    ]


def at_its_resolutions(profile: Profile, requests: Sequence[Request]) -> Profile:
    """The profile as these requests need it: with one resolution where they have one."""
    sizes = {request.size for request in requests}
    return profile.only(next(iter(sizes))) if len(sizes) == 1 else profile


def limits_from(requests: Sequence[Request], slo_seconds: float | None, slo_multiple: float | None) -> str:
    """Where the requests' latency limits come from, for people."""
    own = sum(request.slo_ns is not None for request in requests)
    if own == len(requests):
        return "as the trace says"
    if slo_seconds is not None:
        rest = "as was asked for"
    else:
        rest = f"{slo_multiple or SLO_FACTOR:g} times the latency alone"
    return f"as the trace says, else {rest}" if own else rest


def fewer_steps(steps: int, scale: float) -> int:
    """That share of the steps, rounded, at least 1."""
    return max(1, round(steps * scale))


def with_fewer_steps(requests: list[Request], scale: float) -> list[Request]:
    """The requests with that share of their steps; their deadlines stay."""
    if scale == 1:
        return requests
    return [replace(request, steps=fewer_steps(request.steps, scale)) for request in requests]


def window_s(requests: Sequence[Request], window: tuple[float, float] | None) -> float:
    """Length of the stated window, else requests times the mean gap between the first arrival and the last.

    So a slice of a trace has the same load wherever it starts. InputError when all arrive at once.
    """
    if window is not None:
        return window[1] - window[0]
    if requests[-1].arrival_ns == requests[0].arrival_ns:
        raise InputError("all requests arrive at once, so the load is undefined; give a window or a time scale.")
    return len(requests) / rate_per_s(requests)


def stretch(
    requests: Sequence[Request],
    window: tuple[float, float] | None,
    load_within: Callable[[float], float],
    load: float | None,
    target_per_s: float | None,
    time_scale: float | None,
) -> tuple[float, float | None]:
    """(time scale, load) at the load, rate or time scale that is given, or as the requests are.

    ``load_within`` tells the load when they are offered within so many seconds. No load when all arrive at once.
    """
    given = {"--load": load, "--rate": target_per_s, "--time-scale": time_scale}
    flags = [flag for flag, value in given.items() if value is not None]
    if len(flags) > 1:
        raise InputError(f"{flags[0]} and {flags[1]} exclude each other; give one of them.")
    if load is not None:
        if not 0 < load <= 100:
            raise InputError(f"--load is {load:g}; a number above 0 and up to 100 is needed.")
        return load_within(window_s(requests, window)) / load, load
    scale = 1.0 if time_scale is None else time_scale
    check_time_scale(scale)
    if target_per_s is not None:
        scale = time_scale_for_rate(requests, target_per_s)
    if window is None and requests[-1].arrival_ns == requests[0].arrival_ns:
        return scale, None
    return scale, load_within(window_s(requests, window) * scale)
