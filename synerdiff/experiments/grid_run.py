"""One run of a sweep: what a worker process needs to know, what it does, and the file that it leaves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from synerdiff.core import InputError, Request, RunResult, SkipBudget
from synerdiff.experiments import one_run
from synerdiff.experiments.run_keys import engine_hash, run_key
from synerdiff.experiments.sources import Source, arrivals
from synerdiff.profile.folder import load_profile
from synerdiff.profile.tables import Profile
from synerdiff.results.records import REQUEST_COLUMNS, read_table, requests_table, work_table, write_table
from traces.scaling import scaled


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a sweep, complete enough for another process to compute it."""

    folder: Path
    """The sweep's."""
    profile_folder: Path
    profile_hash: str
    source: Source
    load: float
    label: str
    setup: one_run.Setup
    slo_seconds: float | None = None
    slo_multiple: float | None = None
    policy_source: str = ""
    """Hash of a user's policy module."""
    steps_scale: float = 1.0
    """Below 1: the requests take that share of their steps, with the deadlines of all of them."""
    key: str = ""

    @property
    def path(self) -> Path:
        return self.folder / "runs" / f"{self.key}.parquet"

    def with_key(self) -> Run:
        """The run with the hash over everything that its records depend on."""
        identity = {
            **row_head(self),
            "arrivals": arrivals(self.source).content_hash,
            "profile_hash": self.profile_hash,
            "engine": engine_hash(),
            "policy_source": self.policy_source,
            "decode_gpus": list(self.setup.decode_gpus),
            "budget": _plain(self.setup.budget),
            "dispersion_seed": self.setup.dispersion_seed,
            "slo": [self.slo_seconds, self.slo_multiple],
        }
        return replace(self, key=run_key(identity))


def _plain(budget: SkipBudget) -> dict[str, Any]:
    """The budget in values that JSON holds, always in one order."""
    eligible = budget.eligible_steps
    if eligible is None:
        return asdict(budget)
    steps = {str(count): sorted(found) for count, found in sorted(eligible.items())}
    return {**asdict(replace(budget, eligible_steps=None)), "eligible_steps": steps}


def row_head(run: Run) -> dict[str, Any]:
    """The columns of ``runs.parquet`` that say which run a row is about."""
    profile = profile_as_it_was(run.profile_folder, run.profile_hash)
    parameters = {name: value for name, value in run.setup.parameters.items() if name != "batch"}
    return {
        "profile": profile.name,
        "estimated": profile.estimated,
        "workload": run.source.workload,
        "policy": run.label,
        "policy_name": run.setup.policy,
        "parameters": json.dumps(parameters, sort_keys=True),
        "steps_scale": run.steps_scale,
        "batch": run.setup.parameters.get("batch"),
        "load": run.load,
        "seed": run.source.number,
    }


def replayed(run: Run) -> tuple[Profile, list[Request], float, RunResult]:
    """(profile, requests at the run's load as they were asked for, their time scale, the records): the same whenever
    it is asked."""
    profile = profile_as_it_was(run.profile_folder, run.profile_hash)
    known = arrivals(run.source)
    scale = one_run.time_scale_for_load(known.requests, profile, run.load, known.window)
    requests = scaled(one_run.fitted(known.requests, profile, run.slo_seconds, run.slo_multiple), scale)
    served = one_run.with_fewer_steps(requests, run.steps_scale)
    return profile, requests, scale, one_run.run_simulated(served, profile, run.setup)


def compute(run: Run) -> tuple[str, dict[str, Any]]:
    """Simulate one run, write its file and return (key, row). Called in worker processes."""
    profile, requests, scale, result = replayed(run)
    table = requests_table(result.requests)
    work = work_table(result.work, result.sample_names)
    row = {
        "key": run.key,
        **row_head(run),
        "time_scale": scale,
        "decisions": result.decisions,
        **one_run.summary_of(table.to_pandas(), work.to_pandas(), requests, profile, run.load),
    }
    write_table(run.path, table, row)
    return run.key, row


def finished_row(run: Run) -> dict[str, Any] | None:
    """The row of a finished run; a file that is not whole counts as missing and is computed again."""
    if not run.path.is_file():
        return None
    try:
        row = read_table(run.path, REQUEST_COLUMNS)[1]
    except InputError:
        return None
    return row if row.get("key") == run.key else None


@lru_cache(maxsize=16)
def profile_as_it_was(folder: Path, content_hash: str) -> Profile:
    """A profile as it was when the sweep began, kept for the next run of this process."""
    profile = load_profile(folder)
    if profile.content_hash != content_hash:
        raise InputError(f"{folder}: the profile changed while the sweep ran; start the sweep again.")
    return profile
