"""From an experiment to its runs: cells x policies x loads x replicates, and the search for batch sizes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from policies.registry import build_policy, policy_parameters
from policies.routers import build_router
from synerdiff.config.cluster import MIB, Cluster, cluster_of, load_cluster
from synerdiff.config.experiment import Experiment, Fleet, Machines, PolicyEntry, SkipBudgetSection, Workload
from synerdiff.core import NO_SKIPS, InputError, SkipBudget, WorkerInfo
from synerdiff.engine.policy import PolicyCalls
from synerdiff.experiments.adapter_mix import AdapterTrace
from synerdiff.experiments.compare import GridCell
from synerdiff.experiments.h800 import built_profile
from synerdiff.experiments.layouts import CONTROLNETS, Demand, layout, worker_image_s
from synerdiff.experiments.offer import at_its_resolutions, fewer_steps, fitted
from synerdiff.experiments.run import RunSpec
from synerdiff.experiments.sources import Source, arrivals, search_source, sources
from synerdiff.experiments.store import policy_hash, run_key
from synerdiff.fidelity.floor import floor_for_requests, image_ssim, require_same_images
from synerdiff.fidelity.table import FidelityTable, find_fidelity, read_fidelity
from synerdiff.profile.adapters import Adapters, load_adapters
from synerdiff.profile.capacity import mix_of
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.tables import Profile


class Measured(NamedTuple):
    """A profile of the experiment. ``folder`` is None for one that is built from published component times."""

    folder: Path | None
    profile: Profile
    adapters: Adapters | None


class Place(NamedTuple):
    """Where a policy's batch size is searched; the load is None at saturation."""

    cell: GridCell
    policy: str
    load: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a grid, complete enough for another process to compute it."""

    folder: Path
    """The sweep's."""
    cell: GridCell
    label: str
    spec: RunSpec
    load: float | None
    """None at saturation."""
    images: int | None
    """At saturation: how many wait from the start."""
    keep_requests: bool
    head: Mapping[str, Any] = field(default_factory=dict)
    """The columns of ``runs.parquet`` that say which run a row is about."""
    key: str = ""

    @property
    def source(self) -> Source:
        """Where its requests come from."""
        assert isinstance(self.spec.source, Source)  # a grid's runs have no requests of their own
        return self.spec.source


class Grid:
    """The runs of an experiment, checked as far as that goes without simulating.

    ``base`` is the folder of the experiment's file: profiles, traces, clusters and policy modules are looked up there
    too. InputError for what does not fit.
    """

    def __init__(self, experiment: Experiment, base: Path, folder: Path) -> None:
        self.experiment = experiment
        self.base = base.resolve()
        self.folder = folder.resolve()
        self.devices = self._devices()
        self.worker_hashes: dict[str, str] = {}
        """Profile that a fleet names for some of its workers -> its content."""
        self.fleets = {(fleet.name, gpus): fleet for fleet in experiment.each_fleet for gpus in self._gpus_of(fleet)}
        self.workloads = [part for workload in experiment.workloads for part in _by_lora_share(workload)]
        self.sources = {
            (workload.name, share): sources(workload, experiment, self.base) for workload, share in self.workloads
        }
        self.policies = [self._entry(index) for index in range(len(experiment.policies))]
        self._floors: dict[tuple[str, Source, SkipBudgetSection], SkipBudget] = {}
        self._check_policies()
        self.policy_hashes = {entry.policy: policy_hash(entry.policy, self.home(entry)) for entry in self.policies}
        self.tables = self._fidelity_tables()
        """The fidelity table by profile, where a floor on fidelity is asked for; what it does not cover is refused."""
        self.searches = self._search_runs()
        """Batch -> run, for every place where a batch size is searched."""

    def _devices(self) -> dict[str, Measured]:
        devices: dict[str, Measured] = {}
        named: dict[str, str] = {}
        for name in dict.fromkeys(name for block in self.experiment.blocks for name in block.profiles):
            built = built_profile(name)
            if built is None:
                folder = find_profile(name, self.base).resolve()
                profile = load_profile(folder)
                adapters = load_adapters(folder, profile.name) if self.experiment.fleets else None
                device = Measured(folder, profile, adapters)
            else:
                device = Measured(None, *built)
            if device.profile.name in named:
                raise InputError(f"profiles: {name} and another one are both named '{device.profile.name}'.")
            named[device.profile.name] = name
            devices[name] = device
        return devices

    def home(self, entry: PolicyEntry) -> Path:
        """Where the module of a policy of the user's own is looked up."""
        return self.base if entry.folder is None else (self.base / entry.folder).resolve()

    def section_of(self, entry: PolicyEntry) -> SkipBudgetSection:
        """The policy's own skip budget, else the experiment's."""
        return self.experiment.skip_budget if entry.skip_budget is None else entry.skip_budget

    def _entry(self, index: int) -> PolicyEntry:
        """A policy, with the batch of all where it has none of its own."""
        entry, batch = self.experiment.policies[index], self.experiment.batch
        has_batch = "batch" in [parameter.name for parameter in policy_parameters(entry.policy, self.home(entry))]
        if entry.batch is not None and not has_batch:
            raise InputError(f"policies[{index}].batch: policy '{entry.policy}' has no parameter 'batch'.")
        stated = entry.batch is not None or "batch" in entry.parameters or not has_batch
        return entry if stated else entry.model_copy(update={"batch": batch})

    def _check_policies(self) -> None:
        """InputError when a policy cannot serve some machine with some workload."""
        pairs = [pair for block in self.experiment.blocks for pair in product(block.profiles, block.decode_gpus)]
        for entry, (name, lanes) in product(self.policies, dict.fromkeys(pairs)):
            device = self.devices[name]
            parameters = dict(entry.parameters)
            if isinstance(entry.batch, int):
                parameters["batch"] = entry.batch
            for source in (source for replicates in self.sources.values() for source in replicates):
                requests = fitted(arrivals(source).requests, device.profile)
                profile = at_its_resolutions(device.profile, requests)
                worker = WorkerInfo(profile.most_rows, 0, lanes, mix_of(requests).sample_rows)
                PolicyCalls(build_policy(entry.policy, parameters, self.home(entry))).reset(worker, profile)

    def _fidelity_tables(self) -> dict[str, FidelityTable]:
        """Profile -> its fidelity table; empty without a floor. InputError where there is none or it lacks a number."""
        sections = [self.experiment.skip_budget, *(self.section_of(entry) for entry in self.policies if entry.may_skip)]
        floors = {one.fidelity for one in sections if one.min_ssim is not None}
        if not floors:
            return {}
        if len(floors) > 1:
            raise InputError("the policies' floors name several fidelity tables; one is needed to compare them.")
        [named] = floors
        given = None if named is None else self.base / named
        asked = {
            (request.steps, request.guidance_scale)
            for replicates in self.sources.values()
            for source in replicates
            for request in arrivals(source).requests
        }
        tables = {}
        for folder, profile, _ in self.devices.values():
            if folder is None:
                raise InputError(f"profile '{profile.name}' has no folder, beside which min_ssim looks for its table.")
            model = profile.head.model
            table = tables[profile.name] = read_fidelity(find_fidelity(given, folder, model))
            require_same_images(table, model, profile.head.size)
            for scale in {entry.steps_scale for entry in self.policies if entry.steps_scale < 1}:
                for steps, guidance in asked:
                    image_ssim(table, "g" * fewer_steps(steps, scale), guidance, steps)
        return tables

    def _machine_cells(self, block: Machines) -> Iterator[tuple[str, GridCell]]:
        """(profile as the file names it, cell without a workload).

        With all decode lanes on other GPUs contention changes nothing: its first value stands for all.
        """
        for name in block.profiles:
            profile = self.devices[name].profile.name
            for (fleet, gpus), share in product(self.fleets, block.decode_share):
                for contention in block.contention:
                    yield name, GridCell(profile, contention, share, "", fleet, gpus, "", None)
            for lanes, share in () if self.fleets else product(block.decode_gpus, block.decode_share):
                for contention in block.contention if 0 in lanes else block.contention[:1]:
                    text = ",".join(map(str, lanes))
                    yield name, GridCell(profile, contention, share, text, "", len({0, *lanes}), "", None)

    @cached_property
    def cells(self) -> list[tuple[str, GridCell, Workload]]:
        """Every cell once, with its profile as the file names it and its workload."""
        cells = {
            cell._replace(workload=workload.name, lora_share=share): (name, workload)
            for block in self.experiment.blocks
            for name, cell in self._machine_cells(block)
            for workload, share in self.workloads
        }
        return [(name, cell, workload) for cell, (name, workload) in cells.items()]

    @property
    def size(self) -> int:
        """How many runs the grid has, those of the search not counted."""
        return len(self.policies) * sum(
            len(self._offers(workload)) * len(self.sources[cell.workload, cell.lora_share])
            for _, cell, workload in self.cells
        )

    def _search_runs(self) -> dict[Place, dict[int, Run]]:
        """Sizes beyond a profile's rows are left out; InputError when none is left."""
        searches: dict[Place, dict[int, Run]] = {}
        for name, cell, workload in self.cells:
            if workload.batch_from is not None:
                continue
            source = search_source(workload, self.experiment, self.base)
            most = max(1, self.devices[name].profile.most_rows // mix_of(arrivals(source).requests).sample_rows)
            for entry in self.policies:
                if not entry.searched:
                    continue
                wanted = entry.batch if isinstance(entry.batch, tuple) else self.experiment.batch_search.batches
                fitting = [batch for batch in sorted(set(wanted)) if batch <= most]
                if not fitting:
                    raise InputError(
                        f"policy '{entry.name}': the steps of profile '{cell.profile}' have at most {most} samples, "
                        f"which is less than any batch size to try ({', '.join(str(batch) for batch in wanted)})."
                    )
                for load in self._searched_loads(workload):
                    searches[Place(cell, entry.name, load)] = {
                        batch: self.run_of(name, cell, source, load, entry, batch) for batch in fitting
                    }
        return searches

    def _searched_loads(self, workload: Workload) -> list[float | None]:
        """The searched loads that are the nearest one of some load of the grid, and saturation."""
        users = [user for user in self.experiment.workloads if workload.name in (user.name, user.batch_from)]
        loads = {nearest(x, self.experiment.batch_search.loads) for u in users for x in self.experiment.loads_of(u)}
        return [*sorted(loads), *([] if self.experiment.saturation is None else [None])]

    def _offers(self, workload: Workload) -> list[tuple[float | None, int | None]]:
        """(load, requests at a time) of the workload's runs; neither at saturation."""
        experiment = self.experiment
        offers: list[tuple[float | None, int | None]] = [(None, most) for most in experiment.max_concurrency]
        offers = offers or [(load, None) for load in experiment.loads_of(workload)]
        return offers if experiment.saturation is None else [*offers, (None, None)]

    def runs(self, best: Mapping[Place, int]) -> list[Run]:
        """Every run of the grid; ``best`` holds the batch sizes that the search chose."""
        runs = []
        for name, cell, workload in self.cells:
            for entry, (load, most) in product(self.policies, self._offers(workload)):
                batch = entry.batch if isinstance(entry.batch, int) else None
                if entry.searched:
                    at = None if load is None else nearest(load, self.experiment.batch_search.loads)
                    where = cell._replace(workload=workload.batch_from or workload.name)
                    batch = best[Place(where, entry.name, at)]
                for source in self.sources[cell.workload, cell.lora_share]:
                    runs.append(self.run_of(name, cell, source, load, entry, batch, most))
        return runs

    def budget_of(self, name: str, source: Source, entry: PolicyEntry) -> SkipBudget:
        """How many steps a policy may run without guidance on that profile; a floor on fidelity is looked up once."""
        device, section = self.devices[name], self.section_of(entry)
        if not entry.may_skip:
            return NO_SKIPS
        if section.min_ssim is None:
            return section.budget
        key = (device.profile.name, source, section)
        if key not in self._floors:
            assert device.folder is not None  # _fidelity_tables refuses a profile without one
            table = None if section.fidelity is None else self.base / section.fidelity
            requests = fitted(arrivals(source).requests, device.profile)
            choice = floor_for_requests(section.min_ssim, requests, device.profile, device.folder, table)
            self._floors[key] = choice.budget
        return self._floors[key]

    def run_of(
        self,
        name: str,
        cell: GridCell,
        source: Source,
        load: float | None,
        entry: PolicyEntry,
        batch: int | None,
        most: int | None = None,
    ) -> Run:
        """One run of a policy on a cell, complete with its key."""
        experiment, device = self.experiment, self.devices[name]
        slo = experiment.slo
        spec = RunSpec(
            profile=device.profile if device.folder is None else device.folder,
            profile_hash=device.profile.content_hash,
            adapters=device.adapters,
            contention=cell.contention,
            decode_share=cell.decode_share,
            source=source,
            policy=entry.policy,
            parameters=dict(entry.parameters) if batch is None else {**entry.parameters, "batch": batch},
            base_folder=self.home(entry),
            decode_gpus=tuple(map(int, cell.decode_gpus.split(","))) if cell.decode_gpus else (0,),
            budget=self.budget_of(name, source, entry),
            load=load,
            time_scale=None if most is None else 0.0,
            max_concurrency=most,
            steps_scale=entry.steps_scale,
            slo_seconds=slo.seconds if slo else None,
            slo_multiple=slo.solo_multiple if slo else None,
            dispersion_seed=source.number if experiment.dispersion else None,
        )
        if cell.fleet:
            spec = self._on_fleet(spec, cell, device)
        saturated = load is None and most is None
        keep = not saturated and experiment.report != "map"
        images = experiment.saturation if saturated else None
        return with_key(
            Run(self.folder, cell, entry.name, spec, load, images, keep), device, self.policy_hashes[entry.policy]
        )

    def _gpus_of(self, fleet: Fleet) -> tuple[int, ...]:
        if fleet.strategies is not None:
            for router in fleet.router:
                build_router(router.kind, **router.parameters)  # an unknown one is an InputError
            return fleet.gpus
        cluster = self._cluster(fleet)
        build_router(cluster.router.kind, **cluster.router.parameters)
        for name in cluster.profiles:
            self.worker_hashes.setdefault(name, load_profile(find_profile(name, self.base)).content_hash)
        return (len(cluster.gpus),)

    def _cluster(self, fleet: Fleet) -> Cluster:
        if isinstance(fleet.cluster, str):
            cluster = load_cluster(self.base / fleet.cluster)
        else:
            cluster = cluster_of(fleet.cluster or {}, f"fleet '{fleet.name}'")
        return cluster.model_copy(update={"router": fleet.router[0]}) if fleet.router else cluster

    def _on_fleet(self, spec: RunSpec, cell: GridCell, device: Measured) -> RunSpec:
        """The run on the cell's fleet. Under a set of strategies load 1 is what as many GPUs sustain without any."""
        fleet = self.fleets[cell.fleet, cell.gpus]
        if fleet.strategies is None:
            return replace(spec, cluster=self._cluster(fleet), worker_hashes=self.worker_hashes)
        assert isinstance(spec.source, Source)  # as in every run of a grid
        parameters = json.loads(spec.source.parameters)
        if spec.source.generator != "adapters" or device.adapters is None:
            raise InputError(
                f"fleet '{fleet.name}': strategies need workloads of the generator adapters, and a profile with "
                "adapters.csv."
            )
        demand = Demand.of(**{name: parameters[name] for name in ("service", "steps", "lora_share")})
        cluster = layout(
            cell.gpus,
            fleet.strategies,
            demand,
            device.profile,
            device.adapters,
            fleet.lora_mib,
            fleet.host_cache_mib,
            CONTROLNETS,
        )
        if spec.load is not None:
            alone_s = worker_image_s((), demand, device.profile, device.adapters, round(fleet.lora_mib * MIB))
            parameters["rate_per_s"] = spec.load * cell.gpus / alone_s
        source = replace(spec.source, parameters=json.dumps(parameters, sort_keys=True))
        if fleet.router:
            cluster = cluster.model_copy(update={"router": fleet.router[0]})
        return replace(spec, cluster=cluster, source=source, load=None)


def _by_lora_share(workload: Workload) -> list[tuple[Workload, float | None]]:
    """The workload at each share of requests with LoRAs."""
    if not workload.lora_share:
        return [(workload, None)]
    fields = AdapterTrace.model_fields
    parameters = {**{name: fields[name].default for name in ("service", "steps")}, **workload.parameters}
    return [
        (workload.model_copy(update={"parameters": {**parameters, "lora_share": share}}), share)
        for share in workload.lora_share
    ]


def with_key(run: Run, device: Measured, policy_source: str) -> Run:
    """The run with its columns, and with the hash over everything that its records depend on."""
    spec, source = run.spec, run.source
    head = {
        **run.cell._asdict(),
        "estimated": device.profile.estimated or (run.cell.contention, run.cell.decode_share) != (1, 1),
        "policy": run.label,
        "policy_name": spec.policy,
        "parameters": json.dumps({n: v for n, v in spec.parameters.items() if n != "batch"}, sort_keys=True),
        "steps_scale": spec.steps_scale,
        "batch": spec.parameters.get("batch"),
        "load": run.load,
        "seed": source.number,
    }
    if spec.max_concurrency is not None:
        head["max_concurrency"] = spec.max_concurrency
    known = {part.name: getattr(spec, part.name) for part in fields(spec)}
    for name in ("profile", "base_folder", "worker_hashes"):  # where things lie changes nothing
        del known[name]
    known |= {
        "source": arrivals(source).content_hash,
        "adapters": None if device.adapters is None else repr(device.adapters),
        "budget": _plain(spec.budget),
        "cluster": None if spec.cluster is None else _by_content(spec),
        "parameters": dict(spec.parameters),
    }
    identity = {**head, "spec": known, "images": run.images, "policy_source": policy_source}
    return replace(run, head=head, key=run_key(identity))


def _by_content(spec: RunSpec) -> Any:
    """The cluster in values that JSON holds, each profile that it names by its content."""
    assert spec.cluster is not None

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: spec.worker_hashes.get(v, v) if k == "profile" else named(v) for k, v in value.items()}
        return [named(part) for part in value] if isinstance(value, list) else value

    return named(spec.cluster.model_dump(mode="json"))


def _plain(budget: SkipBudget) -> dict[str, Any]:
    """The budget in values that JSON holds, always in one order."""
    eligible = budget.eligible_steps
    if eligible is None:
        return asdict(budget)
    steps = {str(count): sorted(allowed) for count, allowed in sorted(eligible.items())}
    return {**asdict(replace(budget, eligible_steps=None)), "eligible_steps": steps}


def best_batch(values: Mapping[int, float | None], larger_is_better: bool = False) -> int:
    """The batch size of the least (or largest) value; ties go to the smaller, and one without a value loses."""

    def rank(batch: int) -> tuple[float, int]:
        value = values[batch]
        return (float("inf") if value is None else -value if larger_is_better else value, batch)

    return min(values, key=rank)


def nearest(load: float, searched: Iterable[float]) -> float:
    """The searched load that is nearest; between two, the higher."""
    return min(searched, key=lambda other: (round(abs(other - load), 9), -other))
