"""The built-in architectures: public configurations as JSON, and modules filled with random weights."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.files import shown

CONFIG_FOLDER = Path(__file__).parent / "configs"
WEIGHTS_SEED = 20_260_101
_IMAGE_CHANNELS = {2: (16, 32), 4: (8, 16, 32), 8: (16, 32, 96, 256), 16: (16, 32, 96, 256, 256)}
"""How often images are reduced to latents -> channels of the layers that do it; 8: as in every public ControlNet."""
_SHARED_WITH_UNET = (
    "in_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "addition_embed_type",
    "addition_time_embed_dim",
    "upcast_attention",
    "resnet_time_scale_shift",
    "projection_class_embeddings_input_dim",
    "mid_block_type",
)


def known_architectures() -> tuple[str, ...]:
    """Names that need no checkpoint, in alphabetical order."""
    return tuple(sorted(path.stem for path in CONFIG_FOLDER.glob("*.json")))


def read_architecture(name: str) -> dict[str, Any]:
    """The configuration `name`: resolution, unet, vae, scheduler, conditioning. Raises InputError if unknown."""
    if name not in known_architectures():
        raise InputError(f"There is no built-in model {name}; known ones: {', '.join(known_architectures())}.")
    config: dict[str, Any] = json.loads((CONFIG_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return config


def require_kinds(what: str, of: Any, config: Mapping[str, Any]) -> None:
    """InputError where an option of that class is no number or truth value although its default is one, or is NaN.

    The libraries take every text for true, "false" too, and true for 1.
    """
    for option, parameter in inspect.signature(of).parameters.items():
        value, default = config.get(option), parameter.default
        if not isinstance(default, bool | int | float):
            continue
        text_or_nan = isinstance(value, str) or (isinstance(value, float) and math.isnan(value))
        if text_or_nan or (isinstance(value, bool) and not isinstance(default, bool)):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise InputError(f"{what} has {option} {shown(repr(value))}; {kind} is needed.")


def whole(what: str, loaded: tuple[Any, Mapping[str, Any]]) -> Any:
    """The module of `from_pretrained(..., output_loading_info=True)`; InputError where its file lacks weights, which
    the libraries leave empty or fill with random numbers."""
    module, info = loaded
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise InputError(f"{what}: its weights lack {missing[0]}{more}; the file is damaged, or another model's.")
    return module


def empty_modules(config: dict[str, Any]) -> tuple[Any, Any]:
    """The UNet and the VAE on the meta device: shapes and parameter counts, no memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"])  # type: ignore[no-untyped-call]
        return unet, AutoencoderKL(**config["vae"])  # type: ignore[no-untyped-call]


def empty_controlnet(unet_config: Any, image_reduction: int, channels: int) -> Any:
    """The ControlNetModel for a UNet of that configuration, on the meta device: shapes, no memory.

    It reads images of `channels` channels that are `image_reduction` (a power of 2) times as large as the latents.
    """
    from diffusers import ControlNetModel

    config = {option: unet_config[option] for option in _SHARED_WITH_UNET}
    widths = _IMAGE_CHANNELS[image_reduction]
    with torch.device("meta"):
        return ControlNetModel(  # type: ignore[no-untyped-call]
            **config, conditioning_embedding_out_channels=widths, conditioning_channels=channels
        )


@torch.no_grad()
def fill_randomly(module: Any, device: torch.device, dtype: torch.dtype, seed: int = WEIGHTS_SEED) -> Any:
    """Allocate a module made on the meta device and give it random weights that keep activations finite.

    Weights are uniform with variance 1 / fan_in, gains 1, biases 0; made on the device itself, so even SDXL takes
    seconds. The same seed gives the same weights on the same kind of device only.
    """
    if list(module.buffers()):
        raise InputError(f"{type(module).__name__} has buffers, which random weights cannot fill.")
    # torch's own `to`: diffusers' warns about modules to keep in float32, of which these have none.
    torch.nn.Module.to(module, dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            bound = math.sqrt(3.0 / parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return module.eval().requires_grad_(False)
