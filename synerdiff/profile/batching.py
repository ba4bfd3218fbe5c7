"""Whether batching pays: images a second and latency by batch size, at each resolution of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from synerdiff.profile.capacity import serial_capacity_samples_per_s
from synerdiff.profile.tables import Profile, Spread, pixels_of

ENOUGH = 0.95
"""Share of the most images a second that the smallest worthwhile batch reaches."""


class BatchPoint(NamedTuple):
    """``continuous-serial`` at full batches of one size."""

    resolution: str
    batch: int
    images_per_s: float
    low: float
    high: float
    """Images a second with the profile's own error: `band_meaning`."""
    latency_s: float
    """From admission to the end of the decode: batch / images_per_s (Little's law), queueing not included."""


def band_meaning(profile: Profile) -> str:
    """What the band of its images a second is, for people."""
    band = profile.head.band
    if band is None:
        return "all times at their p10, and at their p90"
    if profile.estimated:
        return f"8 of 10 published times lie at {band.low:g} to {band.high:g} of such estimates, all batches together"
    return f"all times x {band.low:g} to {band.high:g}, as the profile says, all batches together"


def batch_points(profile: Profile, steps: int, guided: bool = True) -> list[BatchPoint]:
    """Each resolution at each batch that fills a row bucket exactly (without buckets: a measured number of rows).

    A guided image takes two rows of a step. Images a second: `capacity.serial_capacity_samples_per_s`, every decode
    between steps.
    """
    points, band = [], profile.head.band
    for one in (profile, *profile.others.values()):
        at = pixels_of(one.head.resolutions[0]) if one.head.resolutions else ""
        rows = one.steps if one.row_buckets is None else one.row_buckets
        for batch in [count // (1 + guided) for count in rows if count % (1 + guided) == 0]:
            rate, low, high = (
                serial_capacity_samples_per_s(times, steps, batch, float(guided))
                for times in (one, _ends(one, "p90"), _ends(one, "p10"))
            )
            if band is not None:
                low, high = rate / band.high, rate / band.low
            points.append(BatchPoint(at, batch, rate, low, high, batch / rate))
    return points


def _ends(profile: Profile, end: str) -> Profile:
    """With every time at its p10, or at its p90."""

    def only(spread: Spread) -> Spread:
        return spread._replace(median=getattr(spread, end))

    return replace(
        profile,
        steps={rows: only(spread) for rows, spread in profile.steps.items()},
        chunks={name: tuple(map(only, spreads)) for name, spreads in profile.chunks.items()},
    )


def best_point(points: Sequence[BatchPoint], slo_s: float | None) -> BatchPoint | None:
    """Of one resolution: the smallest batch with at least 95% of the most images a second among those whose latency is
    within the limit; None when no batch is."""
    allowed = [point for point in points if slo_s is None or point.latency_s <= slo_s]
    most = max((point.images_per_s for point in allowed), default=0.0)
    return min((p for p in allowed if p.images_per_s >= ENOUGH * most), key=lambda p: p.batch, default=None)


def sentence(points: Sequence[BatchPoint], slo_s: float | None) -> str:
    """The answer for one resolution."""
    best, one = best_point(points, slo_s), min(points, key=lambda point: point.batch)
    at, limit = points[0].resolution, "" if slo_s is None else f" within {slo_s:g} s"
    if best is None:
        return f"{at}: no batch is served{limit}; one image takes {one.latency_s:.3g} s."
    gain, largest = best.images_per_s / one.images_per_s, max(points, key=lambda point: point.images_per_s)
    most = f"at most {largest.images_per_s / one.images_per_s:.2f}x at batch {largest.batch}"
    if best.batch == one.batch:
        return f"{at}: batching does not pay{limit}: {most}, so batch {one.batch}, {one.images_per_s:.3g} images/s."
    return (
        f"{at}: batching pays{limit}: batch {best.batch} gives {best.images_per_s:.3g} images/s, {gain:.2f}x those of "
        f"batch {one.batch}, at {best.latency_s:.3g} s an image ({most})."
    )
