"""``synerdiff fidelity``: what levers cost in images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from profiler.settings import make_settings
from synerdiff.cli.progress import progress
from synerdiff.core import InputError
from synerdiff.fidelity.rules import ALL_PARTS, CORE_PARTS
from synerdiff.files import claim_folder, finite, read_text

_LEVERS = ("skips", "lora-bound", "controlnet")


def fidelity(
    model: Annotated[
        str, typer.Option(help="digits, a checkpoint folder or a hub name; sd15, sdxl, ... with --random-weights.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures; finished parts are reused.")],
    levers: Annotated[
        str, typer.Option(help="What to judge: skips, lora-bound, controlnet; several separated by commas.")
    ] = "skips",
    steps: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps per image; may be repeated (default: for skips the fewest whose SSIM against 4 times as many "
            "is at least 0.99, for the others 25)."
        ),
    ] = None,
    guidance_scale: Annotated[
        list[float] | None, typer.Option(help="Guidance scale; may be repeated (default: 7.5).")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++2m or a diffusers class (default: the model's own).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Images per rule or bound.")] = 256,
    batch: Annotated[int, typer.Option(help="Images computed at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones follow.")] = 1000,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line, used in turn (default: the model's own).")
    ] = None,
    rules: Annotated[str, typer.Option(help="Of skips: all, or core: the few that settle the ranking.")] = "all",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU).")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Pixels: one side or HEIGHTxWIDTH (default: the model's own).")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Profile of the model: also simulate what skips and fewer steps buy there in latency."),
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(help="Folder of LoRAs, safetensors only (default: those that ship with digits).")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA file inside --loras, without its ending; may be repeated (default: all of them)."),
    ] = None,
    lora_scale: Annotated[float, typer.Option(help="Scale at which LoRAs are merged.")] = 1.0,
    bound: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps without the LoRA; may be repeated (default: 0 1 2 3 5 8 12 16 20). All steps: always."
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Allow a built-in architecture, whose images mean nothing.")
    ] = False,
) -> None:
    """Judge levers by images of the same seeds: skipped guidance, beside fewer steps at equal cost; a LoRA that is
    merged late; an outline that steers.

    An interrupted study of skips goes on where it stopped when the same command is given again; other settings of the
    same model are added to the table.
    """
    chosen = make_settings(model, device, dtype, resolution)
    if chosen.others:
        raise InputError(f"--resolution {resolution}: images are judged at one resolution.")
    picked = _levers(levers)
    _check(steps, guidance_scale, samples, batch, seed, rules, lora_scale, bound, 5 if "skips" in picked else 1)
    texts = _prompts(prompts)
    claim_folder(out, "fidelity")

    from synerdiff.experiments import levers as studies

    wanted = studies.LeverStudy(
        model=model,
        levers=picked,
        steps=tuple(dict.fromkeys(steps or ())),
        guidance_scales=tuple(dict.fromkeys(guidance_scale or (7.5,))),
        samples=samples,
        batch=batch,
        first_seed=seed,
        prompts=texts,
        rules=rules,
        device=device,
        dtype=chosen.dtype,
        resolution=chosen.resolution,
        scheduler=scheduler,
        profile=profile,
        random_weights=random_weights,
        loras=loras,
        lora_names=tuple(lora or ()),
        lora_scale=lora_scale,
        bounds=tuple(bound or ()),
    )
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


def _check(
    steps: Sequence[int] | None,
    guidance_scales: Sequence[float] | None,
    samples: int,
    batch: int,
    seed: int,
    rules: str,
    lora_scale: float,
    bounds: Sequence[int] | None,
    fewest_steps: int,
) -> None:
    for name, value, low, high in (
        *(("--steps", count, fewest_steps, 1000) for count in steps or ()),
        ("--samples", samples, 4, 1_000_000),
        ("--batch", batch, 1, 4096),
        ("--seed", seed, 0, 2**62),
        *(("--bound", count, 0, 1000) for count in bounds or ()),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; {low} to {high} is allowed.")
    for scale in guidance_scales or ():
        if not finite(scale, lambda x: 1 < x <= 100):
            raise InputError(
                f"--guidance-scale is {scale:g}; above 1 (below that nothing is guided) and up to 100 is allowed."
            )
    if not finite(lora_scale, lambda x: abs(x) <= 100):
        raise InputError(f"--lora-scale is {lora_scale:g}; numbers from -100 to 100 are allowed.")
    if rules not in (ALL_PARTS, CORE_PARTS):
        raise InputError(f"--rules is '{rules}'; allowed are {ALL_PARTS} and {CORE_PARTS}.")


def _prompts(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    texts = tuple(line.strip() for line in read_text(path, "file of prompts").splitlines() if line.strip())
    if len(texts) < 2:
        raise InputError(f"{path}: at least 2 prompts are needed, one a line; found {len(texts)}.")
    return texts
