"""The one way from request to result: ``RunSpec`` -> ``prepare`` -> ``execute`` -> ``Outcome``, and its folder.

Commands, sweeps and studies go it; only the engine differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from policies.base import Policy
from policies.registry import build_policy
from policies.routers import Router, build_router
from policies.shared_queue import SharedQueue
from simulator import simulate, simulate_cluster
from synerdiff.config.cluster import Cluster, Kind, RouterEntry
from synerdiff.core import (
    NO_SKIPS,
    NS_PER_S,
    PPM,
    Decision,
    InputError,
    Request,
    RunResult,
    SkipBudget,
    View,
    WorkerInfo,
)
from synerdiff.diffusion import SCHEDULERS
from synerdiff.experiments.offer import at_its_resolutions, fitted, limits_from, stretch, window_s, with_fewer_steps
from synerdiff.experiments.sources import Arrivals, Source, arrivals
from synerdiff.fidelity.floor import FloorChoice, floor_for_requests
from synerdiff.profile.adapters import Adapters, load_adapters
from synerdiff.profile.capacity import default_batch, mix_of, offered_load, solo_latencies_ns
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.scaling import scaled_profile
from synerdiff.profile.tables import Profile, pixels_of
from synerdiff.results import folder, records
from synerdiff.results.metrics import mean_interval, measured, saturation_throughput, summarize
from synerdiff.results.metrics import slo_s as limits_s
from traces.scaling import rate_per_s, scaled

if TYPE_CHECKING:
    import pandas
    import pyarrow

CAPACITY_IMAGES = 200
"""Per worker: how many wait at least from the start where a policy's capacity is asked for."""
OWN_IMAGES = 800
"""As many of the run's own, where it has them: the first 200 of a mixed trace were off by 10%, 800 by 2%."""
MOST_CAPACITY_IMAGES = 4000
MOST_CONCURRENCY = 1_000_000
FLEET_FACTS = (
    *("gpus", "gpu_seconds_per_image", "busy_gpu_seconds_per_image"),
    *("lora_requested", "lora_reads", "lora_copies", "controlnet_loads"),
)
OnProgress = Callable[[int], None]
"""Hears how many samples have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What one run is made of: all that another process needs to compute it."""

    profile: Path | Profile
    """The profile's folder, or the profile itself."""
    profile_hash: str | None = None
    """The content that the folder must still hold; None: whatever it holds."""
    adapters: Adapters | None = None
    """What adapters cost, where the profile has no folder to say it."""
    free_adapters: bool = False
    """Where nothing says what they cost, a cluster serves LoRAs and ControlNets at no cost, as one worker does."""
    contention: float = 1.0
    decode_share: float = 1.0
    """What the profile is scaled by (``scaling.scaled_profile``)."""
    source: Source | Arrivals | tuple[Request, ...]
    """Where the requests come from, or the requests themselves, as they arrive before any stretching."""
    policy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    base_folder: Path | None = None
    """Where a ``module:Class`` of the user's own is looked up besides the import path."""
    decode_gpus: tuple[int, ...] = (0,)
    """The GPU of each decode lane of the one worker; a cluster lists its own."""
    cluster: Cluster | None = None
    worker_hashes: Mapping[str, str] = field(default_factory=dict)
    """Profile that the cluster names -> the content that its folder must still hold; missing: whatever it holds."""
    router: str | None = None
    """Instead of the cluster's own."""
    budget: SkipBudget = NO_SKIPS
    min_ssim: float | None = None
    """Floor on image fidelity, which chooses the budget from a fidelity table instead."""
    fidelity: Path | None = None
    """Folder of that table; None: beside the profile, else the one of its model."""
    scheduler: str | None = None
    """Of the images, for the fidelity table; None: the table's own."""
    load: float | None = None
    rate_per_s: float | None = None
    time_scale: float | None = None
    """How the arrivals are stretched: at most one of the three. In a closed loop ``time_scale`` may be 0: all wait."""
    max_concurrency: int | None = None
    """A closed loop: a request is sent when fewer than so many are in the system, at its arrival at the earliest."""
    steps_scale: float = 1.0
    """Below 1: requests take that share of their steps; their deadlines stay."""
    slo_seconds: float | None = None
    slo_multiple: float | None = None
    """Limit of a request without one of its own: seconds, or times its latency alone. Neither: policies see none."""
    dispersion_seed: int | None = None
    """Seed of the drawn times; None: every piece takes its median."""
    planning: Profile | None = None
    """What policies plan with; None: the profile whose times the engine takes."""

    @property
    def router_entry(self) -> RouterEntry:
        """The router of its name, else the cluster's."""
        if self.router is not None:
            return RouterEntry(kind=self.router)
        return RouterEntry(kind="round-robin") if self.cluster is None else self.cluster.router


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready for an engine."""

    spec: RunSpec
    profile: Profile
    adapters: Adapters | None
    requests: list[Request]
    """At the run's load, each with its resolution and SLO, and with the steps that were asked for."""
    served: list[Request]
    """The same, with the steps that are taken."""
    budget: SkipBudget
    floor: FloorChoice | None
    window: tuple[float, float] | None
    slo_from: str
    """Where the requests' latency limits come from."""
    read_as: tuple[str, ...] = ()
    """How a trace of another dialect was understood, for people."""
    time_scale: float = 1.0
    load: float | None = None
    """None when all requests arrive at once, and in a closed loop."""
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    """Those that the cluster names."""

    @property
    def workers(self) -> int:
        """Workers of its fleet, 1 without one."""
        return 1 if self.spec.cluster is None else len(self.spec.cluster.workers)

    @property
    def images(self) -> int:
        return sum(request.images for request in self.served)

    @property
    def rate_per_s(self) -> float | None:
        """Requests a second that are offered; None when all arrive at once, and in a closed loop."""
        if self.load is None:
            return None
        window = self.window
        if window is None:
            return rate_per_s(self.requests)
        return len(self.requests) / window_s(self.requests, window) / self.time_scale

    def load_of(self, length_s: float) -> float:
        """The load when the requests are offered within that time (``capacity.offered_load``): 1 is what as many
        single workers as the cluster has GPUs for steps, encoding and decoding sustain."""
        cluster = self.spec.cluster
        if cluster is None:
            return offered_load(self.requests, self.profile, length_s)
        loads = []
        for (name, speed, host_s), count in cluster.kinds.items():
            kind = Kind(profile=name, speed=speed, sample_host_s=host_s)
            loads.append(offered_load(self.requests, kind.served(self.profile, self.profiles), length_s, count))
        return loads[0] if len(loads) == 1 else 1 / sum(1 / load for load in loads)

    def solo_latencies_s(self) -> list[float]:
        """Of each request, its latency alone with the steps that were asked for."""
        return [latency_ns / NS_PER_S for latency_ns in solo_latencies_ns(self.requests, self.profile)]

    def policy(self) -> Policy:
        """A fresh one: every worker has its own."""
        policy = build_policy(self.spec.policy, dict(self.spec.parameters), self.spec.base_folder)
        return policy if self.spec.planning is None else Planned(policy, self.spec.planning.lent())

    def router(self) -> Router | SharedQueue:
        """A fresh one."""
        entry = self.spec.router_entry
        return build_router(entry.kind, **entry.parameters)

    def with_parameters(self, **parameters: Any) -> Prepared:
        """The same run with other parameters of its policy."""
        return replace(self, spec=replace(self.spec, parameters={**self.spec.parameters, **parameters}))

    def at_once(self, images: int) -> Prepared:
        """So many images of the run's requests, over and over if need be, all there from the start."""
        taken: list[Request] = []
        while images > 0:
            request = self.requests[len(taken) % len(self.requests)]
            taken.append(replace(request, request_id=len(taken), arrival_ns=0))
            images -= request.images
        return replace(
            self,
            spec=replace(self.spec, max_concurrency=None),
            requests=taken,
            served=with_fewer_steps(taken, self.spec.steps_scale),
            time_scale=0.0,
            load=None,
        )

    def described(self) -> dict[str, Any]:
        """What was run, for ``summary.json``."""
        spec = self.spec
        source = spec.source if isinstance(spec.source, Source) else None
        known = {
            "profile": self.profile.name,
            "provenance": self.profile.provenance,
            "trace": source.name if source is not None else None,
            "window_s": self.window,
            "time_scale": self.time_scale,
            "max_concurrency": spec.max_concurrency,
            "load": self.load,
            "load_batch": default_batch(self.profile, mix_of(self.requests).sample_rows),
            "rate_per_s": self.rate_per_s,
            "slo": self.slo_from,
            "policy": spec.policy,
            "parameters": dict(spec.parameters),
            "skip_fraction_allowed": self.budget.fraction_ppm / PPM,
            "min_ssim": spec.min_ssim,
            "dispersion_seed": spec.dispersion_seed,
        }
        if spec.cluster is None:
            return known | {"decode_gpus": list(spec.decode_gpus)}
        router = spec.router_entry
        return known | {
            "router": {"kind": router.kind, **router.parameters} if router.parameters else router.kind,
            "cluster": spec.cluster.model_dump(mode="json", exclude={"router"}),
        }


class Planned:
    """A policy that plans with a profile of its own, whatever the engine's times are."""

    def __init__(self, inner: Policy, planning: Profile) -> None:
        self.inner, self.planning = inner, planning
        self.NAME = getattr(inner, "NAME", "") or type(inner).__name__
        self.chunking = inner.chunking

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.inner.reset(worker, self.planning.on_worker(profile.speed_ppm))
        self.chunking = self.inner.chunking

    def decide(self, view: View) -> Decision:
        return self.inner.decide(view)


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine gives back."""

    result: RunResult
    worker_of: Sequence[int] | None = None
    """The worker of each request, in trace order; None: all had the one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What only this engine knows, ready for JSON."""


class Engine(Protocol):
    """Serves a prepared run: the simulator, or hardware."""

    def __call__(self, prepared: Prepared, on_progress: OnProgress | None = None, /) -> Served: ...


@dataclass(frozen=True)
class Outcome:
    """A run that has ended; tables and metrics are made when they are asked for."""

    prepared: Prepared
    served: Served
    profile_error: Mapping[str, Any] | None = None
    """What it would be if the profile were off (``profile_error.banded``)."""

    @property
    def result(self) -> RunResult:
        return self.served.result

    @cached_property
    def tables(self) -> tuple[pyarrow.Table, pyarrow.Table]:
        """(requests, work)"""
        result = self.result
        requests = records.requests_table(result.requests, self.served.worker_of)
        return requests, records.work_table(result.work, result.sample_names)

    @cached_property
    def frames(self) -> tuple[pandas.DataFrame, pandas.DataFrame]:
        """The tables as data frames."""
        requests, work = self.tables
        return requests.to_pandas(), work.to_pandas()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The metrics (``metrics.summarize``), ready for JSON."""
        prepared = self.prepared
        return summarize(*self.frames, prepared.solo_latencies_s(), prepared.load)

    @cached_property
    def described(self) -> dict[str, Any]:
        """What was run, what the policy could sustain and what came of it: the content of ``summary.json``."""
        prepared = self.prepared
        ended = all(record.status != "unfinished" for record in self.result.requests)
        capacity = capacity_per_s(prepared) if ended else None
        rate = prepared.rate_per_s
        limits = limits_s(self.frames[0], prepared.solo_latencies_s())
        run = {
            **prepared.described(),
            "slo_lowest_s": float(limits.min()),
            "slo_highest_s": float(limits.max()),
            "policy_capacity_per_s": capacity,
            "policy_load": None if capacity is None or rate is None else rate / capacity,
            "decisions": self.result.decisions,
            **self._resolutions(),
            **({} if self.profile_error is None else {"profile_error": self.profile_error}),
            **self.served.facts,
        }
        window = measured(self.frames[0])
        latencies = window.loc[window["status"] == "done", "request_latency_s"].astype(float).tolist()
        return {"run": run, **self.summary, **mean_interval(latencies, folder.highest_load(run))}

    def _resolutions(self) -> dict[str, Any]:
        """Of several: how often slowdowns of pairs that were not measured were looked up by the step's solo time."""
        if not self.prepared.profile.others:
            return {}
        result = self.result
        return {
            "resolutions": [pixels_of(size) for size in self.prepared.profile.sizes],
            "slowdowns_by_solo_time": result.slowdowns_by_solo_time,
            "slowdowns_clamped": result.slowdowns_clamped,
        }

    def write(self, out: Path, timeline: bool = False) -> None:
        """The run's folder."""
        folder.write_run(out, self.tables, self.frames, self.described, timeline)

    def lines(self) -> list[str]:
        """The floor that was chosen and the metrics that matter most, for people."""
        floor = self.prepared.floor
        return [
            *self.prepared.read_as,
            *(floor.lines() if floor is not None else ()),
            *folder.summary_lines(self.described),
        ]


def prepare(spec: RunSpec) -> Prepared:
    """The profile, the requests as it serves them, the skip budget and the load. InputError for what does not fit."""
    build_policy(spec.policy, dict(spec.parameters), spec.base_folder)
    build_router(spec.router_entry.kind, **spec.router_entry.parameters)
    profile = _profile_of(spec)
    adapters = spec.adapters
    if spec.max_concurrency is not None:
        if spec.load is not None:
            raise InputError("--max-concurrency and --load exclude each other: in a closed loop, load follows latency.")
        if not 1 <= spec.max_concurrency <= MOST_CONCURRENCY:
            raise InputError(
                f"--max-concurrency is {spec.max_concurrency}; a whole number from 1 to {MOST_CONCURRENCY} is needed."
            )
    if adapters is None and spec.cluster is not None and isinstance(spec.profile, Path):
        adapters = load_adapters(spec.profile, profile.name)
    given = Arrivals(spec.source, None, {}) if isinstance(spec.source, tuple) else spec.source
    arriving = arrivals(given) if isinstance(given, Source) else given
    asked, window = arriving.requests, arriving.window
    requests = fitted(asked, profile, spec.slo_seconds, spec.slo_multiple)
    profile = at_its_resolutions(profile, requests)
    floor = _floor(spec, requests, profile)
    profiles = {} if spec.cluster is None else _worker_profiles(spec, spec.cluster, requests)
    prepared = Prepared(
        spec=spec,
        profile=profile,
        adapters=adapters,
        requests=requests,
        served=requests,
        budget=spec.budget if floor is None else floor.budget,
        floor=floor,
        window=window,
        slo_from=limits_from(asked, spec.slo_seconds, spec.slo_multiple),
        read_as=arriving.read_as,
        profiles=profiles,
    )
    if spec.max_concurrency is not None and spec.time_scale == 0 and spec.rate_per_s is None:
        scale, requests = 0.0, [replace(request, arrival_ns=0) for request in requests]
    else:
        scale, load = stretch(requests, window, prepared.load_of, spec.load, spec.rate_per_s, spec.time_scale)
        requests = scaled(requests, scale)
    if spec.max_concurrency is not None:
        load = None
    return replace(
        prepared, requests=requests, served=with_fewer_steps(requests, spec.steps_scale), time_scale=scale, load=load
    )


def execute(prepared: Prepared, engine: Engine | None = None, on_progress: OnProgress | None = None) -> Outcome:
    """Serve a prepared run, by default in simulation, with fresh policies."""
    return Outcome(prepared, (engine or simulator)(prepared, on_progress))


def saturated(prepared: Prepared, images: int) -> tuple[Outcome, float | None]:
    """A simulated run of so many images that all wait from the start, and its images a second at full batches.

    Where decodes lag so far behind that too few end beside full steps, 4 and 16 times as many; then None.
    """
    for longer in (1, 4, 16):
        outcome = execute(prepared.at_once(longer * images))
        try:
            return outcome, saturation_throughput(outcome.frames[1])
        except InputError:
            continue
    return outcome, None


def capacity_per_s(prepared: Prepared) -> float | None:
    """Requests a second that the policy sustains at its batch, by a simulated backlog; None where it does not tell."""
    try:
        images = max(CAPACITY_IMAGES * prepared.workers, min(prepared.images, OWN_IMAGES))
        rate = saturated(prepared, min(images, MOST_CAPACITY_IMAGES))[1]
    except Exception:  # a user's policy may raise anything; its own run says so, and this is only a number beside it
        return None
    return None if rate is None else rate * len(prepared.requests) / prepared.images


def simulator(prepared: Prepared, on_progress: OnProgress | None = None, /) -> Served:
    """The discrete-event engine: one worker, or the workers of a cluster."""
    spec, cluster, requests, profile = prepared.spec, prepared.spec.cluster, prepared.served, prepared.profile
    shared: dict[str, Any] = {
        "budget": prepared.budget,
        "dispersion_seed": spec.dispersion_seed,
        "max_concurrency": spec.max_concurrency,
        "on_progress": on_progress,
    }
    if cluster is None:
        return Served(simulate(requests, prepared.policy(), profile, decode_gpus=spec.decode_gpus, **shared))
    fleet = simulate_cluster(
        requests,
        prepared.policy,
        profile,
        cluster,
        profiles=prepared.profiles,
        adapters=prepared.adapters,
        free_adapters=spec.free_adapters,
        router=prepared.router(),
        **shared,
    )
    facts = {name: getattr(fleet, name) for name in FLEET_FACTS}
    by_worker = [fleet.worker_of.count(index) for index in range(len(cluster.workers))]
    return Served(fleet.run, fleet.worker_of, facts | {"requests_by_worker": by_worker})


def _floor(spec: RunSpec, requests: Sequence[Request], profile: Profile) -> FloorChoice | None:
    """What ``min_ssim`` chooses from a fidelity table; None without it."""
    if spec.min_ssim is None:
        if spec.fidelity is not None:
            raise InputError("--fidelity names the table that --min-ssim looks up; give both or neither.")
        return None
    if spec.budget != NO_SKIPS:
        raise InputError("--min-ssim chooses which steps may be skipped, so it excludes the options --skip-...")
    if not isinstance(spec.profile, Path):
        raise InputError("a floor on fidelity needs a profile with a folder, beside which its table is looked for.")
    solver = None if spec.scheduler is None else SCHEDULERS.get(spec.scheduler, spec.scheduler)
    return floor_for_requests(spec.min_ssim, requests, profile, spec.profile, spec.fidelity, solver)


def _profile_of(spec: RunSpec) -> Profile:
    if isinstance(spec.profile, Profile):
        return scaled_profile(spec.profile, spec.contention, spec.decode_share)
    if spec.profile_hash is None:
        return scaled_profile(load_profile(spec.profile), spec.contention, spec.decode_share)
    return profile_as_it_was(spec.profile, spec.profile_hash, spec.contention, spec.decode_share)


def _worker_profiles(spec: RunSpec, cluster: Cluster, requests: Sequence[Request]) -> dict[str, Profile]:
    """The profiles that the cluster names, as these requests need them; InputError for one without a resolution that a
    request, whose empty one the run's profile has filled, asks for."""
    found = {}
    for name in cluster.profiles:
        folder = find_profile(name, spec.base_folder)
        content_hash = spec.worker_hashes.get(name) or load_profile(folder).content_hash
        profile = profile_as_it_was(folder, content_hash, spec.contention, spec.decode_share)
        fitted(requests, profile)
        found[name] = at_its_resolutions(profile, requests)
    return found


@lru_cache(maxsize=32)
def profile_as_it_was(folder: Path, content_hash: str, contention: float = 1.0, decode_share: float = 1.0) -> Profile:
    """A profile as it was when many runs of it began, kept for the next run of this process."""
    profile = load_profile(folder)
    if profile.content_hash != content_hash:
        raise InputError(f"{folder}: the profile changed while the sweep ran; start the sweep again.")
    return scaled_profile(profile, contention, decode_share)
