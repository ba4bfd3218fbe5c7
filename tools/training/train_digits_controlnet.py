"""Train a ControlNet that lays `digits` out by an outline:
`python -m tools.training.train_digits_controlnet --out DIR`.

About 15 minutes on one core. It starts as a copy of the UNet's encoder with zero convolutions (Zhang et al. 2023,
arXiv:2302.05543) and learns from the outlines of real digits that are moved, turned and scaled far more than those
that the UNet saw; the UNet stays as it is. In half of the rows the class is dropped, so that the outline must tell it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import ControlNetModel

from synerdiff.diffusion.digits import digits_split, displaced, outline
from tools.training.shipped_digits import encode, frozen_digits
from tools.training.train_digits import UNCONDITIONAL, Loss, before_deadline, parser_of, train_stage

IMAGE_CHANNELS = (8, 16, 32)
VARIANTS_PER_IMAGE = 12
CLASS_DROPOUT = 0.5


def controlnet_loss(
    latents: torch.Tensor, outlines: torch.Tensor, labels: torch.Tensor, unet: Any, tokens: Any, scheduler: Any
) -> Loss:
    """Predict the noise at a random timestep through the frozen UNet, whose skip connections the ControlNet steers."""

    def loss_of(net: Any, generator: torch.Generator, batch: int) -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        timesteps = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long()
        dropped = torch.rand(batch, generator=generator) < CLASS_DROPOUT
        condition = tokens(torch.where(dropped, torch.tensor(UNCONDITIONAL), labels[chosen]))
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        down, mid = net(noisy, timesteps, condition, outlines[chosen], return_dict=False)
        steered = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return functional.mse_loss(unet(noisy, timesteps, condition, **steered).sample, noise)

    return loss_of


def train(out: Path, seed: int, deadline_s: float) -> dict[str, Any]:
    """Train under `out`, write the folder `outline` there and return its size."""
    out.mkdir(parents=True, exist_ok=True)
    model, tokens, scheduler = frozen_digits()
    data = digits_split().train
    generator = torch.Generator().manual_seed(seed + 277)
    images = torch.cat([displaced(data.images, generator) for _ in range(VARIANTS_PER_IMAGE)])
    latents, labels = encode(model, images).clone(), data.labels.repeat(VARIANTS_PER_IMAGE)
    torch.manual_seed(seed)
    net: Any = ControlNetModel.from_unet(
        model.unet, conditioning_embedding_out_channels=IMAGE_CHANNELS, conditioning_channels=1
    )
    net.requires_grad_(True).train()
    loss_of = controlnet_loss(latents, outline(images), labels, model.unet, tokens, scheduler)
    trained: Any = train_stage("controlnet", net, loss_of, out, seed, deadline_s)
    trained.half().save_pretrained(out / "outline")
    return {"seed": seed, "parameters": sum(weight.numel() for weight in trained.parameters())}


if __name__ == "__main__":
    arguments = parser_of("Train the outline ControlNet of the embedded model digits.", 1).parse_args()
    print(json.dumps(before_deadline(arguments, train), indent=2))
