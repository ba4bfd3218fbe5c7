"""The denoiser's forward of some rows, with what ControlNets add to it: the same code for the worker and its peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from real_runner.adapters.controlnets import Call, Source
from real_runner.adapters.spans import Clock, Instant
from synerdiff.diffusion.denoisers.unet import sum_residuals
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.rows import RowInputs


class Forwarded(NamedTuple):
    """What the forward gave, and when it began: ControlNets that ran before it on the same device not included."""

    outputs: torch.Tensor
    began: Instant


@torch.inference_mode()
def forward(
    model: DiffusionModel, inputs: RowInputs, calls: Sequence[Call], controlnets: Source | None, clock: Clock
) -> Forwarded:
    """Predicted noise of all rows. Services compute while encoder and mid block run; the decoder waits for them."""
    began = clock.now()
    if not calls:
        return Forwarded(model.denoise(inputs), began)
    assert controlnets is not None
    residuals = controlnets.begin(calls)
    if controlnets.inline:
        began = clock.now()
    return Forwarded(model.split(inputs, lambda: sum_residuals(len(inputs.latents), residuals())), began)
