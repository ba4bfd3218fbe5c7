"""The images behind the `digits` model: scikit-learn's bundled digits, upscaled to 32x32, and their split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as functional

IMAGE_SIZE = 32
HELD_OUT_EVERY = 5


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
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # The background is -1 and grid_sample pads with 0: shift, sample, shift back.
    moved = functional.grid_sample(images + 1.0, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved - 1.0
