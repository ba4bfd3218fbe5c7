"""``synerdiff tune``: a policy's parameters for an objective, searched on training seeds and judged on others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import print_parts, progress


def tune(
    file: Annotated[Path, typer.Argument(help="A tune file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results (default: results/NAME).")] = None,
    jobs: options.Jobs = None,
    backend: options.BackendName = "loky",
    address: options.Address = None,
    emit: options.Emit = None,
) -> None:
    """Search a policy's parameters for an objective, and report the best beside the default on other seeds.

    Writes policy.yaml (for simulate, run, sweep and capacity), sweep.yaml and capacity.yaml.
    """
    from synerdiff.experiments.tune_report import open_tune

    run = open_tune(file, out, jobs, backend, address, emit)
    with progress("tune") as update:
        parts = run(update)
    print_parts(parts)
