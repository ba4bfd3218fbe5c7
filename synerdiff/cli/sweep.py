"""``synerdiff sweep``: an experiment's grid of simulated runs, its tables and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synerdiff.cli.progress import progress

if TYPE_CHECKING:
    from synerdiff.experiments.sweep import Results


def sweep(
    file: Annotated[Path, typer.Argument(help="An experiment file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results (default: results/NAME).")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes (default: one per core).")] = None,
    backend: Annotated[str, typer.Option(help="loky: this machine; ray: a Ray cluster.")] = "loky",
) -> None:
    """Compute every run of an experiment that is missing, over all cores, and draw its figures."""
    from synerdiff.config.experiment import load_experiment
    from synerdiff.core import InputError
    from synerdiff.experiments.backends import make_backend
    from synerdiff.experiments.grid import Grid
    from synerdiff.experiments.sweep import claim, run_sweep
    from synerdiff.experiments.sweep_lines import batch_lines, result_lines

    if jobs is not None and not 1 <= jobs <= 4096:
        raise InputError(f"--jobs is {jobs}; a whole number from 1 to 4096 is needed.")
    experiment = load_experiment(file)
    runner = make_backend(backend, jobs or experiment.jobs)
    folder = Path("results") / experiment.name if out is None else out
    claim(folder, experiment.name)
    grid = Grid(experiment, file.parent, folder)
    with progress(experiment.name) as on_progress:
        results = run_sweep(grid, runner, on_progress)
    for line in [
        *batch_lines(results.batches),
        *result_lines(results.rows, [entry.name for entry in experiment.policies], experiment.reference),
    ]:
        typer.echo(line)
    _finish(folder, results)
    if experiment.figures:
        from synerdiff.experiments.sweep_figures import draw_figures

        written = draw_figures(experiment, results)
        typer.echo(f"{folder / 'figures'}: {len(written)} files")


def _finish(folder: Path, results: Results) -> None:
    typer.echo(
        f"{folder}: {len(results.rows)} runs, {results.computed} computed now and {results.found} found "
        "(those that compared batch sizes included)"
    )
