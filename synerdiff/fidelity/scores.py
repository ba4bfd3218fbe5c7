"""How close two sets of images are, image by image, and what is kept of a rule that has been judged."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from synerdiff.files import atomic
from synerdiff.results.intervals import Interval, t_interval

if TYPE_CHECKING:
    import numpy
    import torch

_T = TypeVar("_T")

THUMBNAILS = 10
LARGEST_PSNR_DB = 100.0
"""Of equal images, whose PSNR is infinite."""
MEASURE = {
    "ssim": "Wang et al. 2004; Gaussian window of 11x11 pixels, sigma 1.5, K1 0.01, K2 0.03, images mirrored at their "
    "borders, mean over pixels and channels; torchmetrics structural_similarity_index_measure",
    "psnr": f"10 log10(1 / mean squared error) per image, at most {LARGEST_PSNR_DB:g} dB, then the mean over images",
    "data_range": "images clamped to [0, 1]",
    "interval": "95% Student t interval of the mean over images",
}


@dataclass(frozen=True, slots=True)
class Judged:
    """A rule's images against those of full guidance; arrays have one entry per image."""

    ssim: numpy.ndarray[Any, Any]
    psnr_db: numpy.ndarray[Any, Any]
    recognised: numpy.ndarray[Any, Any]
    """Bool, or empty where nothing can recognise them."""
    rows: numpy.ndarray[Any, Any]
    thumbnails: numpy.ndarray[Any, Any]
    """uint8 (at most 10, height, width, channels): the first images."""


def ssim_of(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM (n,) of images (n, channels, height, width) in [0, 1], both sets in the same order; see ``MEASURE``."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found: Any = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    return found.reshape(len(images))  # type: ignore[no-any-return]


def psnr_db_of(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR (n,) in dB of images (n, channels, height, width) in [0, 1]; see ``MEASURE``."""
    error = (images - reference).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=10 ** (-LARGEST_PSNR_DB / 10)).log10()


def interval_of(values: numpy.ndarray[Any, Any]) -> Interval:
    """Mean over images with its 95% t interval."""
    return t_interval([float(value) for value in values])


def paired_difference(a: Judged, b: Judged, chosen: Sequence[int] | None = None) -> Interval:
    """Mean SSIM of a minus that of b on the same images (all, or the chosen ones), with its 95% t interval."""
    difference = a.ssim - b.ssim
    return interval_of(difference if chosen is None else difference[list(chosen)])


def save_arrays(path: Path, kept: Any) -> None:
    """Write a dataclass of arrays in one step."""
    import numpy

    with atomic(path) as temporary, temporary.open("wb") as file:
        numpy.savez_compressed(file, **{field.name: getattr(kept, field.name) for field in fields(kept)})


def load_arrays(path: Path, kind: type[_T]) -> _T | None:
    """What ``save_arrays`` kept; None when it is missing or not whole, so that it is computed again."""
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as kept:
            return kind(**{name: kept[name] for name in kept.files})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
