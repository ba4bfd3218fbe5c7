"""``synerdiff sweep``: an experiment's grid of simulated runs, its tables and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import print_parts, progress


def sweep(
    file: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results (default: results/NAME).")] = None,
    jobs: options.Jobs = None,
    backend: options.BackendName = "loky",
    address: options.Address = None,
) -> None:
    """Compute every run of an experiment that is missing, over all cores, and draw what changed."""
    from synerdiff.experiments.report import open_sweep

    run = open_sweep(file, out, jobs, backend, address)
    with progress(file.stem) as update:
        parts = run(update)
    print_parts(parts)
