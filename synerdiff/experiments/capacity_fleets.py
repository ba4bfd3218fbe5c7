"""Which fleet a capacity question tries for so many GPUs: equal workers, stages apart, or cards of two profiles."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import ceil

from synerdiff.config.capacity import Question, StageLayout
from synerdiff.config.cluster import Cluster, Pool, Stages, WorkerEntry
from synerdiff.config.experiment import PolicyEntry
from synerdiff.core import NS_PER_S, Request
from synerdiff.profile.capacity import by_resolution, default_batch, mix_of
from synerdiff.profile.tables import Profile

APART: dict[StageLayout, tuple[str, ...]] = {
    "together": (),
    "decode": ("decode",),
    "encode": ("encode",),
    "both": ("encode", "decode"),
}
"""Layout -> the stages that have GPUs of their own."""
TITLES: dict[StageLayout, str] = {
    "together": "",
    "decode": "decoders apart",
    "encode": "encoders apart",
    "both": "encoders and decoders apart",
}


def stage_seconds(requests: Sequence[Request], profile: Profile, batch: int | None) -> dict[str, float]:
    """GPU-seconds of all requests by stage: every prompt and decode alone, steps at full batches."""
    seconds = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
    for part, own in by_resolution(requests, profile):
        mix = mix_of(part)
        size = batch or default_batch(own, mix.sample_rows)
        rows = min(own.max_rows, size * mix.sample_rows)
        step_ns = (own.step_ns(rows) + own.overhead_ns("step_dispatch")) / size
        decode_ns = own.decode_ns() + own.overhead_ns("chunk_dispatch") + own.overhead_ns("sample_host")
        seconds["encode"] += len(part) * own.overhead_ns("text_encode") / NS_PER_S
        seconds["denoise"] += mix.sample_steps * step_ns / NS_PER_S
        seconds["decode"] += mix.images * decode_ns / NS_PER_S
    return seconds


def divided(gpus: int, seconds: dict[str, float]) -> dict[str, int] | None:
    """GPUs by stage, so that the busiest is as little busy as can be; ties to the first. None: too few for all."""
    if gpus < len(seconds):
        return None
    counts = dict.fromkeys(seconds, 1)
    for _ in range(gpus - len(seconds)):
        busiest = max(seconds, key=lambda stage: seconds[stage] / counts[stage])
        counts[busiest] += 1
    return counts


def division(gpus: int, layout: StageLayout, seconds: dict[str, float]) -> dict[str, int] | None:
    """The same for a layout: stages that are not apart lie with the workers, which denoise."""
    apart = APART[layout]
    with_workers = sum(value for stage, value in seconds.items() if stage == "denoise" or stage not in apart)
    return divided(gpus, {"denoise": with_workers} | {stage: seconds[stage] for stage in apart})


def fleet(question: Question, counts: dict[str, int]) -> Cluster:
    """Equal workers, and pools for the stages that are apart."""
    pools = {stage: Pool(count=count) for stage, count in counts.items() if stage != "denoise"}
    return Cluster(
        workers=tuple(WorkerEntry(denoise_gpu=index) for index in range(counts["denoise"])),
        stages=Stages(encode=pools.get("encode"), decode=pools.get("decode")) if pools else None,
        router=question.router,
        link=question.link,
    )


def mixed_fleet(question: Question, kinds: Sequence[tuple[str, int]]) -> Cluster:
    """Workers of several profiles: (folder, how many)."""
    names = [name for name, count in kinds for _ in range(count)]
    workers = tuple(WorkerEntry(denoise_gpu=index, profile=name) for index, name in enumerate(names))
    return Cluster(workers=workers, router=question.router)


def cheaper_mixes(
    alone: tuple[int, int], prices: tuple[float, float], best: float
) -> Generator[tuple[int, int], bool, tuple[int, int] | None]:
    """The cheapest mix of two cards that keeps the SLO, below the price ``best`` of an hour; None: there is none.

    ``alone``: how many of each keep it without the other. Yields (of the first, of the second) to try, and is told
    whether they keep it. More cards are taken never to harm; what costs too much is not tried.
    """
    found = None
    for first in range(alone[0] - 1, 0, -1):
        most = min(alone[1] - 1, ceil((best - first * prices[0]) / prices[1]) - 1)
        if most < 1 or not (yield first, most):
            continue
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if (yield first, middle) else (middle, high)
        found, best = (first, high), first * prices[0] + high * prices[1]
    return found


def entries_of(
    entries: Sequence[PolicyEntry], layouts: Sequence[StageLayout]
) -> dict[str, tuple[PolicyEntry, StageLayout]]:
    """Every policy under every layout, by its name."""
    found = {}
    for entry in entries:
        for layout in layouts:
            title = TITLES[layout]
            own = entry if not title else entry.model_copy(update={"label": f"{entry.name}, {title}"})
            found[own.name] = (own, layout)
    return found
