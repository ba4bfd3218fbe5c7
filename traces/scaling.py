"""Makes a trace faster or slower by stretching its time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from synerdiff.core import NS_PER_S, InputError, Request

_MAX_NS = 2**63 - 1


def scaled(requests: Sequence[Request], time_scale: float) -> list[Request]:
    """Every arrival at round(arrival_s * time_scale * 10^9) ns; below 1 the trace gets faster."""
    check_time_scale(time_scale)
    return [replace(request, arrival_ns=scaled_ns(request.arrival_ns, time_scale)) for request in requests]


def rate_per_s(requests: Sequence[Request]) -> float:
    """Mean arrival rate, (n - 1) / (last arrival - first arrival); InputError when that span is empty."""
    span_ns = requests[-1].arrival_ns - requests[0].arrival_ns if requests else 0
    if span_ns <= 0:
        raise InputError("The rate of this trace is undefined: it needs two requests at different times.")
    return (len(requests) - 1) * NS_PER_S / span_ns


def time_scale_for_rate(requests: Sequence[Request], target_per_s: float) -> float:
    """The time scale at which the trace has that mean rate."""
    if not (math.isfinite(target_per_s) and target_per_s > 0):
        raise InputError(f"The rate is {target_per_s:g} per second; a finite number above 0 is needed.")
    return rate_per_s(requests) / target_per_s


def scale_to_rate(requests: Sequence[Request], target_per_s: float) -> list[Request]:
    """The trace at another mean rate: the same requests, all gaps stretched alike."""
    return scaled(requests, time_scale_for_rate(requests, target_per_s))


def check_time_scale(time_scale: float) -> None:
    """InputError unless the scale is a finite number above 0."""
    if not (math.isfinite(time_scale) and time_scale > 0):
        raise InputError(f"The time scale is {time_scale:g}; a finite number above 0 is needed.")


def scaled_ns(arrival_ns: int, time_scale: float) -> int:
    """round(arrival_s * time_scale * 10^9), exact for a scale of 1."""
    if time_scale == 1:
        return arrival_ns
    value = arrival_ns / NS_PER_S * time_scale * NS_PER_S
    if value > _MAX_NS:
        raise InputError(f"With a time scale of {time_scale:g} the trace is longer than 292 years.")
    return round(value)


def cut_window(requests: tuple[Request, ...], window: tuple[float, float] | None, where: str) -> tuple[Request, ...]:
    """The arrivals with a <= arrival_s < b for the window (a, b), shifted so that a becomes 0 and numbered from 0.

    InputError, which starts with ``where``, for a window that is none and when no request is left.
    """
    if window is None:
        return requests
    start_s, end_s = window
    if not 0 <= start_s < end_s < math.inf:
        raise InputError(f"The window {start_s:g}:{end_s:g} is not allowed; give 0 <= start < end, in seconds.")
    start_ns, end_ns = round(start_s * NS_PER_S), round(end_s * NS_PER_S)
    inside = [request for request in requests if start_ns <= request.arrival_ns < end_ns]
    if not inside:
        raise InputError(
            f"{where}: no request arrives in the window {start_s:g}:{end_s:g} s; "
            f"the last one of the trace arrives at {requests[-1].arrival_ns / NS_PER_S:g} s."
        )
    return tuple(
        [
            replace(request, request_id=index, arrival_ns=request.arrival_ns - start_ns)
            for index, request in enumerate(inside)
        ]
    )
