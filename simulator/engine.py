"""The discrete-event engine: one worker, or a fleet under one clock, as one SimPy process.

The process sleeps on a single timeout, the earliest thing that can happen, takes everything of that instant together,
asks whom it concerns, and re-times what contends anew.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import simpy

from policies.base import Policy
from policies.routers import RoundRobin, Router
from policies.shared_queue import SharedQueue
from simulator.adapters import ControlNetServices, Loader
from simulator.fleet import FleetClock
from simulator.pieces import Draws
from simulator.planned import PlannedStepper
from simulator.stage_pools import StagePools
from simulator.step_plan import StepPlanner
from simulator.worker_run import WorkerRun
from synerdiff.config.cluster import Cluster, WorkerEntry
from synerdiff.core import (
    NO_SKIPS,
    NS_PER_S,
    ContractError,
    InputError,
    Request,
    RunResult,
    Sample,
    SkipBudget,
    WorkerInfo,
    WorkRecord,
)
from synerdiff.engine.samples import ClosedLoop, make_samples, request_records, sorted_work
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile

DENOISE_GPU = 0
SEED_STEP = 7919
"""Between the seeds of two workers; the first has the run's own."""
ALLOCATIONS = 100_000
"""Net new objects between two garbage collections; Python's own default is 700."""


@dataclass(frozen=True, slots=True)
class ClusterResult:
    """What a cluster did. ``run``: the records of all workers and services, GPUs as the cluster numbers them."""

    run: RunResult
    worker_of: list[int]
    """The worker of each request, in trace order."""
    gpus: int
    lora_requested: int
    """How often a sample asked for a LoRA, and how often that meant reading its file or copying it to the GPU."""
    lora_reads: int
    lora_copies: int
    controlnet_loads: int

    @property
    def gpu_seconds_per_image(self) -> float | None:
        """GPUs of the cluster * time until the last work ended / images done: what is paid for, idle or not."""
        images = self._images
        return self.gpus * self.run.end_ns / NS_PER_S / images if images else None

    @property
    def busy_gpu_seconds_per_image(self) -> float | None:
        """Time in which a GPU had work on some lane (loaders are no GPU work), over all GPUs, / images done."""
        busy: dict[int, list[tuple[int, int]]] = {}
        for record in self.run.work:
            if not record.lane.startswith("loader"):
                busy.setdefault(record.gpu, []).append((record.start_ns, record.end_ns))
        images = self._images
        return sum(_covered_ns(sorted(times)) for times in busy.values()) / NS_PER_S / images if images else None

    @property
    def _images(self) -> int:
        return sum(record.request.images for record in self.run.requests if record.status == "done")


def _covered_ns(times: list[tuple[int, int]]) -> int:
    """Length of the union of (start, end) pairs that are sorted by their start."""
    total, reach = 0, 0
    for start_ns, end_ns in times:
        total += max(0, end_ns - max(start_ns, reach))
        reach = max(reach, end_ns)
    return total


def simulate(
    requests: Sequence[Request],
    policy: Policy,
    profile: Profile,
    *,
    decode_gpus: tuple[int, ...] = (DENOISE_GPU,),
    budget: SkipBudget = NO_SKIPS,
    dispersion_seed: int | None = None,
    max_concurrency: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Replay requests (by arrival) through a policy on one worker whose denoise lane is on GPU 0.

    ``decode_gpus`` gives the GPU of each decode lane: lanes on another GPU do not contend. ``max_concurrency``: at most
    so many requests are in the system at a time (a closed loop). ``on_progress`` is told now and then how many samples
    have ended. Raises InputError on what the profile cannot serve, ContractError when the policy breaks the contract.
    """
    samples = make_samples(requests, profile, budget)
    info = WorkerInfo(profile.most_rows, DENOISE_GPU, decode_gpus, _sample_rows(samples))
    if max_concurrency is None:
        run = WorkerRun(policy, profile, info, samples, samples, dispersion_seed)
        end_ns = _play(lambda environment: run.run(environment, on_progress), [run])
        return _result(requests, samples, run.records, end_ns, [run])
    loop = ClosedLoop(requests, samples, max_concurrency, profile.overhead_ns("text_encode"))
    run = WorkerRun(policy, profile, info, samples, [], dispersion_seed)
    end_ns = _play(lambda environment: run.run(environment, on_progress, loop), [run])
    return _result(loop.requests, samples, run.records, end_ns, [run])


def simulate_cluster(
    requests: Sequence[Request],
    policy: Callable[[], Policy],
    profile: Profile,
    cluster: Cluster,
    *,
    profiles: Mapping[str, Profile] | None = None,
    adapters: Adapters | None = None,
    free_adapters: bool = False,
    router: Router | SharedQueue | None = None,
    budget: SkipBudget = NO_SKIPS,
    dispersion_seed: int | None = None,
    max_concurrency: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ClusterResult:
    """Replay requests (by arrival) on a cluster; ``policy`` makes a fresh policy for each worker.

    ``profiles``: those that workers and stages name; all others have ``profile``.

    ``adapters`` is needed when guidance runs on two GPUs, and when requests ask for LoRAs or ControlNets unless these
    are free. Without such needs one worker gives what ``simulate`` gives, to the nanosecond. Raises InputError and
    ContractError as that does.
    """
    services = ControlNetServices(
        cluster.controlnet_services, adapters, Draws(None if dispersion_seed is None else dispersion_seed + 2)
    )
    planned = _require(requests, profile, cluster, adapters, services, free_adapters)
    if planned and (cluster.profiles or cluster.stages is not None):
        raise InputError(
            "requests with LoRAs or ControlNets, and guidance on two GPUs, can be simulated with one profile and "
            "without stages apart."
        )
    named = profiles or {}
    stages = None
    if cluster.stages is not None:
        seed = None if dispersion_seed is None else dispersion_seed + 3
        stages = StagePools(cluster.stages, cluster, profile, named, adapters, seed)
    samples = make_samples(requests, profile, budget)
    runs: list[WorkerRun] = []
    planners: dict[int, StepPlanner] = {}
    for index, entry in enumerate(cluster.workers):
        own = entry.served(profile, named, entry.degree)
        info = WorkerInfo(own.most_rows, entry.denoise_gpu, entry.lanes, _sample_rows(samples), f"worker{index}")
        seed = None if dispersion_seed is None else dispersion_seed + index * SEED_STEP
        run = WorkerRun(policy(), own, info, samples, [], seed)
        if planned and adapters is not None:
            planners[index] = _planner(run, cluster, entry, adapters, services, seed)
            run.stepper = PlannedStepper(planners[index], run.worker, run.records)
        runs.append(run)
    loop = ClosedLoop(requests, samples, max_concurrency, profile.overhead_ns("text_encode"))
    fleet = FleetClock(loop, samples, runs, planners, router or RoundRobin(), on_progress, stages)
    end_ns = _play(fleet.run, runs)
    records: list[WorkRecord] = []
    for index, run in enumerate(runs):
        records += run.records + (planners[index].loader.records if planners else [])
    records += services.records
    if stages is not None:
        records += stages.records
        end_ns = max(end_ns, stages.end_ns)
    loaders = [planner.loader for planner in planners.values()]
    return ClusterResult(
        run=_result(loop.requests, samples, records, end_ns, runs),
        worker_of=fleet.worker_of,
        gpus=len(cluster.gpus),
        lora_requested=sum(loader.requested for loader in loaders),
        lora_reads=sum(loader.reads for loader in loaders),
        lora_copies=sum(loader.copies for loader in loaders),
        controlnet_loads=sum(planner.controlnet_loads for planner in planners.values())
        + sum(replica.loads for replica in services.replicas),
    )


def _sample_rows(samples: Sequence[Sample]) -> int:
    return max((sample.full_rows for sample in samples), default=1)


def _planner(
    run: WorkerRun,
    cluster: Cluster,
    entry: WorkerEntry,
    adapters: Adapters,
    services: ControlNetServices,
    seed: int | None,
) -> StepPlanner:
    draws = Draws(None if seed is None else seed + 1)
    loader = Loader(cluster.loras, adapters, draws, entry.denoise_gpu)
    return StepPlanner(run.profile, cluster, entry, adapters, services, run.times, draws, loader)


def _require(
    requests: Sequence[Request],
    profile: Profile,
    cluster: Cluster,
    adapters: Adapters | None,
    services: ControlNetServices,
    free: bool,
) -> bool:
    """Whether steps must be planned; InputError when what the requests ask for cannot be served."""
    loras = next((request for request in requests if request.loras), None)
    controlnets = next((request for request in requests if request.controlnets), None)
    two_gpus = cluster.strategies.guidance == "two-gpus"
    if adapters is None:
        asked = () if free else ((loras, "LoRAs"), (controlnets, "ControlNets"))
        needs = [f"request {request.request_id} asks for {what}" for request, what in asked if request]
        needs += ["guidance runs on two GPUs"] if two_gpus else []
        if needs:
            raise InputError(
                f"{needs[0]}, and profile '{profile.name}' has no adapters.csv, which says what that costs; "
                "synerdiff profile --adapters measures it."
            )
        return False
    if profile.others and (controlnets is not None or two_gpus):
        what = "guidance runs on two GPUs" if controlnets is None else f"request {controlnets.request_id} asks for "
        what += "" if controlnets is None else "ControlNets"
        raise InputError(
            f"{what}, and what that costs (adapters.csv) is known of one resolution, while the requests ask for "
            "several; LoRAs, whose cost does not depend on it, are simulated at several."
        )
    if controlnets is not None and cluster.strategies.controlnets == "service":
        services.require(dict.fromkeys(use.name for request in requests for use in request.controlnets))
    return loras is not None or controlnets is not None or two_gpus


def _play(process: Callable[[simpy.Environment], Generator[simpy.Event, None, None]], runs: Sequence[WorkerRun]) -> int:
    """Run a process to its end; the instant at which it ended. ContractError when a policy wrote what it may read."""
    environment = simpy.Environment()
    environment.process(process(environment))
    try:
        with rare_collections():
            environment.run()
    except (InputError, ContractError):
        raise
    except Exception:  # what a policy has written may break anything
        _require_unwritten(runs, int(environment.now))
        raise
    _require_unwritten(runs, int(environment.now))
    return int(environment.now)


def _require_unwritten(runs: Sequence[WorkerRun], now_ns: int) -> None:
    for run in runs:
        run.rounds.require_unwritten(now_ns)


def _result(
    requests: Sequence[Request],
    samples: Sequence[Sample],
    records: list[WorkRecord],
    end_ns: int,
    runs: Sequence[WorkerRun],
) -> RunResult:
    return RunResult(
        requests=request_records(requests, samples),
        work=sorted_work(records),
        sample_names=[sample.name for sample in samples],
        end_ns=end_ns,
        decisions=sum(run.rounds.decisions for run in runs),
        slowdowns_by_solo_time=sum(run.by_solo_time for run in runs),
        slowdowns_clamped=sum(run.clamped for run in runs),
    )


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage rarely, and as before afterwards.

    A simulation allocates records that stay and hardly any cycles: with Python's default the collector goes over them
    again and again, for a sixth of the time.
    """
    before = gc.get_threshold()
    if not 0 < before[0] < ALLOCATIONS:
        yield
        return
    gc.set_threshold(ALLOCATIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
