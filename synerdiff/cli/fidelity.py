"""``synerdiff fidelity``: what levers cost in images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from profiler.settings import make_settings
from synerdiff.cli.options import taking
from synerdiff.cli.progress import progress
from synerdiff.core import InputError
from synerdiff.fidelity.rules import ALL_PARTS, CORE_PARTS
from synerdiff.files import claim_folder, finite, read_text

_LEVERS = ("skips", "lora-bound", "controlnet")


@dataclass(frozen=True, kw_only=True)
class FidelityOptions:
    """Options that are fields of a ``LeverStudy``."""

    model: Annotated[
        str, typer.Option(help="digits, a checkpoint folder or a hub name; sd15, sdxl, ... with --random-weights.")
    ]
    levers: Annotated[
        str, typer.Option(help="What to judge: skips, lora-bound, controlnet; several separated by commas.")
    ] = "skips"
    steps: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps per image; may be repeated (default: for skips the fewest whose SSIM against 4 times as many "
            "is at least 0.99, for the others 25)."
        ),
    ] = None
    guidance_scales: Annotated[
        list[float] | None, typer.Option("--guidance-scale", help="Guidance scale; may be repeated (default: 7.5).")
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++2m or a diffusers class (default: the model's own).")
    ] = None
    samples: Annotated[int, typer.Option(help="Images per rule or bound.")] = 256
    batch: Annotated[int, typer.Option(help="Images computed at a time.")] = 32
    first_seed: Annotated[int, typer.Option("--seed", help="Seed of the first image; the next ones follow.")] = 1000
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line, used in turn (default: the model's own).")
    ] = None
    rules: Annotated[str, typer.Option(help="Of skips: all, or core: the few that settle the ranking.")] = "all"
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu"
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU).")
    ] = None
    resolution: Annotated[
        str | None, typer.Option(help="Pixels: one side or HEIGHTxWIDTH (default: the model's own).")
    ] = None
    profile: Annotated[
        str | None,
        typer.Option(help="Profile of the model: also simulate what skips and fewer steps buy there in latency."),
    ] = None
    loras: Annotated[
        Path | None, typer.Option(help="Folder of LoRAs, safetensors only (default: those that ship with digits).")
    ] = None
    lora_names: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", help="LoRA file inside --loras, without its ending; may be repeated (default: all of them)."
        ),
    ] = None
    lora_scale: Annotated[float, typer.Option(help="Scale at which LoRAs are merged.")] = 1.0
    bounds: Annotated[
        list[int] | None,
        typer.Option(
            "--bound",
            help="Steps without the LoRA; may be repeated (default: 0 1 2 3 5 8 12 16 20). All steps: always.",
        ),
    ] = None
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Allow a built-in architecture, whose images mean nothing.")
    ] = False


@taking(FidelityOptions)
def fidelity(
    given: FidelityOptions,
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures; finished parts are reused.")],
) -> None:
    """Judge levers by images of the same seeds: skipped guidance, beside fewer steps at equal cost; a LoRA that is
    merged late; an outline that steers.

    An interrupted study of skips goes on where it stopped when the same command is given again; other settings of the
    same model are added to the table.
    """
    chosen = make_settings(given.model, given.device, given.dtype, given.resolution)
    if chosen.others:
        raise InputError(f"--resolution {given.resolution}: images are judged at one resolution.")
    picked = _levers(given.levers)
    _check(given, 5 if "skips" in picked else 1)
    texts = _prompts(given.prompts)
    claim_folder(out, "fidelity")

    from synerdiff.experiments import levers as studies

    own = {
        "levers": picked,
        "steps": tuple(dict.fromkeys(given.steps or ())),
        "guidance_scales": tuple(dict.fromkeys(given.guidance_scales or (7.5,))),
        "prompts": texts,
        "dtype": chosen.dtype,
        "resolution": chosen.resolution,
        "lora_names": tuple(given.lora_names or ()),
        "bounds": tuple(given.bounds or ()),
    }
    wanted = studies.LeverStudy(**{**vars(given), **own})
    with progress("loading", 1.0) as update:
        lines = studies.study_levers(wanted, out, lambda what, share: update(share, 1.0, what))
    for line in lines:
        typer.echo(line)


def _levers(text: str) -> tuple[str, ...]:
    picked = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in picked if name not in _LEVERS]
    if unknown:
        raise InputError(f"--levers names '{unknown[0]}'; allowed are {', '.join(_LEVERS)}, separated by commas.")
    return picked


def _check(given: FidelityOptions, fewest_steps: int) -> None:
    for name, value, low, high in (
        *(("--steps", count, fewest_steps, 1000) for count in given.steps or ()),
        ("--samples", given.samples, 4, 1_000_000),
        ("--batch", given.batch, 1, 4096),
        ("--seed", given.first_seed, 0, 2**62),
        *(("--bound", count, 0, 1000) for count in given.bounds or ()),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; {low} to {high} is allowed.")
    for scale in given.guidance_scales or ():
        if not finite(scale, lambda x: 1 < x <= 100):
            raise InputError(
                f"--guidance-scale is {scale:g}; above 1 (below that nothing is guided) and up to 100 is allowed."
            )
    if not finite(given.lora_scale, lambda x: abs(x) <= 100):
        raise InputError(f"--lora-scale is {given.lora_scale:g}; numbers from -100 to 100 are allowed.")
    if given.rules not in (ALL_PARTS, CORE_PARTS):
        raise InputError(f"--rules is '{given.rules}'; allowed are {ALL_PARTS} and {CORE_PARTS}.")


def _prompts(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    texts = tuple(line.strip() for line in read_text(path, "file of prompts").splitlines() if line.strip())
    if len(texts) < 2:
        raise InputError(f"{path}: at least 2 prompts are needed, one a line; found {len(texts)}.")
    return texts
