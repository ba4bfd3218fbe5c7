"""Closed forms that simulated and measured runs are held against."""

from __future__ import annotations

from collections.abc import Mapping

from synerdiff.core import NS_PER_S, PPM
from synerdiff.profile.capacity import binomial_rows, denoise_ns, mean_over
from synerdiff.profile.tables import Profile


def parallel_capacity_samples_per_s(
    profile: Profile,
    steps_mean: float,
    batch: int,
    two_row_share: float = 1.0,
    chunking: str = "whole",
    lanes: int = 1,
    rows: Mapping[int, float] | None = None,
) -> float:
    """X = min(1 / (N * (mean T + step_dispatch) / B + sum(delta_i)), m / sum(c_i * s_v)): every decode runs beside.

    delta_i = c_i * s_v * (1 - 1/s_u) is the denoise time lost by running chunk i beside; c_i includes its dispatch.
    The decode queue is unbounded, and the host's time per sample is left out. With several lanes the loss is priced as
    if chunks ran one at a time. ``rows`` as for ``serial_capacity_samples_per_s``.
    """
    mix = binomial_rows(batch, two_row_share) if rows is None else rows
    chunks = [
        (i, profile.chunk_ns(chunking, i) + profile.overhead_ns("chunk_dispatch"))
        for i in range(profile.chunk_count(chunking))
    ]

    def lost_ns(rows: int) -> float:
        total = 0.0
        for i, alone_ns in chunks:
            s_u, s_v = profile.slowdown_ppm(rows, chunking, i)
            total += alone_ns * (s_v / PPM) * (1 - PPM / s_u)
        return total

    def decoding_ns(rows: int) -> float:
        return sum(alone_ns * profile.slowdown_ppm(rows, chunking, i)[1] / PPM for i, alone_ns in chunks)

    step_ns = denoise_ns(profile, steps_mean, batch, mix) + mean_over(lost_ns, mix)
    return min(NS_PER_S / step_ns, lanes * NS_PER_S / mean_over(decoding_ns, mix))
