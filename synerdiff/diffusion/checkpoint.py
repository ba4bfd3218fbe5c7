"""`load_model`: a built-in name, a checkpoint that diffusers saved in a folder or on the hub -> a `DiffusionModel`."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from synerdiff.core import InputError
from synerdiff.device.lanes import find_device, free_bytes
from synerdiff.diffusion import DTYPES, SCHEDULERS, SHIPPED
from synerdiff.diffusion.architectures import (
    empty_modules,
    fill_randomly,
    known_architectures,
    read_architecture,
    whole,
)
from synerdiff.diffusion.conditioning import ClassTokens, ClipText, Condition, PromptEncoder, RandomText, pooled_width
from synerdiff.diffusion.denoisers.unet import require_fed
from synerdiff.diffusion.model import DiffusionModel, vae_factor
from synerdiff.diffusion.schedulers import PROBE_STEPS, make_scheduler, make_solver, require_runs
from synerdiff.diffusion.solvers import first_line

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TOKENS_WITHOUT_ENCODER = 77
HUB_TIMEOUT_S = 5.0
_PARTS = (
    "vae",
    "text_encoder",
    "tokenizer",
    "unet",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)
_PIPELINES: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": dict.fromkeys((*_PARTS, "requires_safety_checker")),
    "StableDiffusionXLPipeline": dict.fromkeys((*_PARTS, "text_encoder_2", "tokenizer_2", "add_watermarker"))
    | {"force_zeros_for_empty_prompt": True},
}
"""Pipelines whose images are made: what `model_index.json` may hold -> the class's default where it does not."""


class LoadedParts(NamedTuple):
    """What a `DiffusionModel` is made of; `resolution` is the model's own (height, width) in pixels."""

    unet: Any
    vae: Any
    scheduler: Any
    prompts: PromptEncoder
    resolution: tuple[int, int]
    weights: str
    """`trained` (ships with the package), `checkpoint` (a folder or the hub) or `random` (a built-in architecture)."""


def load_model(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    resolution: int | tuple[int, int] | None = None,
    scheduler: str | None = None,
) -> DiffusionModel:
    """Load a model, ready to start samples.

    `name_or_path`: `digits` (trained, ships with the package), `sd15`, `sdxl`, `tiny-sd`, `tiny-sdxl` (true or tiny
    architectures, random weights), a folder that diffusers saved, or a hub name `owner/model`; a folder wins over a
    name. `dtype` (or its name): by default float32 on a CPU and bfloat16 on a GPU. `resolution`: pixels, one side or
    (height, width); by default the model's own. `scheduler`: `ddim`, `euler`, `dpm++2m` or a diffusers class,
    made from the model's own schedule configuration; by default the model's own scheduler.

    Weights are read from safetensors files only, which hold no code. Raises InputError, one plain sentence, for
    unknown names, unusable folders, networks with inputs that are not fed, an unreachable hub, a missing device, too
    little memory for the weights, sides that the model cannot make, or a scheduler or network that fails in a first
    step and decode of the smallest image.
    """
    name, place = str(name_or_path), find_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"the dtype is '{dtype}'; allowed are {', '.join(DTYPES)}.")
        dtype = getattr(torch, dtype)
    assert isinstance(dtype, torch.dtype)
    if (Path(name) / "unet").is_dir():
        parts = _read_checkpoint(name, place, dtype)
    elif name in SHIPPED:
        parts = _read_digits(SHIPPED[name], "trained", place, dtype)
    elif name in known_architectures():
        parts = _from_architecture(name, place, dtype)
    elif _HUB_NAME.fullmatch(name) and not Path(name).exists():
        parts = _read_checkpoint(name, place, dtype)
    else:
        raise InputError(_no_model(Path(name)))
    schedule = parts.scheduler
    if scheduler is not None:
        schedule = make_scheduler(SCHEDULERS.get(scheduler, scheduler), schedule.config)
    sides = parts.resolution if resolution is None else resolution
    solver, own_scheduler = make_solver(schedule), type(parts.scheduler).__name__
    model = DiffusionModel(
        name, parts.unet, parts.vae, solver, parts.prompts, _pair(sides), parts.weights, own_scheduler
    )
    _require_runs(model, hasattr(schedule, "init_noise_sigma"))
    return model


def _require_runs(model: DiffusionModel, predicts_noise: bool) -> None:
    """One step and one decode of the smallest image: whatever fails is one InputError before anything is served."""
    if not predicts_noise:
        kind = model.solver.scheduler_name
        raise InputError(f"{model.name} cannot run with the scheduler {kind}, which is not made for UNets; try ddim.")
    small, side = copy.copy(model), 2 ** (len(model.unet.config.block_out_channels) - 1)
    small.latent_shape = (1, model.latent_shape[1], side, side)
    require_runs(model.name, model.solver, small.latent_shape)
    state = small.start(0, PROBE_STEPS, 1.0)
    _guarded(lambda *_: (small.step([state]), small.decode(state.latent)), model.name, model.device, model.dtype)


def has_random_weights(name: str) -> bool:
    """Whether `load_model(name)` fills an architecture with random numbers, so that its images mean nothing."""
    return name in known_architectures() and name not in SHIPPED and not (Path(name) / "unet").is_dir()


def _no_model(path: Path) -> str:
    """Why nothing can be loaded by that name."""
    if path.is_file():
        return f"{path} is a file; a model is a folder that diffusers saved (with unet, vae and scheduler in it)."
    index = path / "model_index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))
            kind = str(listed["_class_name"])
        except (OSError, ValueError, KeyError, TypeError):
            return f"{index}: this is no index of a diffusers pipeline."
        denoiser = " (its denoiser is a transformer)" if (path / "transformer").is_dir() else ""
        return f"{path} is a {kind}{denoiser}; only pipelines with a UNet2DConditionModel in unet are served."
    if path.is_dir():
        return f"{path} is a folder without unet, vae and scheduler, which a checkpoint that diffusers saved has."
    return (
        f"There is no model {path}; known ones: {', '.join(known_architectures())}, "
        "or a diffusers checkpoint folder (with unet, vae and scheduler in it), or a hub name like owner/model."
    )


def _require_memory(name: str, modules: Sequence[Any], device: torch.device, dtype: torch.dtype) -> None:
    """InputError when the weights of modules on the meta device do not fit; their activations come on top."""
    size_bytes = sum(weight.numel() for module in modules for weight in module.parameters()) * dtype.itemsize
    free = free_bytes(device)
    if free is not None and size_bytes > free:
        raise InputError(
            f"The weights of {name} take {size_bytes / 1e9:.1f} GB; {device} has {free / 1e9:.1f} GB of memory free."
        )


def _from_architecture(name: str, device: torch.device, dtype: torch.dtype) -> LoadedParts:
    config = read_architecture(name)
    modules = empty_modules(config)
    _require_memory(name, modules, device, dtype)
    unet, vae = (fill_randomly(module, device, dtype) for module in modules)
    scheduler = make_scheduler(config["scheduler"]["_class_name"], config["scheduler"])
    tokens, width = int(config["conditioning"]["tokens"]), int(unet.config.cross_attention_dim)
    prompts = RandomText(tokens, width, pooled_width(unet.config), device, dtype)
    return LoadedParts(unet, vae, scheduler, prompts, (int(config["resolution"]),) * 2, "random")


def _read_digits(folder: Path, weights: str, device: torch.device, dtype: torch.dtype) -> LoadedParts:
    """A folder that `tools.training.train_digits` wrote."""
    unet, vae, scheduler = _guarded(_read_modules, str(folder), device, dtype)
    table = _guarded(_class_tokens, str(folder), device, dtype)
    _require_fitting(str(folder), ClassTokens(table).encode("0"), unet.config)
    return LoadedParts(unet, vae, scheduler, ClassTokens(table), _pair(vae.config.sample_size), weights)


def _class_tokens(name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    from safetensors.torch import load_file

    table = load_file(Path(name) / "class_tokens.safetensors").get("tokens")
    if table is None or table.dim() != 3 or len(table) < 2 or not table.is_floating_point():
        found = "none" if table is None else f"{tuple(table.shape)} of {table.dtype}"
        raise InputError(f"{name}: class_tokens.safetensors holds numbers (classes + 1, tokens, width); found {found}.")
    return table.to(device, dtype)


def _read_checkpoint(name: str, device: torch.device, dtype: torch.dtype) -> LoadedParts:
    """A folder or hub name with a UNet2DConditionModel, an AutoencoderKL, a scheduler and perhaps CLIP encoders.

    Without text encoders, prompts become random embeddings.
    """
    if (Path(name) / "class_tokens.safetensors").is_file():
        return _read_digits(Path(name), "checkpoint", device, dtype)
    return _guarded(_read_parts, name, device, dtype)  # type: ignore[no-any-return]


def _leave_the_hub_if_away() -> None:
    """One short question instead of two minutes of retries for each file; what is in the hub's cache is still found."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # whichever library asks, in whichever way it fails
        constants.HF_HUB_OFFLINE = True


def _read_parts(name: str, device: torch.device, dtype: torch.dtype) -> LoadedParts:
    if not Path(name).is_dir():
        _leave_the_hub_if_away()
    index = _read_index(name)
    unet, vae, scheduler = _read_modules(name, device, dtype, index)
    prompts: PromptEncoder | None = _read_clip(name, device, dtype, index)
    if prompts is None:
        width = int(unet.config.cross_attention_dim)
        prompts = RandomText(TOKENS_WITHOUT_ENCODER, width, pooled_width(unet.config), device, dtype)
    _require_fitting(name, prompts.encode(""), unet.config)
    height, width = _pair(unet.config.sample_size)
    return LoadedParts(unet, vae, scheduler, prompts, (height * vae_factor(vae), width * vae_factor(vae)), "checkpoint")


def _pair(sides: int | Sequence[int]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (int(sides[0]), int(sides[1]))


def _require_fitting(name: str, condition: Condition, unet_config: Any) -> None:
    """InputError where the text encoders do not give what the UNet reads."""
    given, read = condition.tokens.shape[-1], unet_config.cross_attention_dim
    if given != read:
        raise InputError(f"{name}: its text encoders give {given} numbers a token, its UNet reads {read}; not served.")
    pooled = None if condition.pooled is None else condition.pooled.shape[-1]
    wanted = pooled_width(unet_config)
    if pooled != wanted and wanted is not None:
        raise InputError(
            f"{name}: its UNet reads a pooled text vector of {wanted} numbers and six sizes; its text encoders give "
            f"{pooled or 'no such vector'}; not served."
        )


def _guarded(read: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Turn what diffusers, transformers and the hub raise into one sentence."""
    from huggingface_hub import constants

    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of one library about another's options
            return read(name, device, dtype)
    except InputError:
        raise
    except Exception as error:  # whatever a wrong configuration or file makes the libraries raise
        if constants.HF_HUB_OFFLINE and not Path(name).is_dir() and "/" in name:
            raise InputError(
                f"Cannot load the hub model {name}: it is not whole in the hub's cache on this machine, and "
                f"{constants.ENDPOINT} is not asked or does not answer."
            ) from error
        place = "folder" if Path(name).is_dir() else "hub model" if "/" in name else "model"
        raise InputError(f"Cannot load the {place} {name}: {first_line(error)}.") from error


def _read_index(name: str) -> Mapping[str, Any]:
    """What `model_index.json` says, with the defaults of its pipeline's class; empty for a folder without one."""
    from diffusers import DiffusionPipeline

    if Path(name).is_dir() and not (Path(name) / DiffusionPipeline.config_name).is_file():
        return {}
    index: Any = DiffusionPipeline.load_config(name)
    kind = index.get("_class_name")
    if kind not in _PIPELINES:
        raise InputError(f"{name} is a {kind}; served are {' and '.join(_PIPELINES)}.")
    defaults = _PIPELINES[kind]
    for option, value in index.items():
        if not option.startswith("_") and option not in defaults and value not in (None, False, [None, None]):
            raise InputError(f"{name}: its model_index.json has {option}, which a {kind} does not have; not served.")
    return dict(defaults) | dict(index)


def _read_modules(
    name: str, device: torch.device, dtype: torch.dtype, index: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Any, Any, Any]:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    unet_config: Any = UNet2DConditionModel.load_config(name, subfolder="unet")
    vae_config: Any = AutoencoderKL.load_config(name, subfolder="vae")
    kinds = [str(config.get("_class_name")) for config in (unet_config, vae_config)]
    if kinds != ["UNet2DConditionModel", "AutoencoderKL"]:
        raise InputError(f"{name} has a {kinds[0]} and a {kinds[1]}; needed: UNet2DConditionModel, AutoencoderKL.")
    require_fed(name, unet_config, vae_config)
    with torch.device("meta"):
        empty = [UNet2DConditionModel.from_config(unet_config), AutoencoderKL.from_config(vae_config)]  # type: ignore[no-untyped-call]
    _require_memory(name, empty, device, dtype)
    # Safetensors only: the pickled files of older checkpoints can run code.
    networks: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    unet, vae = (
        whole(
            f"{name}/{part}",
            network.from_pretrained(
                name, subfolder=part, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
            ),
        )
        for part, network in networks.items()
    )
    if dtype is torch.float16 and vae.config.force_upcast:
        # SDXL's own VAE overflows in half precision and says so in its configuration.
        vae = vae.float()
    # Any scheduler's load_config reads the file; the class that it names decides what is made of it.
    config: Any = DDIMScheduler.load_config(name, subfolder="scheduler")
    kind = config["_class_name"]
    listed = (index.get("scheduler") or (None, kind))[1]
    if kind != listed:
        # A pipeline would make the index's, without a word; whoever edited one of the files wants the other, perhaps.
        raise InputError(f"{name}: its model_index.json names the scheduler {listed}, its scheduler's own file {kind}.")
    if index.get("_class_name") == "StableDiffusionPipeline":
        # This pipeline sets both for the sake of old files; a scheduler without such an option does not see it.
        config = dict(config) | {"steps_offset": 1, "clip_sample": False}
    scheduler = make_scheduler(str(kind), config)
    return unet.to(device).eval().requires_grad_(False), vae.to(device).eval().requires_grad_(False), scheduler


def _read_clip(name: str, device: torch.device, dtype: torch.dtype, index: Mapping[str, Any]) -> ClipText | None:
    """One CLIP encoder (Stable Diffusion) or two (SDXL) as `model_index.json` lists them; None when it lists none."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    classes: dict[str, Any] = {
        "CLIPTextModel": CLIPTextModel,
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    }
    encoders, tokenizers = [], []
    for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        kind = (index.get(part) or (None, None))[1]
        if kind is None:
            continue
        if kind not in classes:
            raise InputError(f"{name} has a text encoder {kind}; needed: {' or '.join(classes)}.")
        encoder: Any = whole(
            f"{name}/{part}",
            classes[kind].from_pretrained(
                name, subfolder=part, dtype=dtype, use_safetensors=True, output_loading_info=True
            ),
        )
        if getattr(encoder.config, "use_attention_mask", False):
            raise InputError(f"{name}: its {part} has use_attention_mask, an input that is not fed; not served.")
        words, most = CLIPTokenizer.from_pretrained(name, subfolder=tokenizer), encoder.config.max_position_embeddings
        if not 1 <= words.model_max_length <= most:
            raise InputError(
                f"{name}: its {tokenizer} makes up to {words.model_max_length:,} tokens of a prompt; its {part} reads "
                f"1 to {most:,}."
            )
        encoders.append(encoder.to(device).eval().requires_grad_(False))
        tokenizers.append(words)
    if not encoders:
        return None
    return ClipText(encoders, tokenizers, bool(index.get("force_zeros_for_empty_prompt")))
