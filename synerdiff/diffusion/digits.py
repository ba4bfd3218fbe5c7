"""The embedded model `digits`: the images behind it, outlines of them, and its gate against gross failure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import nn

from synerdiff.diffusion import SHIPPED

IMAGE_SIZE = 32
HELD_OUT_EVERY = 5
SHIPPED_WEIGHTS = SHIPPED["digits"] / "classifier.safetensors"
STYLES_WEIGHTS = SHIPPED_WEIGHTS.with_name("classifier-styles.safetensors")
"""The same classifier, trained on plain and styled digits alike."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """`images`: float32 (n, 1, 32, 32) in [-1, 1], -1 is the background; `labels`: int64 (n,) in 0..9."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class DigitsSplit:
    """What the weights were trained on, and what they never saw."""

    train: LabelledImages
    held_out: LabelledImages


@cache
def digits_split() -> DigitsSplit:
    """The one split that training, gates and fidelity studies share: every fifth image of each class is held out.

    The rule uses no random numbers, so it cannot differ between library versions. The 1,797 source images (8x8,
    0..16; UCI optical recognition of handwritten digits) are upscaled bicubically. Writers appear on both sides.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    small = torch.from_numpy(source.images).to(torch.float32)[:, None] / 8.0 - 1.0
    images = functional.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    images = images.clamp(-1.0, 1.0)
    labels = torch.from_numpy(source.target).to(torch.int64)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY, 0]] = True
    return DigitsSplit(
        train=LabelledImages(images[~held_out], labels[~held_out]),
        held_out=LabelledImages(images[held_out], labels[held_out]),
    )


def outline(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 32, 32) images in [-1, 1] -> their outlines in [0, 1]: the morphological gradient over 3x3 pixels."""
    gradient = functional.max_pool2d(images, 3, 1, 1) + functional.max_pool2d(-images, 3, 1, 1)
    return gradient.clamp(0.0, 1.0)


def displaced(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each of (n, 1, 32, 32) images turned by up to 20 degrees, 65 to 105% as large, shifted by up to 5 pixels."""
    draw = torch.rand(len(images), 4, generator=generator)
    angle = (draw[:, 0] * 2.0 - 1.0) * (20.0 * torch.pi / 180.0)
    scale = 1.0 / (0.65 + 0.4 * draw[:, 1])
    shift = (draw[:, 2:] * 2.0 - 1.0) * (5.0 * 2.0 / IMAGE_SIZE)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    transform = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], dim=1), torch.stack([sin, cos, shift[:, 1]], dim=1)], dim=1
    )
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # The background is -1 and grid_sample pads with 0: shift, sample, shift back.
    return functional.grid_sample(images + 1.0, grid, padding_mode="zeros", align_corners=False) - 1.0


class DigitsClassifier(nn.Module):
    """(n, 1, 32, 32) images in [-1, 1] -> (n, 10) logits: a gate that saturates, no measure of quality."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * 16, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 32, 32) images in [-1, 1] -> (n, 10) logits."""
        logits: torch.Tensor = self.layers(images)
        return logits


def load_classifier(path: Path = SHIPPED_WEIGHTS) -> DigitsClassifier:
    """Read the classifier that ships with `digits`, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    classifier = DigitsClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval()
