"""``synerdiff estimate``: an estimated profile for a known GPU and model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.estimate import estimate_profiles
from synerdiff.core import NS_PER_S, InputError
from synerdiff.files import claim_folder, shown, whole_number
from synerdiff.profile.folder import write_profile
from synerdiff.profile.tables import MOST_DEGREE


def estimate(
    gpu: Annotated[str, typer.Option(help="h100, h100-pcie, h200, a100, l40s, rtx4090 ...; a wrong name lists all.")],
    model: Annotated[str, typer.Option(help="sd15 (512x512) or sdxl (1024x1024).")],
    out: Annotated[Path, typer.Option(help="Folder for the profile; created if needed.")],
    execution: Annotated[
        str, typer.Option(help="eager, compiled (torch.compile) or engine (TensorRT and the like).")
    ] = "compiled",
    precision: Annotated[str, typer.Option(help="Of the UNet: bf16, fp16, fp8 or int8.")] = "bf16",
    vae_precision: Annotated[int, typer.Option(help="Bits of the decoder: 16 or 32.")] = 16,
    resolution: Annotated[
        str,
        typer.Option(help="HEIGHTxWIDTH in pixels, several separated by commas; the model's own by default."),
    ] = "",
    contention: Annotated[
        str,
        typer.Option(
            help="How badly a step and a decode chunk disturb each other: low (gaps and tails are filled), mid, high "
            "(taking turns), or a number from 0 (low) over 1 (high) to 3."
        ),
    ] = "mid",
    decode_scale: Annotated[float, typer.Option(help="Factor on the time of the decode.")] = 1.0,
    degrees: Annotated[str, typer.Option(help="Also steps that several GPUs take together: 2,4,8.")] = "",
    link_gb_per_s: Annotated[float, typer.Option(help="Link between these (default: an H100's NVLink).")] = 450.0,
) -> None:
    """Estimate a profile from data sheets and the operations of a model; nothing is measured."""
    profile = estimate_profiles(
        resolution,
        gpu,
        model,
        contention,
        decode_scale,
        execution=execution,
        precision=precision,
        vae_bits=vae_precision,
        degrees=_degrees(degrees),
        link_gb_per_s=link_gb_per_s,
    )
    claim_folder(out, "estimate")
    write_profile(out, profile)
    step_ms = profile.step_ns(2) * 1000 / NS_PER_S
    decode_ms = profile.decode_ns() * 1000 / NS_PER_S
    band = profile.head.band
    assert band is not None  # every estimate has one
    typer.echo(
        f"{out}: {profile.name}, step of 2 rows {step_ms:.1f} ms, decode {decode_ms:.1f} ms (estimated, not measured: "
        f"times {band.low:g} to {band.high:g}; {band.card}; assumptions in profile.yaml)"
    )


def _degrees(text: str) -> list[int]:
    """``2,4,8``."""
    try:
        return [whole_number(part.strip(), 2, MOST_DEGREE) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"--degrees {shown(text)}: numbers from 2 to {MOST_DEGREE} are needed, as 2,4,8.") from None
