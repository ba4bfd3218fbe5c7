"""Styles of digit images, which LoRAs learn, and outlines, which steer a ControlNet."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional

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
