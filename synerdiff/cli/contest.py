"""``synerdiff contest``: policies at their best batch sizes in many cells, with tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli.progress import progress


def contest(
    file: Annotated[Path, typer.Argument(help="A contest file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results (default: results/NAME).")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes (default: one per core).", min=1, max=4096)] = None,
    backend: Annotated[str, typer.Option(help="loky: this machine; ray: a Ray cluster.")] = "loky",
) -> None:
    """Compare policies cell by cell, each at its best batch size on the same requests; computes what is missing."""
    from synerdiff.config.contest import load_contest
    from synerdiff.experiments.backends import make_backend
    from synerdiff.experiments.contest import contest_tasks, run_contest
    from synerdiff.experiments.contest_report import write_report
    from synerdiff.files import claim_folder

    found = load_contest(file)
    folder = Path("results") / found.name if out is None else out
    claim_folder(folder, f"contest {found.name}")
    tasks = contest_tasks(found, file.parent, folder)
    with progress(found.name) as on_progress:
        rows = run_contest(tasks, make_backend(backend, jobs), on_progress)
    for line in write_report(found, rows, folder):
        typer.echo(line)
