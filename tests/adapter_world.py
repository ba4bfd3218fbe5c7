"""LoRAs, ControlNets and conditioning images for the embedded model, made at random, and what its images must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from real_runner.adapters.serving import Folders
from real_runner.intake import seed_of
from synerdiff.core import RunResult
from synerdiff.diffusion.controlnet import load_controlnet, random_controlnet, read_control_image
from synerdiff.diffusion.denoisers.controlnet import ControlUse
from synerdiff.diffusion.lora import random_lora, read_lora, save_lora
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.model import image_seed

LORAS = ("ink", "chalk")
CONTROLNETS = ("edges", "depth")


def make_world(root: Path, model: Any) -> Folders:
    """LoRAs that change images visibly, ControlNets, images by seed 0 to 19 and two named ones, and bad files."""
    loras, controlnets, images = root / "loras", root / "controlnets", root / "images"
    for folder in (loras, controlnets, images):
        folder.mkdir(parents=True)
    for number, name in enumerate(LORAS):
        lora = random_lora(model.unet, name, rank=4, seed=number)
        layers = {module: replace_up(layer) for module, layer in lora.layers.items()}
        save_lora(replace(lora, layers=layers), loras / f"{name}.safetensors")
    (loras / "torn.safetensors").write_bytes(b"no safetensors")
    wide = random_lora(model.unet, "wide", rank=2)
    layers = {module: layer._replace(down=layer.down.repeat(1, 2)) for module, layer in wide.layers.items()}
    save_lora(replace(wide, layers=layers), loras / "wide.safetensors")
    for number, name in enumerate(CONTROLNETS):
        net = random_controlnet(name, model, seed=40 + number).net
        net.save_pretrained(str(controlnets / name))
    generator = np.random.default_rng(5)
    for name in [*map(str, range(20)), "first", "second"]:
        save_picture(images / f"{name}.png", generator.integers(0, 256, (32, 32), dtype=np.uint8))
    return Folders(loras, controlnets, images)


def replace_up(layer: Any) -> Any:
    return layer._replace(up=layer.up * 10)


def save_picture(path: Path, pixels: Any) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.unet.state_dict().items()}


def same_weights(model: Any, before: Any) -> bool:
    return all(torch.equal(weight, before[name]) for name, weight in model.unet.state_dict().items())


def made_alone(model: Any, folders: Folders, request: Any, image: int = 0, loras_from_step: int = 0) -> torch.Tensor:
    """The latent that the model layer makes of one sample, its LoRAs merged from that step on."""
    merged = MergedWeights(model.unet)
    state = model.start(seed_of(request), request.steps, request.guidance_scale, image=image)
    assert state.seed == image_seed(seed_of(request), image)
    uses = []
    for use in request.controlnets:
        net = load_controlnet(folders.controlnets / use.name, model)
        model.controlnets[use.name] = net
        picture = read_control_image(use.image or f"{seed_of(request)}.png", folders.images, net, model)  # type: ignore[arg-type]
        uses.append(ControlUse(use.name, picture, use.scale))
    state.controls = tuple(uses)
    try:
        for index in range(request.steps):
            if index == loras_from_step:
                for use in request.loras:
                    merged.merge(read_lora(f"{use.file}.safetensors", folders.loras), use.scale)  # type: ignore[arg-type]
            model.step([state])
    finally:
        merged.restore()
        model.controlnets.clear()
    return state.latent  # type: ignore[no-any-return]


def kinds(result: RunResult, *lanes: Any) -> list[Any]:
    """(lane, kind) of the records, in order, steps and chunks left out."""
    return [(w.lane, w.kind) for w in result.work if w.kind not in ("step", "chunk") and (not lanes or w.lane in lanes)]
