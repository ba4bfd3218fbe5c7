"""Styles of digit images, which LoRAs learn, and outlines, which steer a ControlNet."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional

from synerdiff.diffusion.digits_data import IMAGE_SIZE

SHEAR = 0.45
"""Columns that a slanted digit leans to the right per line."""


def slanted(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 32, 32) images in [-1, 1], each leaning to the right by `SHEAR` about its centre."""
    transform = torch.tensor([[1.0, SHEAR, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # The background is -1 and grid_sample pads with 0: shift, sample, shift back.
    return functional.grid_sample(images + 1.0, grid, padding_mode="zeros", align_corners=False) - 1.0


def hollow(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 32, 32) images in [-1, 1] whose strokes are widened and emptied: only their borders are bright."""
    inner = -functional.max_pool2d(-images, 3, 1, 1)
    return (functional.max_pool2d(images, 5, 1, 2) - (inner + 1.0)).clamp(-1.0, 1.0)


STYLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"slanted": slanted, "hollow": hollow}


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
