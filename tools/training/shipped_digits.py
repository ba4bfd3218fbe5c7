"""The shipped `digits` as its adapters are trained on it: frozen, with the diffusion loss over styled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synerdiff.diffusion import SHIPPED
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.model import DiffusionModel
from tools.training.train_digits import TrainedTokens


def frozen_digits() -> tuple[DiffusionModel, Any, Any]:
    """The model as it ships, its class tokens (labels (n,) -> (n, 2, width)), and its noise scheduler."""
    from diffusers import DDIMScheduler
    from safetensors.torch import load_file

    folder: Path = SHIPPED["digits"]
    tokens = TrainedTokens()
    tokens.load_state_dict({"table": load_file(folder / "class_tokens.safetensors")["tokens"].float()})
    scheduler: Any = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")  # type: ignore[no-untyped-call]
    return load_model("digits"), tokens.requires_grad_(False), scheduler


@torch.inference_mode()
def encode(model: DiffusionModel, images: torch.Tensor) -> torch.Tensor:
    """Scaled latents (n, 4, 8, 8) of (n, 1, 32, 32) images in [-1, 1]."""
    parts = [model.vae.encode(part).latent_dist.mean for part in torch.split(images, 128)]
    return torch.cat(parts) * float(model.vae.config.scaling_factor)
