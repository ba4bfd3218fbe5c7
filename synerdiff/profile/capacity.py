"""Closed forms on a profile: what policies can sustain, what load a trace offers, how long a request takes alone.

Rates count samples (images) a second of one worker on one GPU. A step's rows vary with how many of its samples take
two rows; the means below are over a binomial number of them, exact when samples are mixed at random and, for one kind
of samples, always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import comb
from typing import Protocol

from synerdiff.core import NS_PER_S, InputError, Request
from synerdiff.profile.tables import Profile, Size

DEFAULT_BATCH = 8
"""Most samples in a step unless a policy is told otherwise."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What a trace asks for. A sample-step is one denoising step of one sample."""

    images: int
    sample_steps: int
    two_row_steps: int
    """Sample-steps that take two rows with full guidance."""

    @property
    def steps_mean(self) -> float:
        """Steps per image."""
        return self.sample_steps / self.images

    @property
    def two_row_share(self) -> float:
        """Share of the sample-steps that take two rows."""
        return self.two_row_steps / self.sample_steps

    @property
    def sample_rows(self) -> int:
        """Rows that a sample takes at most: 2, or 1 when everything is unguided."""
        return 2 if self.two_row_steps else 1


def mix_of(requests: Iterable[Request]) -> Mix:
    """The mix of a trace; InputError when it is empty."""
    images = sample_steps = two_row_steps = 0
    for request in requests:
        work = request.images * request.steps
        images += request.images
        sample_steps += work
        two_row_steps += work if request.guidance_scale > 1 else 0
    if not images:
        raise InputError("the trace has no requests, so it has no load.")
    return Mix(images, sample_steps, two_row_steps)


class HasRows(Protocol):
    """A profile, or a worker that serves one."""

    @property
    def max_rows(self) -> int:
        """Rows of the largest step."""


def most_samples(of: HasRows, sample_rows: int = 2) -> int:
    """Samples of so many rows in the largest step that there is."""
    return max(1, of.max_rows // sample_rows)


def default_batch(of: HasRows, sample_rows: int = 2) -> int:
    """Samples in a full step when nothing else is said: 8, or as many as the rows allow."""
    return min(DEFAULT_BATCH, most_samples(of, sample_rows))


def binomial_rows(batch: int, two_row_share: float) -> dict[int, float]:
    """Rows of a step -> share of the steps, when each of ``batch`` samples takes two rows with that probability."""
    shares = {
        batch + two: comb(batch, two) * two_row_share**two * (1 - two_row_share) ** (batch - two)
        for two in range(batch + 1)
    }
    return {rows: share for rows, share in shares.items() if share > 0}


def serial_capacity_samples_per_s(
    profile: Profile,
    steps_mean: float,
    batch: int,
    two_row_share: float = 1.0,
    chunking: str = "whole",
    rows: Mapping[int, float] | None = None,
) -> float:
    """X = 1 / (N * (mean T + step_dispatch) / B + sum(c_i + chunk_dispatch) + sample_host): every decode holds the
    denoise lane, and so does the host after it.

    ``two_row_share``: share of sample-steps that take two rows; skipping a fraction sigma of guided steps makes it
    1 - sigma. The mean is over ``rows`` (rows of a step -> share of the steps), by default the binomial mix of
    samples that skip independently of each other; samples that skip together have another one.
    """
    mix = binomial_rows(batch, two_row_share) if rows is None else rows
    decode_ns = _decode_ns(profile, chunking) + profile.overhead_ns("sample_host")
    return NS_PER_S / (denoise_ns(profile, steps_mean, batch, mix) + decode_ns)


def offered_load(
    requests: Iterable[Request], profile: Profile, window_s: float, workers: int = 1, batch: int | None = None
) -> float:
    """Offered sample-steps per second over the window / those that ``continuous-serial`` sustains on so many
    workers.

    Full guidance and the trace's own mix, at its default batch unless ``batch`` is given. 1.0 is saturation. Slowing
    the arrivals down by a factor f divides it by f.
    """
    requests = list(requests)
    mix = mix_of(requests)
    if window_s <= 0:
        raise InputError(f"the window is {window_s:g} s long, so it has no load; it must be longer than 0.")
    if profile.others:
        # Each resolution in batches of its own; every one adds the share of the time that it takes.
        return sum(offered_load(part, own, window_s, workers, batch) for part, own in by_resolution(requests, profile))
    size = default_batch(profile, mix.sample_rows) if batch is None else batch
    sustained = serial_capacity_samples_per_s(profile, mix.steps_mean, size, mix.two_row_share) * mix.steps_mean
    return mix.sample_steps / window_s / (sustained * workers)


def least_lane_s(
    requests: Iterable[Request], profile: Profile, skip_fraction: float = 0.0, steps_scale: float = 1.0
) -> float:
    """Seconds that the busier of the two lanes of one worker works on the requests at the least, whatever the policy.

    Every step at the rows that cost least per row, every decode alone; that share of the guided steps takes one row.
    """
    lanes = [_least_ns(part, own, skip_fraction, steps_scale) for part, own in by_resolution(requests, profile)]
    return max(sum(lane[0] for lane in lanes), sum(lane[1] for lane in lanes)) / NS_PER_S


def by_resolution(requests: Iterable[Request], profile: Profile) -> list[tuple[list[Request], Profile]]:
    """The requests of each resolution, with its tables; all of them where the profile has one. InputError for none."""
    parts: dict[Size | None, list[Request]] = {}
    for request in requests:
        parts.setdefault(request.size if profile.others else None, []).append(request)
    if not parts:
        raise InputError("the trace has no requests, so it has no load.")
    return [(part, profile.only(size)) for size, part in parts.items()]


def _least_ns(
    requests: Iterable[Request], profile: Profile, skip_fraction: float, steps_scale: float
) -> tuple[float, float]:
    """Work of the two lanes at one resolution."""
    mix = mix_of(requests)
    dispatch_ns = profile.overhead_ns("step_dispatch")
    sizes = profile.steps if profile.row_buckets is None else profile.row_buckets
    row_ns = min((profile.step_ns(rows) + dispatch_ns) / rows for rows in sizes)
    rows = mix.sample_steps + mix.two_row_steps * (1 - skip_fraction)
    return rows * steps_scale * row_ns, mix.images * min(_decode_ns(profile, cut) for cut in profile.chunkings)


def solo_latency_ns(request: Request, profile: Profile, batch: int | None = None) -> int:
    """Latency of the request alone on an idle worker under ``continuous-serial``, full guidance, to the nanosecond.

    text_encode, then waves of at most ``batch`` images (default: the default batch for its rows): all steps of a wave,
    its decodes one after the other, each with sample_host after it, then the next wave; at the end result_copy. With a
    decision lead only the first step of a wave is launched on an idle lane.
    """
    profile = profile.at(request.size)
    rows = 2 if request.guidance_scale > 1 else 1
    most = default_batch(profile, rows) if batch is None else min(batch, most_samples(profile, rows))
    total = profile.overhead_ns("text_encode") + profile.overhead_ns("result_copy")
    left = request.images
    while left:
        wave = min(left, most)
        total += request.steps * (profile.step_ns(wave * rows) + profile.overhead_ns("step_dispatch"))
        total += (1 if profile.overhead_ns("decision_lead") else request.steps) * profile.launch_ns(wave * rows)
        total += wave * (_decode_ns(profile, "whole") + profile.overhead_ns("sample_host"))
        left -= wave
    return total


def solo_latencies_ns(requests: Iterable[Request], profile: Profile) -> list[int]:
    """``solo_latency_ns`` of each request."""
    known: dict[tuple[int, int, bool, Size | None], int] = {}
    latencies = []
    for request in requests:
        kind = (request.steps, request.images, request.guidance_scale > 1, request.size)
        if kind not in known:
            known[kind] = solo_latency_ns(request, profile)
        latencies.append(known[kind])
    return latencies


def _decode_ns(profile: Profile, chunking: str) -> int:
    """All chunks of a decode with their dispatch."""
    return profile.decode_ns(chunking) + profile.chunk_count(chunking) * profile.overhead_ns("chunk_dispatch")


def denoise_ns(profile: Profile, steps_mean: float, batch: int, rows: Mapping[int, float]) -> float:
    """Denoise-lane time per sample at full batches."""
    step_ns = mean_over(profile.step_ns, rows) + profile.overhead_ns("step_dispatch")
    if not profile.overhead_ns("decision_lead"):
        step_ns += mean_over(profile.launch_ns, rows)
    return steps_mean * step_ns / batch


def mean_over(value: Callable[[int], float], rows: Mapping[int, float]) -> float:
    """Mean of value(rows) over the shares of the row counts."""
    return sum(share * value(count) for count, share in rows.items())
