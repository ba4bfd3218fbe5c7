"""``synerdiff adapter-fidelity``: what the bound of asynchronous LoRA loading costs in images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synerdiff.cli.progress import image_progress

if TYPE_CHECKING:
    from synerdiff.diffusion.lora import LoraFile
    from synerdiff.diffusion.model import DiffusionModel
    from synerdiff.fidelity.lora_bound import Gate


def adapter_fidelity(
    out: Annotated[Path, typer.Option(help="Folder for the table and the pictures.")],
    model: Annotated[
        str, typer.Option(help="digits, sd15, sdxl, tiny-sd, tiny-sdxl, a checkpoint folder or a hub name.")
    ] = "digits",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA file inside --loras, without its ending; may be repeated (default: all of them)."),
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(help="Folder of LoRAs, safetensors only (default: those that ship with digits).")
    ] = None,
    scale: Annotated[float, typer.Option(help="Scale at which LoRAs are merged.")] = 1.0,
    bound: Annotated[
        list[int] | None,
        typer.Option(
            help="Steps without the LoRA; may be repeated (default: 0 1 2 3 5 8 12 16 20). All steps: always."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps per image.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 4.0,
    samples: Annotated[int, typer.Option(help="Images per bound.")] = 64,
    batch: Annotated[int, typer.Option(help="Images computed at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones follow.")] = 1000,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU).")
    ] = None,
) -> None:
    """Images whose LoRA is merged only after K steps beside those that have it from the start, on the same seeds.

    For digits also what the shipped ControlNet does: images with and without an outline.
    """
    from dataclasses import asdict

    from profiler.settings import make_settings
    from synerdiff.core import InputError
    from synerdiff.files import claim_folder, finite

    for name, value, low, high in (
        *(("--bound", count, 0, 1000) for count in bound or ()),
        ("--steps", steps, 1, 1000),
        ("--samples", samples, 2, 1_000_000),
        ("--batch", batch, 1, 4096),
        ("--seed", seed, 0, 2**62),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; {low} to {high} is allowed.")
    for name, number, most in (("--scale", scale, 100), ("--guidance", guidance, 100)):
        if not finite(number, lambda x, most=most: abs(x) <= most):  # type: ignore[misc]
            raise InputError(f"{name} is {number:g}; numbers from -{most} to {most} are allowed.")
    chosen = make_settings(model, device, dtype, None)
    if loras is None and model != "digits":
        raise InputError(f"no LoRAs ship for {model}; name their folder with --loras.")
    claim_folder(out, "adapter-fidelity")

    import torch

    from synerdiff.diffusion import SHIPPED_LORAS
    from synerdiff.diffusion.checkpoint import load_model
    from synerdiff.fidelity.lora_bound import BOUNDS, bound_study, lines, write_bounds
    from synerdiff.fidelity.sampling import Subject
    from synerdiff.figures.adapters import bound_curves
    from synerdiff.figures.fidelity import contact_sheet
    from synerdiff.figures.style import save

    files = _files(SHIPPED_LORAS if loras is None else loras, lora)
    wanted = None if chosen.dtype is None else getattr(torch, chosen.dtype)
    loaded = load_model(model, device, wanted)
    gate = _gate(loaded)
    subjects = [Subject(seed + i, loaded.prompts.default_prompt(seed + i)) for i in range(samples)]
    what = (
        f"{loaded.name}, {loaded.solver.scheduler_name.removesuffix('Scheduler')}, {steps} steps, guidance {guidance:g}"
    )
    caption, rows, pictures = f"{what}, {samples} images, LoRA at scale {scale:g}.", [], []
    with image_progress() as on_progress:
        for file in files:
            result = bound_study(
                loaded,
                file,
                subjects,
                scale=scale,
                steps=steps,
                guidance_scale=guidance,
                bounds=bound or BOUNDS,
                batch=batch,
                gate=gate,
                on_progress=on_progress,
            )
            rows += result.rows
            sheet = [(_label(count, steps), images) for count, images in result.sheet.items()]
            title = f"LoRA {file.name}, merged after K steps"
            pictures += save(contact_sheet(sheet, title=title, caption=caption), out, f"lora-bound-sheet-{file.name}")
        outlines = _outlines(loaded, gate, steps, guidance, batch, out, on_progress)
    write_bounds(out / "lora-bound.csv", rows)
    by_lora = {file.name: [asdict(row) for row in rows if row.lora == file.name] for file in files}
    pictures += save(bound_curves(by_lora, caption=caption), out, "lora-bound")
    for line in [*lines(rows), *outlines]:
        typer.echo(line)
    typer.echo(f"{out}: lora-bound.csv and {len(pictures)} figure files")


def _label(bound_steps: int, steps: int) -> str:
    return "without LoRA" if bound_steps == steps else f"K = {bound_steps}"


def _files(folder: Path, names: Sequence[str] | None) -> list[LoraFile]:
    from synerdiff.core import InputError
    from synerdiff.diffusion.lora import read_lora

    found = names or sorted(path.stem for path in folder.glob("*.safetensors"))
    if not found:
        raise InputError(f"{folder}: this folder holds no LoRAs (.safetensors files).")
    return [read_lora(f"{name.removesuffix('.safetensors')}.safetensors", folder) for name in dict.fromkeys(found)]


def _gate(model: DiffusionModel) -> Gate | None:
    """Whether digits show their class, in whatever style; None for other models."""
    if model.name != "digits":
        return None
    import torch

    from synerdiff.diffusion.digits import STYLES_WEIGHTS, load_classifier

    classifier = load_classifier(STYLES_WEIGHTS)

    @torch.inference_mode()
    def recognised(images: torch.Tensor, prompts: Sequence[str]) -> Any:
        found = classifier(images * 2 - 1).argmax(dim=1)
        return (found == torch.tensor([int(prompt) for prompt in prompts])).numpy()

    return recognised


def _outlines(
    model: DiffusionModel,
    gate: Gate | None,
    steps: int,
    guidance_scale: float,
    batch: int,
    out: Path,
    on_progress: Callable[[str, float], None],
) -> list[str]:
    """The picture and the numbers of the shipped ControlNet; nothing for models that it does not belong to."""
    if gate is None:
        return []
    from synerdiff.diffusion.controlnet import load_controlnet
    from synerdiff.fidelity.outline import outline_study
    from synerdiff.figures.fidelity import contact_sheet
    from synerdiff.figures.style import save

    result = outline_study(
        model,
        load_controlnet("outline", model),
        gate,
        steps=steps,
        guidance_scale=guidance_scale,
        batch=batch,
        on_progress=on_progress,
    )
    caption = "The same column has the same seed and class. Outlines: held-out digits, moved, turned and scaled."
    save(contact_sheet(result.sheet, title="ControlNet outline", caption=caption), out, "controlnet-outline")
    return [
        f"ControlNet outline at {scale:g}: overlap {found.value:.3f} ({found.low:.3f}-{found.high:.3f}), "
        f"recognised {result.recognised[scale]:.1%} (of their sources {result.recognised_sources:.1%}), n = {found.n}"
        for scale, found in result.overlap.items()
    ]
