"""Many workers under one clock: a router gives them requests, ControlNet services are shared between them.

At one instant arrivals are routed first, then workers take their turns by index, until nothing more happens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import simpy

from policies.base import Policy
from policies.routers import RoundRobin, Router, WorkerState
from simulator.adapter_run import AdapterRun
from simulator.collection import rare_collections
from simulator.pieces import Draws
from simulator.services import ControlNetServices
from simulator.worker_run import PROGRESS_EVERY, WorkerRun
from synerdiff.config.cluster import Cluster
from synerdiff.core import (
    NO_SKIPS,
    NS_PER_S,
    InputError,
    Request,
    RunResult,
    Sample,
    SkipBudget,
    WorkerInfo,
    WorkRecord,
)
from synerdiff.engine.samples import request_records, sorted_work
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile

_SEED_STEP = 7919
"""Between the seeds of two workers; the first has the run's own."""


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
        spans: dict[int, list[tuple[int, int]]] = {}
        for record in self.run.work:
            if not record.lane.startswith("loader"):
                spans.setdefault(record.gpu, []).append((record.start_ns, record.end_ns))
        images = self._images
        return sum(_covered_ns(sorted(found)) for found in spans.values()) / NS_PER_S / images if images else None

    @property
    def _images(self) -> int:
        return sum(record.request.images for record in self.run.requests if record.status == "done")


def simulate_cluster(
    requests: Sequence[Request],
    policy: Callable[[], Policy],
    profile: Profile,
    cluster: Cluster,
    *,
    adapters: Adapters | None = None,
    router: Router | None = None,
    budget: SkipBudget = NO_SKIPS,
    dispersion_seed: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ClusterResult:
    """Replay requests (by arrival) on a cluster; ``policy`` makes a fresh policy for each worker.

    ``adapters`` is needed when requests ask for LoRAs or ControlNets, or guidance runs on two GPUs. Without such
    needs one worker gives what ``simulate`` gives, to the nanosecond. Raises InputError and ContractError as that does.
    """
    services = ControlNetServices(
        cluster.controlnet_services, adapters, Draws(None if dispersion_seed is None else dispersion_seed + 2)
    )
    planned = _require(requests, profile, cluster, adapters, services)
    sample_rows = max((2 if request.guidance_scale > 1 else 1 for request in requests), default=1)
    runs: list[WorkerRun] = []
    for index, entry in enumerate(cluster.workers):
        own = policy()
        own.reset(WorkerInfo(profile.max_rows, entry.denoise_gpu, entry.lanes, sample_rows, f"worker{index}"), profile)
        seed = None if dispersion_seed is None else dispersion_seed + index * _SEED_STEP
        if planned and adapters is not None:
            runs.append(AdapterRun(own, profile, cluster, entry, adapters, services, seed))
        else:
            runs.append(WorkerRun([], own, profile, entry.lanes, seed, gpu=entry.denoise_gpu))
    simulation = _ClusterRun(requests, profile, runs, router or RoundRobin(), budget, on_progress)
    environment = simpy.Environment()
    environment.process(simulation.run(environment))
    with rare_collections():
        environment.run()
    adapted = [run for run in runs if isinstance(run, AdapterRun)]
    return ClusterResult(
        run=RunResult(
            requests=request_records(requests, simulation.samples),
            work=sorted_work([*simulation.work(), *services.records]),
            sample_names=[sample.name for sample in simulation.samples],
            end_ns=int(environment.now),
            decisions=sum(run.decisions for run in runs),
        ),
        worker_of=simulation.worker_of,
        gpus=len(cluster.gpus),
        lora_requested=sum(run.loader.requested for run in adapted),
        lora_reads=sum(run.loader.reads for run in adapted),
        lora_copies=sum(run.loader.copies for run in adapted),
        controlnet_loads=sum(run.planner.controlnet_loads for run in adapted)
        + sum(replica.loads for replica in services.replicas),
    )


def _require(
    requests: Sequence[Request],
    profile: Profile,
    cluster: Cluster,
    adapters: Adapters | None,
    services: ControlNetServices,
) -> bool:
    """Whether steps must be planned; InputError when what the requests ask for cannot be served."""
    loras = next((request for request in requests if request.loras), None)
    controlnets = next((request for request in requests if request.controlnets), None)
    two_gpus = cluster.strategies.guidance == "two-gpus"
    if adapters is None:
        needs = [
            f"request {r.request_id} asks for {w}" for r, w in ((loras, "LoRAs"), (controlnets, "ControlNets")) if r
        ]
        needs += ["guidance runs on two GPUs"] if two_gpus else []
        if needs:
            raise InputError(
                f"{needs[0]}, and profile '{profile.name}' has no adapters.csv, which says what that costs; "
                "synerdiff profile --adapters measures it."
            )
        return False
    if controlnets is not None and cluster.strategies.controlnets == "service":
        services.require(dict.fromkeys(use.name for request in requests for use in request.controlnets))
    return loras is not None or controlnets is not None or two_gpus


class _ClusterRun:
    """The workers' common clock."""

    def __init__(
        self,
        requests: Sequence[Request],
        profile: Profile,
        runs: list[WorkerRun],
        router: Router,
        budget: SkipBudget,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.requests = requests
        self.runs = runs
        self.router = router
        self.budget = budget
        self.on_progress = on_progress
        self.encode_ns = profile.overhead_ns("text_encode")
        self.samples: list[Sample] = []
        self.worker_of: list[int] = []
        self.global_ids: list[list[int]] = [[] for _ in runs]
        """Per worker: its own sample id -> the id in the run."""
        self.states = [WorkerState(index) for index in range(len(runs))]
        self.steps_left = [0] * len(runs)
        """Per worker: sample-steps of what it was given, less those in the records that have been counted."""
        self.counted = [0] * len(runs)
        self.due_ns = [-1] * len(runs)
        """When something can next happen at each worker, -1 for never; it changes only by a turn or a new sample."""
        self.told: list[tuple[WorkerRun, int]] = []
        """Workers whose view has just become closed, and how often their policy had been asked."""
        for run, ids in zip(runs, self.global_ids, strict=True):
            run.open = True
            if isinstance(run, AdapterRun):
                run.planner.global_ids = ids
        router.reset(len(runs))

    def run(self, environment: simpy.Environment) -> Generator[simpy.Event, None, None]:
        """Sleep until something happens anywhere, route what arrives, let the workers take their turns."""
        runs, due = self.runs, self.due_ns
        now_ns = 0
        reported = 0
        while True:
            self.route(now_ns)
            for index, due_ns in enumerate(due):
                if 0 <= due_ns <= now_ns:
                    runs[index].turn(now_ns)
                    due[index] = runs[index].next_ns()
            if self.told:
                self.tell_closed(now_ns)
            ended = sum([run.worker.ended for run in runs])
            if ended == len(self.samples) and len(self.worker_of) == len(self.requests):
                return
            if self.on_progress is not None and ended >= reported + PROGRESS_EVERY:
                reported = ended
                self.on_progress(ended)
            next_ns = self.next_ns(now_ns)
            if next_ns > now_ns:
                yield environment.timeout(next_ns - now_ns)
                now_ns = next_ns

    def next_ns(self, now_ns: int) -> int:
        """The earliest instant at which something happens anywhere; a stalled worker is refused."""
        due = [due_ns for due_ns in self.due_ns if due_ns >= 0]
        if len(self.worker_of) < len(self.requests):
            due.append(self.requests[len(self.worker_of)].arrival_ns)
        if not due:
            next(run for run in self.runs if run.worker.ended < len(run.samples)).worker.refuse_stall(now_ns)
        return max(now_ns, min(due))

    def route(self, now_ns: int) -> None:
        """Give what has arrived to workers, in trace order; after the last request tell the workers."""
        requests, routed = self.requests, len(self.worker_of)
        if routed == len(requests) or requests[routed].arrival_ns > now_ns:
            return
        while routed < len(requests) and requests[routed].arrival_ns <= now_ns:
            self.give(requests[routed])
            routed += 1
        if routed == len(requests):
            for run in self.runs:
                run.open = False
                if run.worker.waiting and run.entered == len(run.samples):
                    self.told.append((run, run.decisions))

    def tell_closed(self, now_ns: int) -> None:
        """A policy that holds samples back for more to come is asked again, now that it sees ``closed``."""
        for run, decisions in self.told:
            if run.decisions == decisions and run.worker.waiting and not run.worker.denoise_held:
                run.decide(now_ns)
                run.retime(now_ns)
                self.due_ns[self.runs.index(run)] = run.next_ns()
        self.told.clear()

    def give(self, request: Request) -> None:
        for index, (state, run) in enumerate(zip(self.states, self.runs, strict=True)):
            state.samples = len(run.samples) - run.worker.ended
            for record in run.step_records[self.counted[index] :]:
                if record.kind == "step":
                    self.steps_left[index] -= len(record.samples)
            self.counted[index] = len(run.step_records)
            state.steps_left = self.steps_left[index] - run.steps_given_up
            if request.loras and isinstance(run, AdapterRun):
                state.loras = run.loader.known | run.planner.files_in_weights
        index = self.router.route(request, self.states)
        if type(index) is not int or not 0 <= index < len(self.runs):
            raise InputError(
                f"the router sent request {request.request_id} to worker {index!r}; there are workers 0 to "
                f"{len(self.runs) - 1}."
            )
        self.worker_of.append(index)
        run, ids = self.runs[index], self.global_ids[index]
        self.steps_left[index] += request.steps * request.images
        for image in range(request.images):
            ids.append(len(self.samples))
            sample = Sample(len(run.samples), request, image, request.arrival_ns + self.encode_ns, self.budget)
            run.samples.append(sample)
            self.samples.append(sample)
        self.due_ns[index] = run.next_ns()

    def work(self) -> list[WorkRecord]:
        """The records of all workers, with the run's sample ids."""
        found = []
        for run, ids in zip(self.runs, self.global_ids, strict=True):
            records = [*run.step_records, *run.chunk_records]
            if isinstance(run, AdapterRun):
                records += run.loader.records
            found += [record._replace(samples=tuple([ids[sample] for sample in record.samples])) for record in records]
        return found


def _covered_ns(spans: list[tuple[int, int]]) -> int:
    """Length of the union of spans that are sorted by their start."""
    total, reach = 0, 0
    for start_ns, end_ns in spans:
        total += max(0, end_ns - max(start_ns, reach))
        reach = max(reach, end_ns)
    return total
