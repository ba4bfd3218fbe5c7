"""``synerdiff swift``: where SwiftDiffusion's strategies pay, and what caches spare; tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli.progress import progress


def swift(
    file: Annotated[Path, typer.Argument(help="The study's file (YAML), for example experiments/swift.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("results/swift"),
    data: Annotated[
        Path | None,
        typer.Option(envvar="SYNERDIFF_DATA", help="Folder of the published curves, to compare with where given."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=4096, help="Processes (default: one per core).")] = None,
) -> None:
    """Simulate every set of strategies over LoRA share, load and number of GPUs, and draw where each pays."""
    from dataclasses import asdict

    from synerdiff.experiments.adapter_mix import cache_curves
    from synerdiff.experiments.backends import LokyBackend
    from synerdiff.experiments.layouts import ablation
    from synerdiff.experiments.swift_grid import load_study, run_grid, speedups, write_runs
    from synerdiff.files import claim_folder, write_rows

    study = load_study(file)
    claim_folder(out, "swift")
    with progress("strategies") as on_progress:
        rows = run_grid(study, LokyBackend(jobs), on_progress)
    ratios = speedups(rows)
    write_runs(out / "runs.csv", rows)
    write_rows(out / "speedups.csv", list(ratios[0]), [list(row.values()) for row in ratios])
    cases = ablation()
    write_rows(
        out / "ablation.csv",
        ("name", "system", "gpus", "latency_s", "gpu_seconds"),
        [(case.name, case.system, case.gpus, case.latency_s, case.gpu_seconds) for case in cases],
    )
    curves = cache_curves(data)
    write_rows(out / "caches.csv", list(asdict(curves[0])), [list(asdict(point).values()) for point in curves])

    from synerdiff.figures.adapters import cache_figure, strategy_map, strategy_steps
    from synerdiff.figures.style import save

    written = [
        *save(strategy_map(ratios, study.service, study.requests, len(study.seeds)), out, "swift-where-it-pays"),
        *save(strategy_steps(cases), out, "swift-ablation"),
        *save(cache_figure([asdict(point) for point in curves]), out, "swift-caches"),
    ]
    typer.echo(f"{out}: {len(rows)} runs, 4 tables, {len(written)} figure files")
