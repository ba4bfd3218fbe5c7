"""``synerdiff katz``: Katz's and diffusers' published latencies beside what component times alone predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def katz(
    data: Annotated[
        Path | None,
        typer.Option(envvar="SYNERDIFF_DATA", help="Folder of katz_h800_sdxl.csv, the published latencies."),
    ] = None,
    controlnets: Annotated[int, typer.Option(min=0, max=64, help="ControlNets of the request in the ablation.")] = 3,
    loras: Annotated[int, typer.Option(min=0, max=64, help="LoRAs of the request in the ablation.")] = 2,
    profiles: Annotated[
        Path | None, typer.Option(help="Also write both estimated H800 profiles into this folder.")
    ] = None,
) -> None:
    """Predict Katz's and diffusers' latencies on H800, compare with the published ones, take the strategies apart."""
    from synerdiff.experiments.h800 import SYSTEMS, h800_adapters, h800_profile
    from synerdiff.experiments.layouts import ablation
    from synerdiff.files import claim_folder
    from synerdiff.profile.adapters import write_adapters
    from synerdiff.profile.folder import write_profile
    from synerdiff.validation.katz import compare

    folders = {} if profiles is None else {name: profiles / f"h800-sdxl-{name}-estimated" for name in SYSTEMS}
    for folder in folders.values():
        claim_folder(folder, "katz")
    if data is None:
        typer.echo("No published latencies (--data or SYNERDIFF_DATA): predictions only.")
    else:
        typer.echo("One request, 50 guided steps, SDXL 1024x1024 on H800; C ControlNets, L LoRAs; seconds, medians.")
        typer.echo("Predicted from component times alone (estimated, not measured by this project).")
        typer.echo(f"{'system':10} {'C':>2} {'L':>2} {'GPUs':>5} {'published':>10} {'predicted':>10} {'error':>7}")
        worst = 0.0
        for row in compare(data):
            worst = max(worst, abs(row.error))
            typer.echo(
                f"{row.system:10} {row.n_controlnets:2} {row.n_loras:2} {row.gpus:5} {row.published_s:10.3f} "
                f"{row.predicted_s:10.3f} {row.error:+7.1%}"
            )
        typer.echo(f"largest error {worst:.1%}")
    typer.echo("")
    typer.echo(f"One request with {controlnets} ControlNets and {loras} LoRAs alone, strategy by strategy:")
    typer.echo(f"{'':34} {'GPUs':>5} {'latency s':>10} {'speed-up':>9} {'GPU-s':>7} {'of GPU-s':>9}")
    cases = ablation(controlnets, loras)
    for case in cases:
        typer.echo(
            f"{case.name:34} {case.gpus:5} {case.latency_s:10.3f} {cases[0].latency_s / case.latency_s:8.2f}x "
            f"{case.gpu_seconds:7.2f} {case.gpu_seconds / cases[0].gpu_seconds:8.2f}x"
        )
    for system, folder in folders.items():
        write_profile(folder, h800_profile(system))
        write_adapters(folder, h800_adapters(system))
        typer.echo(f"{folder}: written")
