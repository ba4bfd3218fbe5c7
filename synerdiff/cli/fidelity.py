"""``synerdiff fidelity``: what skipping guidance costs in images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synerdiff.cli.progress import image_progress

if TYPE_CHECKING:
    from synerdiff.fidelity.study import Settings, Study, StudyResult
    from synerdiff.profile.tables import Profile

_PARTS = ("all", "core")


def fidelity(
    model: Annotated[
        str, typer.Option(help="digits, sd15, sdxl, tiny-sd, tiny-sdxl, a checkpoint folder or a hub name.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the table and the pictures; finished parts are reused.")],
    steps: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps to judge skipping at; may be repeated (default: the fewest whose SSIM against 4 times as many "
            "is at least 0.99)."
        ),
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(help="Guidance scale; may be repeated (default: 7.5).")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++2m or a diffusers class (default: the model's own).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Images per rule.")] = 256,
    batch: Annotated[int, typer.Option(help="Images computed at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones follow.")] = 1000,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line, used in turn (default: the model's own).")
    ] = None,
    rules: Annotated[str, typer.Option(help="all, or core: the few that settle the ranking.")] = "all",
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
    frechet: Annotated[
        Path | None, typer.Option(help="Weights file of the Inception network: also the Frechet distance (FID).")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model: also the CLIP score.")] = None,
) -> None:
    """Compare images with skipped guidance to the same images with full guidance, and to fewer steps at equal cost.

    An interrupted study goes on where it stopped when the same command is given again; other settings of the same
    model are added to the table.
    """
    from profiler.settings import make_settings
    from synerdiff.core import InputError
    from synerdiff.files import claim_folder
    from synerdiff.profile.folder import find_profile, load_profile

    chosen = make_settings(model, device, dtype, resolution)
    settings = _settings(steps, guidance, samples, batch, seed, prompts, rules)
    if (frechet or clip) and (missing := next((path for path in (frechet, clip) if path and not path.exists()), None)):
        raise InputError(f"{missing}: there are no such weights; without them leave the option out.")
    simulated = None if profile is None else load_profile(find_profile(profile))
    claim_folder(out, "fidelity")

    import torch

    from synerdiff.diffusion.checkpoint import load_model
    from synerdiff.fidelity.report import draw, lines
    from synerdiff.fidelity.study import Study

    wanted = None if chosen.dtype is None else getattr(torch, chosen.dtype)
    loaded = load_model(model, device, wanted, chosen.resolution, scheduler)
    if simulated is not None:
        _require_profile_of(simulated, model, loaded.height, loaded.width)
    own = loaded if scheduler is None else load_model(model, device, wanted, chosen.resolution)
    head = _head(model, own.solver.scheduler_name, device)
    with image_progress() as on_progress:
        study = Study(loaded, settings, out, on_progress)
        result = study.run(head)
        extra = _extras(study, result, frechet, clip)
        bought = [] if simulated is None else _trade_offs(result, simulated, out, on_progress)
    for line in [*lines(result), *extra]:
        typer.echo(line)
    for path in [*draw(result, out), *bought]:
        typer.echo(f"{path}")


def _require_profile_of(profile: Profile, model: str, height: int, width: int) -> None:
    """InputError for a profile of another model or resolution: what this study finds says nothing about its images."""
    from synerdiff.core import InputError

    own, sides = str(profile.info.get("model")), profile.info.get("resolution")
    if own != model:
        raise InputError(f"--profile: '{profile.name}' is of model '{own}'; the study is of '{model}'.")
    if sides not in ([height, width], height if height == width else None):
        raise InputError(f"--profile: '{profile.name}' is for {sides} pixels; the study is of {height}x{width}.")


def _settings(
    steps: Sequence[int] | None,
    guidance: Sequence[float] | None,
    samples: int,
    batch: int,
    seed: int,
    prompts: Path | None,
    rules: str,
) -> Settings:
    from synerdiff.core import InputError
    from synerdiff.fidelity.study import Settings
    from synerdiff.files import finite, read_text

    for name, value, low, high in (
        *(("--steps", count, 5, 1000) for count in steps or ()),
        ("--samples", samples, 4, 1_000_000),
        ("--batch", batch, 1, 4096),
        ("--seed", seed, 0, 2**62),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; {low} to {high} is allowed.")
    for scale in guidance or ():
        if not finite(scale, lambda x: 1 < x <= 100):
            raise InputError(
                f"--guidance is {scale:g}; above 1 (below that nothing is guided) and up to 100 is allowed."
            )
    if rules not in _PARTS:
        raise InputError(f"--rules is '{rules}'; allowed are {' and '.join(_PARTS)}.")
    texts: list[str] = []
    if prompts is not None:
        texts = [line.strip() for line in read_text(prompts, "file of prompts").splitlines() if line.strip()]
        if len(texts) < 2:
            raise InputError(f"{prompts}: at least 2 prompts are needed, one a line; found {len(texts)}.")
    return Settings(
        steps=tuple(dict.fromkeys(steps or ())),
        guidance_scales=tuple(dict.fromkeys(guidance or (7.5,))),
        samples=samples,
        search_samples=min(samples, 64),
        calibration_samples=min(samples, 64),
        batch=batch,
        first_seed=seed,
        prompts=tuple(texts),
        part=rules,
    )


def _head(model: str, solver: str, device: str) -> dict[str, Any]:
    """Which model, on what and when; the study adds weights, resolution and measure."""
    import datetime
    from importlib.metadata import version

    from synerdiff import __version__

    libraries = ("torch", "diffusers", "torchmetrics")
    return {
        "model": model,
        "solver": solver,
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"synerdiff": __version__, **{name: version(name) for name in libraries}},
    }


def _extras(study: Study, result: StudyResult, frechet: Path | None, clip: Path | None) -> list[str]:
    if frechet is None and clip is None:
        return []
    from synerdiff.fidelity.extras import extra_scores

    return extra_scores(study, result, frechet, clip)


def _trade_offs(
    result: StudyResult, profile: Profile, out: Path, on_progress: Callable[[str, float], None]
) -> list[Path]:
    """Per setting a table and a picture of simulated latency against fidelity; the paths of the pictures."""
    from dataclasses import replace

    from synerdiff.experiments.fidelity_tradeoff import trade_off
    from synerdiff.figures.fidelity import latency_against_fidelity
    from synerdiff.figures.style import save
    from synerdiff.files import atomic

    written = []
    for setting in result.settings:
        table = replace(result.table, head={**result.table.head, "solver": setting.solver})
        frame = trade_off(profile, table, setting.steps, setting.guidance_scale, on_progress=on_progress)
        name = f"fidelity-latency-{setting.short}"
        with atomic(out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
        caption = (
            f"{setting.label} on {profile.label}. Poisson arrivals, means over 3 seeds of 600 requests; load 1: full "
            "guidance in all steps with serial decodes. All variants run load-skip's placement at its default batch."
        )
        written += save(latency_against_fidelity(frame, caption=caption), out, name)
    return written
