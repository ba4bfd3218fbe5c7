"""`load_model`: a built-in name, a checkpoint folder or a hub name -> a `DiffusionModel` on a device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.device.lanes import find_device
from synerdiff.diffusion.architectures import empty_modules, fill_randomly, known_architectures, read_architecture
from synerdiff.diffusion.checkpoint import Parts, read_checkpoint, read_digits
from synerdiff.diffusion.conditioning import RandomText, pooled_width
from synerdiff.diffusion.copied_solver import make_solver
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.schedulers import SCHEDULERS, make_scheduler

SHIPPED = {"digits": Path(__file__).parent / "models" / "digits"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    resolution: int | tuple[int, int] | None = None,
    scheduler: str | None = None,
) -> DiffusionModel:
    """Load a model, ready to start samples.

    `name_or_path`: `digits` (trained, ships with the package), `sd15`, `sdxl`, `tiny-sd`, `tiny-sdxl` (true or tiny
    architectures, random weights), a folder that diffusers saved, or a hub name `owner/model`; a folder wins over a
    name. `dtype`: by default float32 on a CPU and bfloat16 on a GPU. `resolution`: pixels, one side or (height,
    width); by default the model's own. `scheduler`: `ddim`, `euler`, `dpm++2m` or the name of a diffusers class,
    made from the model's own schedule configuration; by default the model's own scheduler.

    Raises InputError, one plain sentence, for unknown names, unusable folders, an unreachable hub, a missing device
    or sides that the model cannot make.
    """
    name, place = str(name_or_path), find_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    if (Path(name) / "unet").is_dir():
        parts = read_checkpoint(name, place, dtype)
    elif name in SHIPPED:
        parts = read_digits(SHIPPED[name], place, dtype)
    elif name in known_architectures():
        parts = _from_architecture(name, place, dtype)
    elif _HUB_NAME.fullmatch(name) and not Path(name).exists():
        parts = read_checkpoint(name, place, dtype)
    else:
        raise InputError(
            f"There is no model {name}; known ones: {', '.join(known_architectures())}, "
            "or a diffusers checkpoint folder (with unet, vae and scheduler in it), or a hub name like owner/model."
        )
    unet, vae, schedule, prompts, own_resolution = parts
    if resolution is None:
        resolution = own_resolution
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    return DiffusionModel(name, unet, vae, make_solver(_replaced(schedule, scheduler)), prompts, sides)


def _replaced(schedule: Any, wanted: str | None) -> Any:
    if wanted is None:
        return schedule
    return make_scheduler(SCHEDULERS.get(wanted, wanted), schedule.config)


def _from_architecture(name: str, device: torch.device, dtype: torch.dtype) -> Parts:
    config = read_architecture(name)
    unet, vae = (fill_randomly(module, device, dtype) for module in empty_modules(config))
    scheduler = make_scheduler(config["scheduler"]["_class_name"], config["scheduler"])
    tokens, width = int(config["conditioning"]["tokens"]), int(unet.config.cross_attention_dim)
    prompts = RandomText(tokens, width, pooled_width(unet.config), device, dtype)
    return Parts(unet, vae, scheduler, prompts, int(config["resolution"]))
