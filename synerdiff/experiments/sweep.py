"""A sweep: computes the runs of an experiment that are missing, then writes its tables.

``runs/KEY.parquet`` holds the requests of one finished run and, in its metadata, its row of ``runs.parquet``. Batch
sizes are compared first, where the experiment asks for it; the grid follows.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from synerdiff import __version__
from synerdiff.experiments.backends import Backend
from synerdiff.experiments.grid import Grid, best_batch
from synerdiff.experiments.grid_run import Run, compute, finished_row
from synerdiff.experiments.run_keys import engine_hash
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.sweep_fidelity import ssim_of
from synerdiff.experiments.sweep_tables import write_tables
from synerdiff.fidelity.table import FidelityTable
from synerdiff.files import atomic, claim_folder, require_writable_folder

MANIFEST = "manifest.json"
LIBRARIES = ("numpy", "pandas", "pyarrow", "simpy", "joblib", "pydantic")


@dataclass(slots=True)
class Results:
    """What a sweep found."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per run of the grid, in key order: what the run was, and its metrics."""
    batches: list[dict[str, Any]] = field(default_factory=list)
    """How each batch size was chosen: where, the best, and the mean latency of every one tried."""
    grid_runs: dict[str, Run] = field(default_factory=dict)
    """The runs of the grid by key."""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Workload -> what its trace file holds and is not replayed, by reason."""
    computed: int = 0
    found: int = 0
    """Runs that had been computed before."""


class _Count:
    def __init__(self, tell: Callable[[int, int], None] | None, total: int) -> None:
        self.tell, self.total, self.done = tell, total, 0

    def add(self, runs: int) -> None:
        self.done += runs
        if self.tell is not None:
            self.tell(self.done, self.total)


def run_sweep(grid: Grid, backend: Backend, on_progress: Callable[[int, int], None] | None = None) -> Results:
    """Compute what is missing and write the tables; ``on_progress`` hears (runs done, runs in all).

    Finished runs stay where they are whatever becomes of the others. InputError when the folder is not this
    experiment's or cannot be written, and for what only shows while simulating; ContractError from a policy.
    """
    claim(grid.folder, grid.experiment.name)
    require_writable_folder(grid.folder / "runs")
    results = Results(grid.folder)
    for workload, replicates in grid.sources.items():
        results.dropped[workload] = dict(arrivals(replicates[0]).dropped)
    _write_manifest(grid, results, complete=False)

    search = _distinct([run for runs in grid.searches.values() for run in runs.values()])
    count = _Count(on_progress, len(search) + grid.size)
    searched = _rows(search, backend, count, results)
    best = {}
    for place, runs in grid.searches.items():
        means = {batch: searched[run.key]["request_latency_mean_s"] for batch, run in runs.items()}
        best[place] = best_batch(means)
        results.batches.append({**place._asdict(), "best_batch": best[place], "mean_latency_s": means})

    results.grid_runs = {run.key: run for run in grid.runs(best)}
    rows = _rows(list(results.grid_runs.values()), backend, count, results)
    results.rows = [_with_ssim(rows[key], results.grid_runs[key], grid.tables) for key in sorted(rows)]
    write_tables(grid.folder, results.rows, [searched[key] for key in sorted(searched) if key not in rows])
    _write_manifest(grid, results, complete=True)
    return results


def _with_ssim(row: dict[str, Any], run: Run, tables: Mapping[str, FidelityTable]) -> dict[str, Any]:
    return {**row, "ssim": ssim_of(run, tables[row["profile"]])} if tables else row


def _distinct(runs: Sequence[Run]) -> list[Run]:
    return list({run.key: run for run in runs}.values())


def _rows(runs: Sequence[Run], backend: Backend, count: _Count, results: Results) -> dict[str, dict[str, Any]]:
    """Key -> row, from the files of finished runs where there are any."""
    found = {run.key: finished_row(run) for run in runs}
    rows = {key: row for key, row in found.items() if row is not None}
    results.found += len(rows)
    count.add(len(rows))
    missing = [run for run in runs if run.key not in rows]
    # The longest first, so that no process is left alone with one at the end.
    missing.sort(key=lambda run: -len(arrivals(run.source).requests))
    for key, row in backend.run_unordered(compute, missing):
        rows[key] = row
        results.computed += 1
        count.add(1)
    return rows


def claim(folder: Path, experiment: str) -> None:
    """Only an empty folder or this experiment's own results are written to; InputError otherwise."""
    claim_folder(folder, f"sweep {experiment}")


def _write_manifest(grid: Grid, results: Results, complete: bool) -> None:
    manifest = {
        "experiment": grid.experiment.name,
        "complete": complete,
        "config": grid.experiment.model_dump(mode="json"),
        "engine_hash": engine_hash(),
        "profile_hashes": {name: profile.content_hash for name, (_, profile) in grid.profiles.items()},
        "policy_hashes": {name: value for name, value in grid.policy_hashes.items() if value},
        "arrival_hashes": {
            name: {str(source.number): arrivals(source).content_hash for source in replicates}
            for name, replicates in grid.sources.items()
        },
        "dropped": results.dropped,
        "batches": results.batches,
        "runs": [row["key"] for row in results.rows],
        "versions": {
            "synerdiff": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
    }
    with atomic(grid.folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
