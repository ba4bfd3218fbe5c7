"""From an experiment to its runs: profile x workload x policy x load x replicate, and the search for batch sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from synerdiff.config.experiment import Experiment, PolicyEntry, Workload
from synerdiff.core import NO_SKIPS, InputError, SkipBudget, WorkerInfo
from synerdiff.experiments.grid_run import Run
from synerdiff.experiments.one_run import Setup, fitted
from synerdiff.experiments.run_keys import policy_hash
from synerdiff.experiments.sources import Source, arrivals, search_source, sources
from synerdiff.experiments.sweep_fidelity import require_covered, tables_of
from synerdiff.fidelity.floor import floor_for_requests
from synerdiff.profile.capacity import mix_of
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.tables import Profile


class Place(NamedTuple):
    """Where a policy's batch size is searched."""

    profile: str
    workload: str
    policy: str
    load: float


class Grid:
    """The runs of an experiment, checked as far as that goes without simulating.

    ``base`` is the folder of the experiment's file: profiles, traces and policy modules are looked up there too.
    """

    def __init__(self, experiment: Experiment, base: Path, folder: Path) -> None:
        self.experiment = experiment
        self.base = base.resolve()
        self.folder = folder.resolve()
        self.profiles: dict[str, tuple[Path, Profile]] = {}
        for name in experiment.profiles:
            place = find_profile(name, base).resolve()
            profile = load_profile(place)
            if profile.name in self.profiles:
                raise InputError(f"profiles: {name} and another one are both named '{profile.name}'.")
            self.profiles[profile.name] = (place, profile)
        self.sources = {workload.name: sources(workload, experiment, self.base) for workload in experiment.workloads}
        self._floors: dict[tuple[str, Source], SkipBudget] = {}
        self.policy_hashes = {entry.policy: self._checked(index) for index, entry in enumerate(experiment.policies)}
        self.tables = tables_of(experiment, self.profiles, self.base)
        """The fidelity table by profile, where a floor on fidelity is asked for; what it does not cover is refused."""
        for table in self.tables.values():
            require_covered(table, experiment, self.sources)
        self.searches = self._search_runs()
        """Batch -> run, for every place where a batch size is searched."""

    def _checked(self, index: int) -> str:
        """The hash of the policy's source; InputError when it cannot serve a profile with a workload."""
        from policies.registry import build_policy, policy_parameters

        entry = self.experiment.policies[index]
        known = [parameter.name for parameter in policy_parameters(entry.policy, self.base)]
        if entry.batch is not None and "batch" not in known:
            raise InputError(f"policies[{index}].batch: policy '{entry.policy}' has no parameter 'batch'.")
        parameters = dict(entry.parameters)
        if isinstance(entry.batch, int):
            parameters["batch"] = entry.batch
        for _, profile in self.profiles.values():
            for replicates in self.sources.values():
                for source in replicates:
                    requests = fitted(arrivals(source).requests, profile)
                    worker = WorkerInfo(profile.max_rows, 0, self.experiment.decode_gpus, mix_of(requests).sample_rows)
                    build_policy(entry.policy, parameters, self.base).reset(worker, profile)
        return policy_hash(entry.policy, self.base)

    @property
    def size(self) -> int:
        """How many runs the grid has, those of the search not counted."""
        replicates = sum(len(self._loads(w)) * len(self.sources[w.name]) for w in self.experiment.workloads)
        return len(self.profiles) * len(self.experiment.policies) * replicates

    def _search_runs(self) -> dict[Place, dict[int, Run]]:
        """Sizes beyond a profile's rows are left out; InputError when none is left."""
        found: dict[Place, dict[int, Run]] = {}
        for workload in self.experiment.workloads:
            if workload.batch_from is not None:
                continue
            source = search_source(workload, self.experiment, self.base)
            for name, (folder, profile) in self.profiles.items():
                most = max(1, profile.max_rows // mix_of(arrivals(source).requests).sample_rows)
                for entry in self.experiment.policies:
                    if not entry.searched:
                        continue
                    wanted = entry.batch if isinstance(entry.batch, tuple) else self.experiment.batch_search.batches
                    fitting = [batch for batch in sorted(set(wanted)) if batch <= most]
                    if not fitting:
                        raise InputError(
                            f"policy '{entry.name}': the steps of profile '{name}' have at most {most} samples, which "
                            f"is less than any batch size to try ({', '.join(str(batch) for batch in wanted)})."
                        )
                    for load in self._searched_loads(workload):
                        found[Place(name, workload.name, entry.name, load)] = {
                            batch: self._run(folder, profile, source, load, entry, batch) for batch in fitting
                        }
        return found

    def runs(self, best: Mapping[Place, int]) -> list[Run]:
        """Every run of the grid; ``best`` holds the batch sizes that the search found."""
        found = []
        for name, (folder, profile) in self.profiles.items():
            for workload in self.experiment.workloads:
                for entry in self.experiment.policies:
                    for load in self._loads(workload):
                        batch = entry.batch if isinstance(entry.batch, int) else None
                        if entry.searched:
                            searched = nearest(load, self.experiment.batch_search.loads)
                            batch = best[Place(name, workload.batch_from or workload.name, entry.name, searched)]
                        for source in self.sources[workload.name]:
                            found.append(self._run(folder, profile, source, load, entry, batch))
        return found

    def _searched_loads(self, workload: Workload) -> list[float]:
        """The searched loads that are the nearest one of some load of the grid."""
        users = [other for other in self.experiment.workloads if workload.name in (other.name, other.batch_from)]
        return sorted({nearest(x, self.experiment.batch_search.loads) for user in users for x in self._loads(user)})

    def _loads(self, workload: Workload) -> Sequence[float]:
        return workload.loads or self.experiment.loads

    def _budget(self, folder: Path, profile: Profile, source: Source, entry: PolicyEntry) -> SkipBudget:
        section = self.experiment.skip_budget
        if not entry.may_skip:
            return NO_SKIPS
        if section.min_ssim is None:
            return section.budget
        key = (profile.name, source)
        if key not in self._floors:
            table = None if section.fidelity is None else self.base / section.fidelity
            requests = fitted(arrivals(source).requests, profile)
            self._floors[key] = floor_for_requests(section.min_ssim, requests, profile, folder, table).budget
        return self._floors[key]

    def _run(
        self, folder: Path, profile: Profile, source: Source, load: float, entry: PolicyEntry, batch: int | None
    ) -> Run:
        experiment = self.experiment
        setup = Setup(
            entry.policy,
            dict(entry.parameters) if batch is None else {**entry.parameters, "batch": batch},
            experiment.decode_gpus,
            self._budget(folder, profile, source, entry),
            source.number if experiment.dispersion else None,
            self.base,
        )
        return Run(
            folder=self.folder,
            profile_folder=folder,
            profile_hash=profile.content_hash,
            source=source,
            load=load,
            label=entry.name,
            setup=setup,
            slo_seconds=experiment.slo.seconds if experiment.slo else None,
            slo_multiple=experiment.slo.solo_multiple if experiment.slo else None,
            policy_source=self.policy_hashes[entry.policy],
            steps_scale=entry.steps_scale,
        ).with_key()


def best_batch(mean_latency_s: Mapping[int, float | None]) -> int:
    """The batch size of the least mean latency; ties go to the smaller, and one without any finished request loses."""

    def rank(batch: int) -> tuple[float, int]:
        mean = mean_latency_s[batch]
        return (float("inf") if mean is None else mean, batch)

    return min(mean_latency_s, key=rank)


def nearest(load: float, searched: Iterable[float]) -> float:
    """The searched load that is nearest; between two, the higher."""
    return min(searched, key=lambda other: (round(abs(other - load), 9), -other))
