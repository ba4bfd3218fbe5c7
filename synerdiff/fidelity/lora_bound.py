"""What the bound K of asynchronous LoRA loading costs in images: the LoRA is merged only after K steps.

At most K steps run without a LoRA under bound K, so K is the worst case. Images of the same seeds and prompts are
compared with those that have the LoRA from the first step, and with those that never have it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.core import InputError
from synerdiff.fidelity.sampling import Sampler, Subject
from synerdiff.fidelity.scores import THUMBNAILS, interval_of, psnr_db_of, ssim_of
from synerdiff.files import atomic

if TYPE_CHECKING:
    import torch

    from synerdiff.diffusion.lora import LoraFile
    from synerdiff.diffusion.model import DiffusionModel

BOUNDS = (0, 1, 2, 3, 5, 8, 12, 16, 20)
"""Steps without the LoRA that are tried, where the image has more; the last bound is always all steps: no LoRA."""

Gate = Callable[["torch.Tensor", Sequence[str]], Any]
"""Images in [0, 1] and their prompts -> which of them (bool, n) show what their prompt names."""


@dataclass(frozen=True, slots=True)
class BoundRow:
    """One bound of one LoRA; means over ``n`` images with 95% t intervals.

    ``effect``: how much of what the LoRA does to an image is left. With x_K, x_0 and x_none the images at this bound,
    at bound 0 and without the LoRA: <x_K - x_none, x_0 - x_none> / |x_0 - x_none|^2.
    ``recognised``: share of images that show their prompt, empty where nothing can tell.
    """

    lora: str
    scale: float
    solver: str
    steps: int
    guidance_scale: float
    bound_steps: int
    n: int
    ssim: float
    ssim_low: float
    ssim_high: float
    psnr_db: float
    psnr_db_low: float
    psnr_db_high: float
    effect: float
    effect_low: float
    effect_high: float
    recognised: float | None


@dataclass(frozen=True, slots=True)
class BoundResult:
    """``sheet``: bound -> the first images, uint8 (at most 10, height, width, channels)."""

    rows: list[BoundRow]
    sheet: dict[int, Any]


def bound_study(
    model: DiffusionModel,
    lora: LoraFile,
    subjects: Sequence[Subject],
    *,
    scale: float = 1.0,
    steps: int = 25,
    guidance_scale: float = 4.0,
    bounds: Sequence[int] = BOUNDS,
    batch: int = 32,
    gate: Gate | None = None,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> BoundResult:
    """Judge every bound up to ``steps`` on the same subjects. The model's weights are as before when it ends.

    Raises InputError for a LoRA that does not fit the model or does not change its images.
    """
    import torch

    from synerdiff.diffusion.merging import MergedWeights

    tried = [*sorted({0, *(bound for bound in bounds if bound < steps)}), steps]
    steps_run = steps + sum(steps - bound for bound in tried)
    total_rows, rows_done = 2 * steps_run * len(subjects), 0

    def on_rows(rows: int) -> None:
        nonlocal rows_done
        rows_done += rows
        on_progress(f"{lora.name} after at most {steps} steps", min(1.0, rows_done / total_rows))

    sampler, weights = Sampler(model, guidance_scale, batch, on_rows), MergedWeights(model.unet)
    weights.check(lora)
    made: dict[int, list[torch.Tensor]] = {bound: [] for bound in tried}
    for start in range(0, len(subjects), batch):
        # One run without the LoRA serves every bound up to its merge.
        states, waiting = sampler.start(steps, subjects[start : start + batch]), {}
        for step in range(steps):
            if step in made:
                waiting[step] = [replace(state, progress=deepcopy(state.progress)) for state in states]
            sampler.step(states)
        weights.merge(lora, scale)
        for own in waiting.values():
            while not own[0].done:
                sampler.step(own)
        weights.restore()
        for bound, own in {**waiting, steps: states}.items():
            made[bound].append(sampler.images(torch.cat([state.latent for state in own])).cpu())
    images = {bound: torch.cat(parts) for bound, parts in made.items()}
    with_lora, without = images[0], images[steps]
    change = (with_lora - without).flatten(1)
    size = change.square().sum(dim=1)
    if not bool((size > 0).all()):
        raise InputError(f"LoRA {lora.name} at scale {scale:g} does not change the images, so no bound can matter.")
    prompts = [subject.prompt for subject in subjects]
    rows = []
    for bound in tried:
        effect = ((images[bound] - without).flatten(1) * change).sum(dim=1) / size
        ssim, psnr_db, share = (
            interval_of(values.numpy())
            for values in (ssim_of(images[bound], with_lora), psnr_db_of(images[bound], with_lora), effect)
        )
        recognised = None if gate is None else round(float(gate(images[bound], prompts).mean()), 4)
        row = BoundRow(
            lora=lora.name,
            scale=scale,
            solver=model.solver.scheduler_name,
            steps=steps,
            guidance_scale=guidance_scale,
            bound_steps=bound,
            n=len(subjects),
            ssim=round(ssim.value, 4),
            ssim_low=round(ssim.low, 4),
            ssim_high=round(ssim.high, 4),
            psnr_db=round(psnr_db.value, 2),
            psnr_db_low=round(psnr_db.low, 2),
            psnr_db_high=round(psnr_db.high, 2),
            effect=round(share.value, 4),
            effect_low=round(share.low, 4),
            effect_high=round(share.high, 4),
            recognised=recognised,
        )
        rows.append(row)
    return BoundResult(rows, {bound: thumbnails(images[bound]) for bound in tried})


def thumbnails(images: torch.Tensor) -> Any:
    """The first images of (n, channels, height, width) in [0, 1] as uint8 (at most 10, height, width, channels)."""
    import torch

    return (images[:THUMBNAILS] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def write_bounds(path: Path, rows: Sequence[BoundRow]) -> None:
    """One line per bound and LoRA, columns as in ``BoundRow``."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(BoundRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def lines(rows: Sequence[BoundRow]) -> list[str]:
    """The table as text."""
    found = [f"{'LoRA':12} {'K':>3} {'SSIM':>18} {'PSNR dB':>8} {'effect':>18} {'recognised':>10}"]
    for row in rows:
        recognised = "-" if row.recognised is None else f"{row.recognised:.1%}"
        found.append(
            f"{row.lora:12} {row.bound_steps:3} {row.ssim:6.3f} ({row.ssim_low:.3f}-{row.ssim_high:.3f}) "
            f"{row.psnr_db:7.1f} {row.effect:7.2f} ({row.effect_low:.2f}-{row.effect_high:.2f}) {recognised:>10}"
        )
    return found
