"""One simulated run: fit requests to a profile and a load, simulate, measure. ``simulate`` and ``sweep`` share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.core import NO_SKIPS, NS_PER_S, InputError, Request, RunResult, SkipBudget
from synerdiff.profile.capacity import offered_load, solo_latency_ns
from synerdiff.profile.tables import Profile

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run is made of besides its requests and its profile."""

    policy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    decode_gpus: tuple[int, ...] = (0,)
    budget: SkipBudget = NO_SKIPS
    dispersion_seed: int | None = None
    """Seed of the drawn times; None: every piece takes its median."""
    base_folder: Path | None = None
    """Where a ``module:Class`` of the user's own is looked up besides the import path."""


def window_s(requests: Sequence[Request], window: tuple[float, float] | None) -> float:
    """Length of the stated window, else the time from 0 to the last arrival; InputError when that is nothing."""
    if window is not None:
        return window[1] - window[0]
    last_s = requests[-1].arrival_ns / NS_PER_S
    if last_s <= 0:
        raise InputError("all requests arrive at 0 s, so the load is undefined; give a window or a time scale.")
    return last_s


def time_scale_for_load(
    requests: Sequence[Request], profile: Profile, load: float, window: tuple[float, float] | None = None
) -> float:
    """The time scale at which these requests offer that load (``capacity.offered_load``)."""
    return offered_load(requests, profile, window_s(requests, window)) / load


def at_load(
    requests: Sequence[Request],
    profile: Profile,
    load: float | None,
    time_scale: float | None,
    window: tuple[float, float] | None,
) -> tuple[list[Request], float, float | None]:
    """(requests, time scale, load) at either the load or the time scale that is given, or as they are.

    The load is None when all requests arrive at once and no load is defined. InputError when both are given.
    """
    from traces.scaling import scaled

    if load is not None and time_scale is not None:
        raise InputError("--load and --time-scale exclude each other; give one of them.")
    if load is not None and not 0 < load <= 100:
        raise InputError(f"--load is {load:g}; a number above 0 and up to 100 is needed.")
    scale = 1.0 if time_scale is None else time_scale
    if load is not None:
        scale = time_scale_for_load(requests, profile, load, window)
    elif window is not None or requests[-1].arrival_ns > 0:
        load = time_scale_for_load(requests, profile, scale, window)
    return scaled(requests, scale), scale, load


def fitted(
    requests: Sequence[Request], profile: Profile, slo_seconds: float | None = None, slo_multiple: float | None = None
) -> list[Request]:
    """The requests as this profile serves them: an empty height and width become its resolution, any other is refused.

    A request without an SLO of its own gets ``slo_seconds``, or ``slo_multiple`` times its solo latency; when both are
    None it has none, and policies see no deadline.
    """
    size = profile.head.size
    solo: dict[tuple[int, int, bool], int] = {}
    found = []
    for request in requests:
        if (request.height, request.width) not in ((None, None), size):
            raise InputError(
                f"request {request.request_id} asks for {request.height}x{request.width} pixels; profile "
                f"'{profile.name}' was made for {profile.head.pixels}."
            )
        slo_ns = request.slo_ns
        if slo_ns is None and slo_seconds is not None:
            slo_ns = round(slo_seconds * NS_PER_S)
        elif slo_ns is None and slo_multiple is not None:
            slo_ns = round(slo_multiple * _solo_ns(request, profile, solo))
        found.append(replace(request, height=size and size[0], width=size and size[1], slo_ns=slo_ns))
    return found


def fewer_steps(steps: int, scale: float) -> int:
    """That share of the steps, rounded, at least 1."""
    return max(1, round(steps * scale))


def with_fewer_steps(requests: Sequence[Request], scale: float) -> list[Request]:
    """The requests with that share of their steps; their deadlines stay."""
    return [replace(request, steps=fewer_steps(request.steps, scale)) for request in requests]


def _solo_ns(request: Request, profile: Profile, known: dict[tuple[int, int, bool], int]) -> int:
    kind = (request.steps, request.images, request.guidance_scale > 1)
    if kind not in known:
        known[kind] = solo_latency_ns(request, profile)
    return known[kind]


def run_simulated(
    requests: Sequence[Request],
    profile: Profile,
    setup: Setup,
    on_progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Simulate one run with a fresh policy object; ``on_progress`` hears how many samples have ended."""
    from policies.registry import build_policy
    from simulator import simulate

    return simulate(
        requests,
        build_policy(setup.policy, dict(setup.parameters), setup.base_folder),
        profile,
        decode_gpus=setup.decode_gpus,
        budget=setup.budget,
        dispersion_seed=setup.dispersion_seed,
        on_progress=on_progress,
    )


def summary_of(
    request_frame: pandas.DataFrame,
    work_frame: pandas.DataFrame,
    requests: Sequence[Request],
    profile: Profile,
    load: float | None = None,
) -> dict[str, Any]:
    """The metrics of a run (``metrics.summarize``), ready for JSON."""
    from synerdiff.results.metrics import summarize

    known: dict[tuple[int, int, bool], int] = {}
    solo_s = [_solo_ns(request, profile, known) / NS_PER_S for request in requests]
    return summarize(request_frame, work_frame, solo_s, load)
