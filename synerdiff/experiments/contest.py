"""A contest: policies at their best batch sizes, on the same requests, in many cells.

One task is one policy in one cell; its results are one file, so that an interrupted contest goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from synerdiff.config.contest import Contest, Machines
from synerdiff.config.experiment import PolicyEntry
from synerdiff.core import InputError, Request, RunResult, SkipBudget
from synerdiff.experiments import one_run
from synerdiff.experiments.backends import Backend
from synerdiff.experiments.run_keys import engine_hash, policy_hash, run_key
from synerdiff.experiments.sources import Source, arrivals, search_source, sources
from synerdiff.files import atomic
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.scaling import scaled_profile
from synerdiff.profile.tables import Profile


@dataclass(frozen=True, slots=True)
class Cell:
    """Where policies meet."""

    profile: str
    contention: float
    decode_share: float
    decode_gpus: tuple[int, ...]
    workload: str


@dataclass(frozen=True, slots=True)
class Task:
    """One policy in one cell: everything that another process needs."""

    folder: Path
    cell: Cell
    profile_folder: Path
    profile_hash: str
    label: str
    setup: one_run.Setup
    steps_scale: float
    batches: tuple[int, ...]
    loads: tuple[float, ...]
    saturation_images: int
    slo_multiple: float | None
    search: Source
    replicates: tuple[Source, ...]
    policy_source: str
    key: str = ""

    @property
    def path(self) -> Path:
        return self.folder / "cells" / f"{self.key}.json"

    def with_key(self) -> Task:
        known = asdict(self)
        known["setup"] = {**asdict(self.setup), "base_folder": "", "parameters": dict(self.setup.parameters)}
        identity = {
            **{name: value for name, value in known.items() if name not in ("folder", "profile_folder", "key")},
            "engine": engine_hash(),
            "arrivals": [arrivals(source).content_hash for source in (self.search, *self.replicates)],
        }
        return replace(self, key=run_key(json.loads(json.dumps(identity, default=str))))


def contest_tasks(contest: Contest, base: Path, folder: Path) -> list[Task]:
    """Every policy in every cell, a cell that is listed twice only once. InputError when a policy cannot be built."""
    from policies.registry import build_policy

    for entry in contest.policies:
        build_policy(entry.policy, dict(entry.parameters), base)
    experiment = contest.experiment
    profiles: dict[str, tuple[Path, Profile]] = {}
    for name in dict.fromkeys(name for machines in contest.machines for name in machines.profiles):
        place = find_profile(name, base).resolve()
        profiles[name] = (place, load_profile(place))
    tasks: dict[str, Task] = {}
    for workload in contest.workloads:
        search = search_source(workload, experiment, base)
        replicates = tuple(sources(workload, experiment, base))
        for machines in contest.machines:
            for name, contention, share, gpus in _machines(machines):
                place, profile = profiles[name]
                cell = Cell(profile.name, contention, share, gpus, workload.name)
                for entry in contest.policies:
                    task = Task(
                        folder,
                        cell,
                        place,
                        profile.content_hash,
                        entry.name,
                        _setup(contest, entry, gpus, base),
                        entry.steps_scale,
                        contest.batches,
                        workload.loads or contest.loads,
                        contest.saturation_images,
                        contest.slo_multiple,
                        search,
                        replicates,
                        policy_hash(entry.policy, base),
                    ).with_key()
                    tasks[task.key] = task
    return list(tasks.values())


def _machines(machines: Machines) -> Iterator[tuple[str, float, float, tuple[int, ...]]]:
    """With all decode lanes on other GPUs contention changes nothing: its first value stands for all."""
    for name, gpus in product(machines.profiles, machines.decode_gpus):
        for contention in machines.contention if 0 in gpus else machines.contention[:1]:
            for share in machines.decode_share:
                yield name, contention, share, gpus


def _setup(contest: Contest, entry: PolicyEntry, gpus: tuple[int, ...], base: Path) -> one_run.Setup:
    budget = contest.skip_budget.budget if entry.may_skip else SkipBudget()
    return one_run.Setup(entry.policy, dict(entry.parameters), gpus, budget, None, base)


def run_contest(
    tasks: Sequence[Task], backend: Backend, on_progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """The rows of all tasks, in the tasks' order; what is missing is computed."""
    rows = {task.key: found for task in tasks if (found := _finished(task)) is not None}
    missing = list({task.key: task for task in tasks if task.key not in rows}.values())
    if on_progress is not None:
        on_progress(len(rows), len(rows) + len(missing))
    for key, found in backend.run_unordered(compute, missing):
        rows[key] = found
        if on_progress is not None:
            on_progress(len(rows), len(rows) + len(missing) - sum(task.key in rows for task in missing))
    return [row for task in tasks for row in rows[task.key]]


def _finished(task: Task) -> list[dict[str, Any]] | None:
    if not task.path.is_file():
        return None
    try:
        found = json.loads(task.path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found["rows"] if isinstance(found, dict) and found.get("key") == task.key else None


def compute(task: Task) -> tuple[str, list[dict[str, Any]]]:
    """Measure one policy in one cell and keep the rows. Called in worker processes."""
    profile = _profile(task)
    rows = [*_saturation(task, profile), *(row for load in task.loads for row in _latency(task, profile, load))]
    task.path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(task.path) as temporary:
        temporary.write_text(json.dumps({"key": task.key, "rows": rows}) + "\n", encoding="utf-8")
    return task.key, rows


def _profile(task: Task) -> Profile:
    return _scaled(task.profile_folder, task.profile_hash, task.cell.contention, task.cell.decode_share)


@lru_cache(maxsize=32)
def _scaled(folder: Path, content_hash: str, contention: float, decode_share: float) -> Profile:
    profile = load_profile(folder)
    if profile.content_hash != content_hash:
        raise InputError(f"{folder}: the profile changed while the contest ran; start it again.")
    return scaled_profile(profile, contention, decode_share)


def _head(task: Task, profile: Profile, measure: str, load: float | None, seed: int, batch: int) -> dict[str, Any]:
    cell = task.cell
    return {
        "profile": cell.profile,
        "estimated": profile.estimated,
        "contention": cell.contention,
        "decode_share": cell.decode_share,
        "decode_gpus": ",".join(str(gpu) for gpu in cell.decode_gpus),
        "workload": cell.workload,
        "policy": task.label,
        "measure": measure,
        "load": load,
        "seed": seed,
        "batch": batch,
    }


def _batches(task: Task, requests: Sequence[Request], profile: Profile) -> list[int]:
    rows = 2 if any(request.guidance_scale > 1 for request in requests) else 1
    most = max(1, profile.max_rows // rows)
    return [batch for batch in task.batches if batch <= most] or [most]


def _run(task: Task, requests: Sequence[Request], profile: Profile, batch: int) -> RunResult:
    requests = one_run.with_fewer_steps(requests, task.steps_scale)
    setup = replace(task.setup, parameters={**task.setup.parameters, "batch": batch})
    return one_run.run_simulated(requests, profile, setup)


def _saturation(task: Task, profile: Profile) -> Iterator[dict[str, Any]]:
    """Images per second while all requests wait from the start; the batch size of the highest rate."""
    sizes = _batches(task, _backlog(task, task.search, profile, 1), profile)
    rates = {batch: _saturated(task, task.search, profile, batch)[0] for batch in sizes}
    batch = max(rates, key=lambda size: (rates[size], -size))
    for source in task.replicates:
        rate, result = _saturated(task, source, profile, batch)
        head = _head(task, profile, "saturation", None, source.number, batch)
        yield {**head, "image_throughput": rate, **_marks(result)}


def _backlog(task: Task, source: Source, profile: Profile, images: int) -> list[Request]:
    """So many images of the source's requests, over and over if need be, all there from the start."""
    known = one_run.fitted(arrivals(source).requests, profile, None, task.slo_multiple)
    taken: list[Request] = []
    while images > 0:
        request = known[len(taken) % len(known)]
        taken.append(replace(request, request_id=len(taken), arrival_ns=0))
        images -= request.images
    return taken


def _saturated(task: Task, source: Source, profile: Profile, batch: int) -> tuple[float, RunResult]:
    """The rate, on a longer backlog where decodes lag so far behind that too few end beside full steps."""
    from synerdiff.results.metrics import saturation_throughput
    from synerdiff.results.records import work_table

    for longer in (1, 4, 16):
        result = _run(task, _backlog(task, source, profile, longer * task.saturation_images), profile, batch)
        try:
            return saturation_throughput(work_table(result.work, result.sample_names).to_pandas()), result
        except InputError:
            if longer == 16:
                raise
    raise AssertionError("the loop returns or raises")


def _latency(task: Task, profile: Profile, load: float) -> Iterator[dict[str, Any]]:
    """Latencies at a load; the batch size of the least mean latency."""

    from synerdiff.results.metrics import latencies_s

    def offered(source: Source) -> list[Request]:
        from traces.scaling import scaled

        known = arrivals(source)
        requests = one_run.fitted(known.requests, profile, None, task.slo_multiple)
        return scaled(requests, one_run.time_scale_for_load(known.requests, profile, load, known.window))

    requests = offered(task.search)
    means = {}
    for batch in _batches(task, requests, profile):
        latencies = latencies_s(_run(task, requests, profile, batch).requests)
        means[batch] = fmean(latencies) if latencies else inf
    batch = min(means, key=lambda size: (means[size], size))
    for source in task.replicates:
        requests = offered(source)
        result = _run(task, requests, profile, batch)
        yield {
            **_head(task, profile, "latency", load, source.number, batch),
            **_summary(result, requests, profile),
            **_marks(result),
        }


def _summary(result: RunResult, requests: Sequence[Request], profile: Profile) -> dict[str, Any]:
    from synerdiff.results.records import requests_table, work_table

    frames = (requests_table(result.requests), work_table(result.work, result.sample_names))
    summary = one_run.summary_of(frames[0].to_pandas(), frames[1].to_pandas(), requests, profile)
    names = ("request_latency_mean_s", "request_latency_p99_s", "request_throughput", "image_throughput", "goodput")
    return {name: summary[name] for name in (*names, "good_fraction", "error_request_count")}


def _marks(result: RunResult) -> dict[str, Any]:
    """Shares of guided sample-steps that skipped guidance, and of chunks that were forced."""
    steps = sum(r.request.steps * r.request.images for r in result.requests if r.request.guidance_scale > 1)
    chunks = [work.forced for work in result.work if work.kind == "chunk"]
    return {
        "skip_fraction": sum(r.skipped_steps for r in result.requests) / steps if steps else 0.0,
        "forced_fraction": sum(chunks) / len(chunks) if chunks else 0.0,
    }
