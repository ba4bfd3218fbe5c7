"""What adapters do to images: a LoRA that is merged only after K steps, and an outline that steers a ControlNet.

At most K steps run without a LoRA under bound K of SwiftDiffusion's asynchronous loading, so K is the worst case.
Images of the same seeds and prompts are compared with those that have the LoRA from the first step, and with those
that never have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.diffusion.denoisers.controlnet import ControlNet, ControlUse
from synerdiff.diffusion.digits import digits_split, displaced, outline
from synerdiff.diffusion.lora import LoraFile
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.fidelity.sampling import (
    Gate,
    OnProgress,
    RowProgress,
    Sampler,
    Subject,
    interval_of,
    psnr_db_of,
    ssim_of,
    thumbnails,
)
from synerdiff.files import write_rows
from synerdiff.results.intervals import Interval

BOUNDS = (0, 1, 2, 3, 5, 8, 12, 16, 20)
"""Steps without the LoRA that are tried, where the image has more; the last bound is always all steps: no LoRA."""
SOURCES_SEED = 377
SCALES = (0.0, 1.0)
"""Of the ControlNet; scale 0 is the same without it."""


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
    on_progress: OnProgress = lambda what, share: None,
) -> BoundResult:
    """Judge every bound up to ``steps`` on the same subjects. The model's weights are as before when it ends.

    Raises InputError for a LoRA that does not fit the model or does not change its images.
    """
    tried = [*sorted({0, *(bound for bound in bounds if bound < steps)}), steps]
    progress = RowProgress(on_progress)
    progress.begin(
        f"{lora.name} after at most {steps} steps",
        2 * (steps + sum(steps - bound for bound in tried)) * len(subjects),
    )
    sampler, weights = Sampler(model, guidance_scale, batch, progress), MergedWeights(model.unet)
    weights.check(lora)
    made: dict[int, list[torch.Tensor]] = {bound: [] for bound in tried}
    for states in sampler.batches(steps, subjects):
        waiting = {}  # one run without the LoRA serves every bound up to its merge
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
    change = (images[0] - images[steps]).flatten(1)
    size = change.square().sum(dim=1)
    if not bool((size > 0).all()):
        raise InputError(f"LoRA {lora.name} at scale {scale:g} does not change the images, so no bound can matter.")
    prompts = [subject.prompt for subject in subjects]
    rows = []
    for bound in tried:
        effect = ((images[bound] - images[steps]).flatten(1) * change).sum(dim=1) / size
        numbers: dict[str, Any] = {
            **_rounded("ssim", ssim_of(images[bound], images[0]), 4),
            **_rounded("psnr_db", psnr_db_of(images[bound], images[0]), 2),
            **_rounded("effect", effect, 4),
        }
        recognised = None if gate is None else round(float(gate(images[bound], prompts).mean()), 4)
        setting = (lora.name, scale, model.solver.scheduler_name, steps, guidance_scale, bound, len(subjects))
        rows.append(BoundRow(*setting, **numbers, recognised=recognised))
    return BoundResult(rows, {bound: thumbnails(images[bound]) for bound in tried})


def _rounded(name: str, values: torch.Tensor, digits: int) -> dict[str, float]:
    mean = interval_of(values.numpy())
    ends = {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return {end: round(value, digits) for end, value in ends.items()}


def write_bounds(path: Path, rows: Sequence[BoundRow]) -> None:
    """One line per bound and LoRA, columns as in ``BoundRow``."""
    write_rows(path, [field.name for field in fields(BoundRow)], (astuple(row) for row in rows))


def bound_lines(rows: Sequence[BoundRow]) -> list[str]:
    """The table as text."""
    lines = [f"{'LoRA':12} {'K':>3} {'SSIM':>18} {'PSNR dB':>8} {'effect':>18} {'recognised':>10}"]
    for row in rows:
        recognised = "-" if row.recognised is None else f"{row.recognised:.1%}"
        lines.append(
            f"{row.lora:12} {row.bound_steps:3} {row.ssim:6.3f} ({row.ssim_low:.3f}-{row.ssim_high:.3f}) "
            f"{row.psnr_db:7.1f} {row.effect:7.2f} ({row.effect_low:.2f}-{row.effect_high:.2f}) {recognised:>10}"
        )
    return lines


@dataclass(frozen=True, slots=True)
class OutlineResult:
    """``overlap``: by conditioning scale, mean intersection over union of bright pixels with the outline's source.

    ``recognised``: by conditioning scale, the share of images that show their class; ``recognised_sources``: the share
    of the displaced digits themselves. ``sheet``: label -> uint8 images.
    """

    overlap: dict[float, Interval]
    recognised: dict[float, float]
    recognised_sources: float
    sheet: list[tuple[str, Any]]

    def lines(self) -> list[str]:
        """The numbers as text, a line per scale."""
        return [
            f"ControlNet outline at {scale:g}: overlap {mean.value:.3f} ({mean.low:.3f}-{mean.high:.3f}), recognised "
            f"{self.recognised[scale]:.1%} (of their sources {self.recognised_sources:.1%}), n = {mean.n}"
            for scale, mean in self.overlap.items()
        ]


def outline_study(
    model: DiffusionModel,
    controlnet: ControlNet,
    gate: Gate,
    *,
    samples: int = 64,
    steps: int = 25,
    guidance_scale: float = 4.0,
    batch: int = 32,
    first_seed: int = 1000,
    on_progress: OnProgress = lambda what, share: None,
) -> OutlineResult:
    """``digits`` with and without its ControlNet, by outlines of held-out digits that were moved, turned and scaled far
    more than the model ever saw; beside what the outlines came from."""
    held_out = digits_split().held_out
    # Spread over the held-out images; their classes come in turn only roughly, so prompts follow the labels.
    chosen = torch.linspace(0, len(held_out.labels) - 1, min(samples, len(held_out.labels))).long()
    sources = displaced(held_out.images[chosen], torch.Generator().manual_seed(SOURCES_SEED))
    outlines = outline(sources).to(model.device, model.dtype)
    prompts = [str(int(label)) for label in held_out.labels[chosen]]
    subjects = [Subject(first_seed + i, prompt) for i, prompt in enumerate(prompts)]
    progress = RowProgress(on_progress)
    progress.begin("outlines", 2 * steps * len(subjects) * len(SCALES))
    sampler, before = Sampler(model, guidance_scale, batch, progress), model.controlnets
    model.controlnets = {controlnet.name: controlnet}
    images: dict[float, torch.Tensor] = {}
    try:
        for scale in SCALES:
            made = []
            for states in sampler.batches(steps, subjects):
                for state in states if scale else ():
                    i = state.seed - first_seed
                    state.controls = (ControlUse(controlnet.name, outlines[i : i + 1], scale),)
                while not states[0].done:
                    sampler.step(states)
                made.append(sampler.images(torch.cat([state.latent for state in states])).cpu())
            images[scale] = torch.cat(made)
    finally:
        model.controlnets = before
    truth = sources / 2 + 0.5
    sheet = [("outline given", thumbnails(outlines.float())), ("where it came from", thumbnails(truth))]
    sheet += [
        (f"ControlNet at {scale:g}" if scale else "without ControlNet", thumbnails(own))
        for scale, own in images.items()
    ]
    return OutlineResult(
        {scale: interval_of(overlap_of(own, truth).numpy()) for scale, own in images.items()},
        {scale: float(gate(own, prompts).mean()) for scale, own in images.items()},
        float(gate(truth, prompts).mean()),
        sheet,
    )


def overlap_of(images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Intersection over union (n,) of the pixels above one half, of images (n, 1, height, width) in [0, 1]."""
    ours, theirs = images.flatten(1) > 0.5, sources.flatten(1) > 0.5
    union = (ours | theirs).sum(dim=1).clamp(min=1)
    return (ours & theirs).sum(dim=1) / union
