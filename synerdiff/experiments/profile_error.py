"""What a run's numbers would be if all times of its profile were off: the band of its mean, P50, P99 and capacity.

Arrivals stay, and the policy plans with the times that it believes; the engine takes the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from synerdiff.core import InputError
from synerdiff.experiments.run import Prepared, execute
from synerdiff.files import number, shown
from synerdiff.profile.scaling import all_times_scaled, own_band
from synerdiff.profile.tables import Band
from synerdiff.results.folder import state

MOST_IMAGES = 2000
"""Of a run whose band is shown although nobody asked: it takes two more runs."""
MOST_PERCENT = 90.0
METRICS = ("request_latency_mean_s", "request_latency_p50_s", "request_latency_p99_s")


def asked_band(text: str | None, prepared: Prepared) -> Band | None:
    """``2%``: all times 2% shorter to 2% longer; ``0``: none; nothing: the profile's own, for a run of 2,000 images or
    fewer; ``own``: for any run. InputError for another text, and for ``own`` where the profile has none."""
    if text in (None, "own"):
        if text is None and prepared.images > MOST_IMAGES:
            return None
        band = own_band(prepared.profile)
        if band is None and text == "own":
            raise InputError(
                f"--profile-error own: profile '{prepared.profile.name}' does not say how far its times may be off."
            )
        return band
    try:
        percent = number(str(text).removesuffix("%"), 0, MOST_PERCENT)
        if percent and not str(text).endswith("%"):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--profile-error is {shown(str(text))}; allowed are own, 0 and a share up to {MOST_PERCENT:g}%, like 2%."
        ) from None
    return Band(low=1 - percent / 100, high=1 + percent / 100, meaning="as was asked for") if percent else None


def at_times(prepared: Prepared, factor: float) -> Prepared:
    """The run with all times multiplied, and policies that plan with what they were; where workers have times of their
    own, they plan with those that they get."""
    cluster, spec = prepared.spec.cluster, prepared.spec
    if cluster is None or not (cluster.profiles or any(worker.degree > 1 for worker in cluster.workers)):
        spec = replace(spec, planning=spec.planning or prepared.profile)
    others = {name: all_times_scaled(other, factor) for name, other in prepared.profiles.items()}
    return replace(prepared, spec=spec, profile=all_times_scaled(prepared.profile, factor), profiles=others)


def banded(prepared: Prepared, band: Band) -> dict[str, Any]:
    """The run at both ends of the band, at the shorter times first: each metric in seconds, the capacity in requests a
    second, and the word; ready for JSON."""
    ends = [execute(at_times(prepared, factor)).described for factor in (band.low, band.high)]
    capacities = [end["run"]["policy_capacity_per_s"] for end in ends]
    loads = [end["run"]["policy_load"] for end in ends]
    return {
        "times": [band.low, band.high],
        "source": band.meaning,
        **{name: [end[name] for end in ends] for name in METRICS},
        "policy_capacity_per_s": capacities,
        "state": [None if load is None else state(load, end) for load, end in zip(loads, ends, strict=True)],
    }
