"""What the outline ControlNet does to ``digits``: images with and without it beside what the outlines came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from synerdiff.fidelity.lora_bound import Gate, thumbnails
from synerdiff.fidelity.scores import interval_of

if TYPE_CHECKING:
    import torch

    from synerdiff.diffusion.denoisers.controlnet import ControlNet
    from synerdiff.diffusion.model import DiffusionModel
    from synerdiff.results.intervals import Interval

SOURCES_SEED = 377
SCALES = (0.0, 1.0)


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
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> OutlineResult:
    """Held-out digits, moved, turned and scaled far more than the model ever saw; scale 0 is the same without it."""
    import torch

    from synerdiff.diffusion.denoisers.controlnet import ControlUse
    from synerdiff.diffusion.digits import digits_split, displaced, outline

    held_out = digits_split().held_out
    # Spread over the held-out images; their classes come in turn only roughly, so prompts follow the labels.
    chosen = torch.linspace(0, len(held_out.labels) - 1, min(samples, len(held_out.labels))).long()
    sources = displaced(held_out.images[chosen], torch.Generator().manual_seed(SOURCES_SEED))
    outlines = outline(sources).to(model.device, model.dtype)
    prompts = [str(int(label)) for label in held_out.labels[chosen]]
    kept, model.controlnets = model.controlnets, {controlnet.name: controlnet}
    images: dict[float, torch.Tensor] = {}
    try:
        for scale in SCALES:
            made = []
            for start in range(0, len(prompts), batch):
                on_progress(f"outlines at scale {scale:g}", start / len(prompts))
                own = range(start, min(start + batch, len(prompts)))
                states = [model.start(first_seed + i, steps, guidance_scale, prompts[i]) for i in own]
                for i, state in zip(own, states, strict=True):
                    if scale:
                        state.controls = (ControlUse(controlnet.name, outlines[i : i + 1], scale),)
                while not states[0].done:
                    model.step(states)
                latents = torch.cat([state.latent for state in states])
                made.append((model.decode(latents).float() / 2 + 0.5).clamp(0, 1).cpu())
            images[scale] = torch.cat(made)
    finally:
        model.controlnets = kept
    truth = sources / 2 + 0.5
    overlap = {scale: interval_of(overlap_of(found, truth).numpy()) for scale, found in images.items()}
    recognised = {scale: float(gate(found, prompts).mean()) for scale, found in images.items()}
    sheet = [("outline given", thumbnails(outlines.float())), ("where it came from", thumbnails(truth))]
    for scale, found in images.items():
        sheet.append((f"ControlNet at {scale:g}" if scale else "without ControlNet", thumbnails(found)))
    return OutlineResult(overlap, recognised, float(gate(truth, prompts).mean()), sheet)


def overlap_of(images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Intersection over union (n,) of the pixels above one half, of images (n, 1, height, width) in [0, 1]."""
    ours, theirs = images.flatten(1) > 0.5, sources.flatten(1) > 0.5
    union = (ours | theirs).sum(dim=1).clamp(min=1)
    return (ours & theirs).sum(dim=1) / union
