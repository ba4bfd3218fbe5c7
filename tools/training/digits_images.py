"""What training makes of digit images: light augmentation, styles that LoRAs learn, and the classifiers of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as functional

from synerdiff.diffusion.digits import IMAGE_SIZE, DigitsClassifier, LabelledImages

SHEAR = 0.45
"""Columns that a slanted digit leans to the right per line."""


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale and shift each of the (n, 1, 32, 32) images a little: up to 8 degrees, 8% and 1.5 pixels."""
    n = images.shape[0]
    draw = torch.rand(n, 4, generator=generator) * 2.0 - 1.0
    angle = draw[:, 0] * (8.0 * torch.pi / 180.0)
    scale = 1.0 + draw[:, 1] * 0.08
    shift = draw[:, 2:] * (1.5 * 2.0 / IMAGE_SIZE)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    transform = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], dim=1), torch.stack([sin, cos, shift[:, 1]], dim=1)], dim=1
    )
    return _moved(images, transform)


def _moved(images: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # The background is -1 and grid_sample pads with 0: shift, sample, shift back.
    return functional.grid_sample(images + 1.0, grid, padding_mode="zeros", align_corners=False) - 1.0


def slanted(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 32, 32) images in [-1, 1], each leaning to the right by `SHEAR` about its centre."""
    return _moved(images, torch.tensor([[1.0, SHEAR, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3))


def hollow(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 32, 32) images in [-1, 1] whose strokes are widened and emptied: only their borders are bright."""
    inner = -functional.max_pool2d(-images, 3, 1, 1)
    return (functional.max_pool2d(images, 5, 1, 2) - (inner + 1.0)).clamp(-1.0, 1.0)


STYLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"slanted": slanted, "hollow": hollow}


def train_classifier(data: LabelledImages, seed: int = 0, epochs: int = 20) -> DigitsClassifier:
    """Train on real images only (about half a minute on two cores); the same seed gives the same classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitsClassifier().train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
        batch = 64
        batches = len(data.labels) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
        for _ in range(epochs):
            order = torch.randperm(len(data.labels), generator=generator)
            for start in range(0, batches * batch, batch):
                chosen = order[start : start + batch]
                logits = classifier(augment(data.images[chosen], generator))
                loss = functional.cross_entropy(logits, data.labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return classifier.eval()


def save_classifier(classifier: DigitsClassifier, path: Path) -> None:
    """Write the weights in half precision."""
    from safetensors.torch import save_file

    save_file({name: tensor.half().contiguous() for name, tensor in classifier.state_dict().items()}, path)


@torch.inference_mode()
def recognised_fraction(classifier: DigitsClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of (n, 1, 32, 32) images in [-1, 1] whose most likely class is the given label."""
    return float((classifier(images.float()).argmax(dim=1) == labels).float().mean())
