"""`load_model`: a built-in name, a checkpoint that diffusers saved in a folder or on the hub -> a `DiffusionModel`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from synerdiff.core import InputError
from synerdiff.device.lanes import find_device
from synerdiff.diffusion import SCHEDULERS, SHIPPED
from synerdiff.diffusion.architectures import empty_modules, fill_randomly, known_architectures, read_architecture
from synerdiff.diffusion.conditioning import ClassTokens, ClipText, PromptEncoder, RandomText, pooled_width
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.schedulers import make_scheduler, make_solver

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TOKENS_WITHOUT_ENCODER = 77


class Parts(NamedTuple):
    """What a `DiffusionModel` is made of; `resolution` is the model's own, in pixels a side."""

    unet: Any
    vae: Any
    scheduler: Any
    prompts: PromptEncoder
    resolution: int


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


def read_digits(folder: Path, device: torch.device, dtype: torch.dtype) -> Parts:
    """A folder that `training.train_digits` wrote. Raises InputError when it is incomplete."""
    from safetensors.torch import load_file

    unet, vae, scheduler = _guarded(_read_modules, str(folder), device, dtype)
    table = load_file(folder / "class_tokens.safetensors")["tokens"].to(device, dtype)
    return Parts(unet, vae, scheduler, ClassTokens(table), int(vae.config.sample_size))


def read_checkpoint(name: str, device: torch.device, dtype: torch.dtype) -> Parts:
    """A folder or hub name with a UNet2DConditionModel, an AutoencoderKL, a scheduler and perhaps CLIP encoders.

    Without text encoders, prompts become random embeddings. Raises InputError, one sentence, for anything that
    cannot be read or reached.
    """
    if (Path(name) / "class_tokens.safetensors").is_file():
        return read_digits(Path(name), device, dtype)
    unet, vae, scheduler = _guarded(_read_modules, name, device, dtype)
    prompts: PromptEncoder | None = _guarded(_read_clip, name, device, dtype)
    if prompts is None:
        width = int(unet.config.cross_attention_dim)
        prompts = RandomText(TOKENS_WITHOUT_ENCODER, width, pooled_width(unet.config), device, dtype)
    return Parts(unet, vae, scheduler, prompts, int(unet.config.sample_size) * 2 ** (len(vae.decoder.up_blocks) - 1))


def _guarded(read: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Turn what diffusers, transformers and the hub raise into one sentence."""
    try:
        return read(name, device, dtype)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        place = "folder" if Path(name).is_dir() else "hub model"
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".:")
        raise InputError(f"Cannot load the {place} {name}: {reason}.") from error


def _read_modules(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    kinds: list[str] = []
    for part, expected in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        kinds.append(str(expected.load_config(name, subfolder=part).get("_class_name")))
    if kinds != ["UNet2DConditionModel", "AutoencoderKL"]:
        raise InputError(f"{name} has a {kinds[0]} and a {kinds[1]}; needed: UNet2DConditionModel, AutoencoderKL.")
    unet: Any = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype)  # type: ignore[no-untyped-call]
    vae: Any = AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=dtype)  # type: ignore[no-untyped-call]
    if dtype is torch.float16 and vae.config.force_upcast:
        # SDXL's own VAE overflows in half precision and says so in its configuration.
        vae = vae.float()
    # Any scheduler's load_config reads the file; the class that it names decides what is made of it.
    config: Any = DDIMScheduler.load_config(name, subfolder="scheduler")
    scheduler = make_scheduler(str(config["_class_name"]), config)
    return unet.to(device).eval().requires_grad_(False), vae.to(device).eval().requires_grad_(False), scheduler


def _read_clip(name: str, device: torch.device, dtype: torch.dtype) -> ClipText | None:
    """One CLIP encoder (Stable Diffusion) or two (SDXL) as `model_index.json` lists them; None when it lists none."""
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    classes = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    if Path(name).is_dir() and not (Path(name) / DiffusionPipeline.config_name).is_file():
        return None
    index: Any = DiffusionPipeline.load_config(name)
    encoders, tokenizers = [], []
    for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        kind = (index.get(part) or (None, None))[1]
        if kind is None:
            continue
        if kind not in classes:
            raise InputError(f"{name} has a text encoder {kind}; needed: {' or '.join(classes)}.")
        encoder: Any = classes[kind].from_pretrained(name, subfolder=part, dtype=dtype)
        encoders.append(encoder.to(device).eval().requires_grad_(False))
        tokenizers.append(CLIPTokenizer.from_pretrained(name, subfolder=tokenizer))
    if not encoders:
        return None
    return ClipText(encoders, tokenizers, bool(index.get("force_zeros_for_empty_prompt", False)))
