"""A sweep: computes the runs of an experiment that are missing, then writes its tables.

Batch sizes are compared first, where the experiment asks for it; the grid follows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from synerdiff.core import NO_SKIPS
from synerdiff.experiments import parcel
from synerdiff.experiments.backends import Backend
from synerdiff.experiments.grid import Grid, Run, best_batch
from synerdiff.experiments.run import Outcome, Prepared, capacity_per_s, execute, prepare, saturated
from synerdiff.experiments.sources import Arrivals, arrivals
from synerdiff.experiments.store import (
    code_hash,
    finished_row,
    keep_file,
    keep_run,
    run_file,
    versions,
    write_tables,
)
from synerdiff.fidelity.floor import run_ssim
from synerdiff.fidelity.table import FidelityTable
from synerdiff.files import claim_folder, require_writable_folder, sha256_of_files, write_json
from synerdiff.profile.tables import Profile
from synerdiff.results.folder import state
from synerdiff.results.records import REQUEST_COLUMNS, read_table

MANIFEST = "manifest.json"
TABLES = ("runs.parquet", "requests.parquet")


@dataclass(slots=True)
class Results:
    """What a sweep gave."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per run of the grid, in key order: what the run was, and its metrics."""
    batches: list[dict[str, Any]] = field(default_factory=list)
    """How each batch size was chosen: where, the best, and the value of every one tried."""
    grid_runs: dict[str, Run] = field(default_factory=dict)
    """The runs of the grid by key."""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Workload -> what its trace file holds and is not replayed, by reason."""
    computed: int = 0
    reused: int = 0
    """Runs that had been computed before."""
    profiles: list[Profile] = field(default_factory=list)
    """Of the grid."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of synerdiff, Python and the libraries that make the numbers."""


def run_sweep(grid: Grid, backend: Backend, on_progress: Callable[[int, int], None] | None = None) -> Results:
    """Compute what is missing and write the tables; ``on_progress`` hears (runs done, runs in all).

    Finished runs stay where they are whatever becomes of the others. InputError when the folder is not this
    experiment's or cannot be written, and for what only shows while simulating; ContractError from a policy.
    """
    claim_folder(grid.folder, f"sweep {grid.experiment.name}")
    require_writable_folder(grid.folder / "runs")
    for torn in (grid.folder / "runs").glob(".*.part"):  # of a worker that was killed while it wrote
        torn.unlink()
    results = Results(grid.folder, profiles=[device.profile for device in grid.devices.values()], versions=versions())
    if not (grid.folder / MANIFEST).is_file():
        write_manifest(grid.folder, {"experiment": grid.experiment.name, "complete": False})
    for (workload, _), replicates in grid.sources.items():
        results.dropped[workload] = dict(arrivals(replicates[0]).dropped)
    search = {run.key: run for tried in grid.searches.values() for run in tried.values()}
    total = len(search) + grid.size

    def tell() -> None:
        if on_progress is not None:
            on_progress(results.reused + results.computed, total)

    searched = rows_of(search, backend, results, tell)
    best = {}
    for place, tried in grid.searches.items():
        column = "saturation_throughput" if place.load is None else "request_latency_mean_s"
        values = {batch: searched[run.key][column] for batch, run in tried.items()}
        best[place] = best_batch(values, larger_is_better=place.load is None)
        where = {**place.cell._asdict(), "policy": place.policy, "load": place.load}
        results.batches.append({**where, "best_batch": best[place], column: values})
    results.grid_runs = {run.key: run for run in grid.runs(best)}
    rows = rows_of(results.grid_runs, backend, results, tell)
    results.rows = [with_ssim(rows[key], run, grid.tables) for key, run in results.grid_runs.items()]
    _write(grid, results, [searched[key] for key in search if key not in rows])
    return results


def rows_of(
    runs: Mapping[str, Run], backend: Backend, results: Results, tell: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Key -> row, from the files of finished runs where there are any; what is missing is computed."""
    found = {key: finished_row(run.folder, key, run.keep_requests) for key, run in runs.items()}
    rows = {key: row for key, row in found.items() if row is not None}
    results.reused += len(rows)
    tell()
    missing = [run for run in runs.values() if run.key not in rows]
    # The longest first, so that no process is left alone with one at the end.
    missing.sort(key=lambda run: -len(arrivals(run.source).requests))
    if missing:
        write_manifest(missing[0].folder, {**read_manifest(missing[0].folder), "complete": False})
    for key, row in _computed(missing, backend):
        rows[key] = row
        results.computed += 1
        tell()
    return rows


def _computed(missing: Sequence[Run], backend: Backend) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, row) of runs that are kept now: written where they were computed, or here when that was elsewhere."""
    if not backend.elsewhere:
        yield from backend.run_unordered(compute, missing)
        return
    for key, row, content in backend.run_unordered(partial(parcel.computed, compute=compute), parcel.packed(missing)):
        keep_file(missing[0].folder, key, content)
        yield key, row


def compute(run: Run) -> tuple[str, dict[str, Any]]:
    """Simulate one run, keep it and return (key, row). Called in worker processes.

    A row holds the columns of ``Run.head``, the metrics (at saturation ``saturation_throughput`` too, samples a second;
    latencies then count from the start), the rate beside what the policy sustains, ``forced_fraction`` of the chunks,
    and for fleets what their GPUs did.
    """
    prepared = prepare(run.spec)
    if run.images is None:
        outcome = execute(prepared)
        metrics = outcome.summary
    else:
        outcome, rate = saturated(prepared, run.images)
        metrics = {"saturation_throughput": rate, **outcome.summary}
    forced = [work.forced for work in outcome.result.work if work.kind == "chunk"]
    row = {
        "key": run.key,
        **run.head,
        "time_scale": prepared.time_scale,
        "decisions": outcome.result.decisions,
        **metrics,
        **_offered(run, prepared, metrics),
        "forced_fraction": sum(forced) / len(forced) if forced else 0.0,
        **_fleet_columns(run, outcome),
    }
    keep_run(run.folder, run.key, row, outcome.tables[0] if run.keep_requests else None)
    return run.key, row


def _offered(run: Run, prepared: Prepared, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The rate, what the policy sustains at its own batch, and the word for both; not of fleets, loops and maps."""
    rate = prepared.rate_per_s
    if run.load is None or rate is None or not run.keep_requests or run.spec.cluster is not None:
        return {}
    source = run.spec.source
    own = source.content_hash if isinstance(source, Arrivals) else source
    # All but the load, a policy's parameters included: a search tries many under one label.
    same = (repr(replace(run.spec, load=None, source=(), profile=Path())), own)
    if same not in _CAPACITIES:
        _CAPACITIES[same] = capacity_per_s(prepared)
    capacity = _CAPACITIES[same]
    share = None if capacity is None else rate / capacity
    word = None if share is None else state(share, metrics)
    return {"rate_per_s": rate, "policy_capacity_per_s": capacity, "policy_load": share, "state": word}


_CAPACITIES: dict[tuple[Any, ...], float | None] = {}
"""Of this process: the same at every load."""


def _fleet_columns(run: Run, outcome: Outcome) -> dict[str, Any]:
    """What a fleet's GPUs did: those that it was given count, also when an odd one is left over."""
    cluster, facts = run.spec.cluster, outcome.served.facts
    if cluster is None:
        return {}
    requests = outcome.result.requests
    images = sum(record.request.images for record in requests if record.status == "done")
    held_s = run.cell.gpus * outcome.result.end_ns / 1e9
    return {
        "workers": len(cluster.workers),
        "services": len(cluster.controlnet_services),
        "gpu_seconds_per_image": held_s / images if images else None,
        "busy_gpu_seconds_per_image": facts["busy_gpu_seconds_per_image"],
        "lora_reads_per_request": facts["lora_reads"] / len(requests),
    }


def with_ssim(row: Mapping[str, Any], run: Run, tables: Mapping[str, FidelityTable]) -> dict[str, Any]:
    """The row with the mean SSIM of its images against full guidance in the steps that were asked for."""
    if not tables or not run.keep_requests or (run.spec.budget != NO_SKIPS and run.spec.budget.eligible_steps is None):
        return dict(row)  # a budget by its parts allows what no table was made for
    requests = read_table(run_file(run.folder, run.key), REQUEST_COLUMNS)[0]
    asked = {request.request_id: request.steps for request in arrivals(run.source).requests}
    images = (
        (own["modes"], own["guidance_scale"], asked[own["request_id"]])
        for own in requests.select(["request_id", "modes", "guidance_scale"]).to_pylist()
    )
    return {**row, "ssim": run_ssim(tables[row["profile"]], images)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the last sweep left; empty for none, or one that is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the folder's manifest, atomically."""
    write_json(folder / MANIFEST, manifest)


def _write(grid: Grid, results: Results, search: Sequence[Mapping[str, Any]]) -> None:
    """The tables, where they are not what they would become, and the manifest."""
    before = read_manifest(grid.folder)
    manifest = {
        "experiment": grid.experiment.name,
        "complete": True,
        "config": grid.experiment.model_dump(mode="json"),
        "code_hash": code_hash(),
        "profile_hashes": {device.profile.name: device.profile.content_hash for device in grid.devices.values()},
        "policy_hashes": {name: value for name, value in grid.policy_hashes.items() if value},
        "arrival_hashes": {
            name if share is None else f"{name} {share:g}": {
                str(s.number): arrivals(s).content_hash for s in replicates
            }
            for (name, share), replicates in grid.sources.items()
        },
        "dropped": results.dropped,
        "read_as": {name: list(arrivals(replicates[0]).read_as) for (name, _), replicates in grid.sources.items()},
        "batches": results.batches,
        "runs": [row["key"] for row in results.rows],
        "versions": results.versions,
        "figures": before.get("figures", {}),
    }
    manifest = json.loads(json.dumps(manifest))  # as it will be read again
    same = all(before.get(name) == value for name, value in manifest.items())
    if not same or before.get("tables") != _table_hashes(grid.folder):
        requests = [row["key"] for row in results.rows if results.grid_runs[row["key"]].keep_requests]
        write_tables(grid.folder, results.rows, search, requests)
    write_manifest(grid.folder, {**manifest, "tables": _table_hashes(grid.folder)})


def _table_hashes(folder: Path) -> dict[str, str]:
    return {name: sha256_of_files([folder / name]) for name in TABLES if (folder / name).is_file()}
