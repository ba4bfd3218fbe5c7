"""Where each strategy pays: LoRA share x load x number of GPUs, every set of strategies on the same arrivals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from synerdiff.core import NS_PER_S, ControlNetUse, InputError, LoraUse, Request
from synerdiff.experiments.adapter_mix import MIXES, adapter_sets
from synerdiff.experiments.backends import Backend
from synerdiff.experiments.h800 import LORA_MIB, h800_adapters, h800_profile
from synerdiff.experiments.layouts import BASELINE, SETS, Demand, layout, worker_image_s
from synerdiff.files import read_yaml, write_rows
from synerdiff.schema import Listed, Section, validated

SYSTEM = "katz"
"""Every set runs on the compiled denoiser, so that only the strategies differ."""
CONTROLNETS = tuple(f"controlnet{rank}" for rank in range(1, 17))
SATURATED = 0.0
"""As a load: everything arrives at once."""


class SwiftStudy(Section):
    """The study's file: lists are the axes of the grid."""

    service: str = "A"
    gpus: Listed[Annotated[int, Field(ge=4, le=1024)]] = Field((4, 8, 16), min_length=1)
    lora_shares: Listed[Annotated[float, Field(ge=0, le=1)]] = (0.0, 0.5, 1.0)
    loads: Listed[Annotated[float, Field(gt=0, le=5)]] = (0.1, 0.3, 0.6, 0.9)
    seeds: Listed[Annotated[int, Field(ge=0)]] = (1, 2)
    requests: int = Field(300, ge=50, le=1_000_000)
    steps: int = Field(50, ge=1, le=1000)
    host_cache_mib: float = Field(15_200, ge=0)
    """Per worker: 40 LoRAs."""


def load_study(path: Path) -> SwiftStudy:
    """Read the study's file; InputError names the field that is wrong."""
    study = validated(SwiftStudy, read_yaml(path, "study file"), str(path))
    if (study.service, "lora") not in MIXES:
        raise InputError(f"{path}: service is '{study.service}'; allowed are A and B.")
    return study


@dataclass(frozen=True, slots=True)
class Point:
    """One run: a set of strategies at one place of the grid. ``load`` is relative to the baseline's capacity."""

    study: SwiftStudy
    strategies: str
    gpus: int
    lora_share: float
    load: float
    seed: int


@dataclass(frozen=True, slots=True)
class StudyRow:
    """What a run gave. Latency over the requests after the first 10% and before the last 5%."""

    strategies: str
    gpus: int
    lora_share: float
    load: float
    seed: int
    workers: int
    services: int
    latency_mean_s: float
    latency_p99_s: float
    gpu_seconds_per_image: float
    busy_gpu_seconds_per_image: float
    lora_reads_per_request: float


def points(study: SwiftStudy) -> list[Point]:
    """All runs, largest clusters first; at saturation one seed is enough."""
    return [
        Point(study, name, gpus, share, load, seed)
        for gpus in sorted(study.gpus, reverse=True)
        for share in study.lora_shares
        for name in SETS
        for load in (*study.loads, SATURATED)
        for seed in (study.seeds if load else study.seeds[:1])
    ]


def demand_of(study: SwiftStudy, lora_share: float) -> Demand:
    controlnets, loras = MIXES[study.service, "controlnet"], MIXES[study.service, "lora"]
    return Demand(study.steps, controlnets.per_request, loras.per_request, lora_share)


def requests_of(point: Point, rate_per_s: float) -> list[Request]:
    """Poisson arrivals; adapters of the service's production mix. The same for every set of strategies."""
    study = point.study
    arrivals, wishes = random.Random(point.seed), random.Random(point.seed + 1_000_000)
    loras = adapter_sets(study.service, "lora", point.seed)
    controlnets = adapter_sets(study.service, "controlnet", point.seed)
    now_s = 0.0
    found = []
    for number in range(study.requests):
        now_s += 0.0 if point.load == SATURATED else arrivals.expovariate(rate_per_s)
        with_loras = wishes.random() < point.lora_share
        found.append(
            Request(
                number,
                round(now_s * NS_PER_S),
                study.steps,
                loras=tuple(map(LoraUse, next(loras))) if with_loras else (),
                controlnets=tuple(map(ControlNetUse, next(controlnets))),
            )
        )
    return found


def run_point(point: Point) -> StudyRow:
    """Simulate one point: batch 1, decodes between steps, the shortest queue."""
    from policies.registry import build_policy
    from policies.routers import ShortestQueue
    from simulator import simulate_cluster

    profile, adapters = h800_profile(SYSTEM), h800_adapters(SYSTEM)
    study = point.study
    demand = demand_of(study, point.lora_share)
    lora_mib = LORA_MIB[1]
    rate_per_s = point.load * point.gpus / worker_image_s((), demand, profile, adapters, lora_mib << 20)
    cluster = layout(
        point.gpus, SETS[point.strategies], demand, profile, adapters, lora_mib, study.host_cache_mib, CONTROLNETS
    )
    result = simulate_cluster(
        requests_of(point, rate_per_s),
        lambda: build_policy("continuous-serial", {"batch": 1}),
        profile,
        cluster,
        adapters=adapters,
        router=ShortestQueue(),
    )
    latencies = [(record.finished_ns - record.request.arrival_ns) / NS_PER_S for record in result.run.requests]
    kept = sorted(latencies[len(latencies) // 10 : len(latencies) - len(latencies) // 20])
    return StudyRow(
        strategies=point.strategies,
        gpus=point.gpus,
        lora_share=point.lora_share,
        load=point.load,
        seed=point.seed,
        workers=len(cluster.workers),
        services=len(cluster.controlnet_services),
        latency_mean_s=fmean(kept),
        latency_p99_s=kept[min(len(kept) - 1, len(kept) * 99 // 100)],
        # The GPUs that the set was given, also when an odd one is left over.
        gpu_seconds_per_image=point.gpus * result.run.end_ns / NS_PER_S / study.requests,
        busy_gpu_seconds_per_image=result.busy_gpu_seconds_per_image or 0.0,
        lora_reads_per_request=result.lora_reads / study.requests,
    )


def run_grid(
    study: SwiftStudy, backend: Backend, on_progress: Callable[[int, int], None] | None = None
) -> list[StudyRow]:
    """All points, in the order of ``points``."""
    wanted = points(study)
    rows: list[StudyRow] = []
    for row in backend.run_unordered(run_point, wanted):
        rows.append(row)
        if on_progress is not None:
            on_progress(len(rows), len(wanted))
    place = {(p.strategies, p.gpus, p.lora_share, p.load, p.seed): number for number, p in enumerate(wanted)}
    return sorted(rows, key=lambda row: place[row.strategies, row.gpus, row.lora_share, row.load, row.seed])


def speedups(rows: Iterable[StudyRow]) -> list[dict[str, Any]]:
    """Per set, GPUs, LoRA share and load: the baseline's mean latency / the set's, geometric mean over seeds.

    At saturation (load 0) it is the baseline's GPU-seconds per image / the set's.
    """
    from math import exp, log

    table = {(r.strategies, r.gpus, r.lora_share, r.load, r.seed): r for r in rows}
    ratios: dict[tuple[str, int, float, float], list[float]] = {}
    for (name, gpus, share, load, seed), row in table.items():
        base = table[BASELINE, gpus, share, load, seed]
        if load == SATURATED:
            ratio = base.gpu_seconds_per_image / row.gpu_seconds_per_image
        else:
            ratio = base.latency_mean_s / row.latency_mean_s
        ratios.setdefault((name, gpus, share, load), []).append(log(ratio))
    return [
        {"strategies": name, "gpus": gpus, "lora_share": share, "load": load, "speedup": exp(fmean(found))}
        for (name, gpus, share, load), found in ratios.items()
    ]


def write_runs(path: Path, rows: Iterable[StudyRow]) -> None:
    """The runs as CSV, in one step."""
    write_rows(path, [field.name for field in fields(StudyRow)], [list(asdict(row).values()) for row in rows])
