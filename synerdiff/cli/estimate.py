"""``synerdiff estimate``: an estimated profile for a known GPU and model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.estimate import estimate_profile
from synerdiff.core import NS_PER_S
from synerdiff.files import claim_folder
from synerdiff.profile.folder import write_profile


def estimate(
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or rtx4090.")],
    model: Annotated[str, typer.Option(help="sd15 (512x512) or sdxl (1024x1024).")],
    out: Annotated[Path, typer.Option(help="Folder for the profile; created if needed.")],
    contention: Annotated[
        str,
        typer.Option(
            help="How badly a step and a decode chunk disturb each other: mild, moderate, severe, or a number "
            "(0: perfect sharing, 1: taking turns, more: worse)."
        ),
    ] = "moderate",
    decode_scale: Annotated[float, typer.Option(help="Factor on the work of the decode.")] = 1.0,
) -> None:
    """Estimate a profile from data sheets, FLOPs and stated efficiencies; nothing is measured."""

    profile = estimate_profile(gpu, model, contention, decode_scale)
    claim_folder(out, "estimate")
    write_profile(out, profile)
    step_ms = profile.step_ns(2) * 1000 / NS_PER_S
    decode_ms = profile.decode_ns() * 1000 / NS_PER_S
    typer.echo(
        f"{out}: {profile.name}, step of 2 rows {step_ms:.1f} ms, decode {decode_ms:.1f} ms "
        "(estimated, not measured; assumptions in profile.yaml)"
    )
