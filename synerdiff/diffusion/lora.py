"""LoRA files: low-rank changes of a UNet's weights, read from safetensors only and only from an allowed folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from synerdiff.core import InputError
from synerdiff.files import atomic, finite, shown

_PREFIX = "unet."
_PEFT, _KOHYA = "base_model.model.", "lora_unet_"
_HALVES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
"""How the two matrices of a layer are called: by diffusers and peft, by diffusers' older versions, by kohya."""
_DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_WORDS = re.compile(
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_(?:q|k|v|out)|proj_(?:in|out)|time_emb_proj|conv_(?:in|out|shortcut)"
    "|(?:time|add)_embedding|linear_[12]|[a-z0-9]+"
)
"""A UNet's module names: kohya joins them by underscores, which some of them have themselves."""
_ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
"""Names in Stability AI's own code, which kohya's SDXL files have -> diffusers' names."""
_METADATA = "lora_adapter_metadata"
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class UnservedLora(InputError):
    """A LoRA of a kind that is not merged here: a run fails the requests that name it, and serves the others."""


class LoraLayer(NamedTuple):
    """The change of one layer: `scaling` * up @ down.

    `down`: (rank, inputs), or (rank, channels, kernel, kernel) for a convolution; `up`: (outputs, rank), or
    (outputs, rank, 1, 1). `scaling` is alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    def product(self) -> torch.Tensor:
        """`scaling` * up @ down in float32, in the shape of the layer's weight."""
        flat = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scaling * flat).view(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """`name`: the file's name without its ending; `layers`: by module path inside the UNet, in alphabetical order."""

    name: str
    size_bytes: int
    layers: Mapping[str, LoraLayer]

    def to(self, device: torch.device) -> LoraFile:
        """The same on a device (itself when it is there); a copy to a GPU is enqueued on the current stream."""
        if all(half.device == device for layer in self.layers.values() for half in layer[:2]):
            return self
        moved = {
            module: layer._replace(
                down=layer.down.to(device, non_blocking=True), up=layer.up.to(device, non_blocking=True)
            )
            for module, layer in self.layers.items()
        }
        return replace(self, layers=moved)

    def pinned(self) -> LoraFile:
        """The same in page-locked host memory, from which copies to a GPU overlap with its work."""
        moved = {
            module: layer._replace(down=layer.down.pin_memory(), up=layer.up.pin_memory())
            for module, layer in self.layers.items()
        }
        return replace(self, layers=moved)


def read_lora(path: str | Path, folder: str | Path) -> LoraFile:
    """Read a LoRA for a UNet into host memory, under the names of diffusers, peft or kohya.

    `path`: inside `folder`, absolute or relative to it; links are followed before that is checked. Only safetensors,
    which hold no code. alpha comes from the file's `alpha` keys, else from its metadata (`alpha_pattern`, then
    `lora_alpha`) or peft's adapter_config.json beside it, else it is the rank.
    Raises InputError, one sentence with the file and the layer, for anything else.
    """
    allowed = Path(folder).resolve()
    file = (allowed / path).resolve()
    if not file.is_relative_to(allowed):
        raise InputError(f"{path}: this LoRA lies outside the folder of LoRAs, {folder}.")
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: a LoRA must be a .safetensors file.")
    if not file.is_file():
        raise InputError(f"{file}: there is no such LoRA.")
    tensors, metadata = _read_tensors(file)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = _layer_of(file, key)
        if part in parts.setdefault(module, {}):
            raise InputError(f"{file}: the layer {module} has two {part} tensors.")
        number = tensor.is_floating_point() or (part == "alpha" and tensor.dtype in _WHOLE)
        if not number or not bool(tensor.float().isfinite().all()):  # float8 has no isfinite of its own
            raise InputError(f"{file}: the {part} tensor of layer {module} holds values that are not finite numbers.")
        parts[module][part] = tensor
    if not parts:
        raise InputError(f"{file}: this file holds no LoRA layers.")
    config = _config_of(file, metadata)
    layers = {module: _layer(file, module, parts[module], config) for module in sorted(parts)}
    return LoraFile(file.stem, file.stat().st_size, layers)


def save_lora(lora: LoraFile, path: Path) -> LoraFile:
    """Write it under diffusers' names, with its alphas, for `read_lora` and for diffusers; returns it as the file."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for module, layer in lora.layers.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = layer.down.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = layer.up.contiguous()
        tensors[f"{_PREFIX}{module}.alpha"] = torch.tensor(layer.scaling * layer.down.shape[0])
    with atomic(path) as temporary:
        save_file(tensors, temporary)
    return replace(lora, name=path.stem, size_bytes=path.stat().st_size)


def random_lora(unet: Any, name: str, rank: int, seed: int = 0) -> LoraFile:
    """A LoRA over all attention projections of a UNet (SDXL: 560 layers), as large as one that was trained, for timing.

    In the UNet's dtype and on its device; the change it makes is small but not zero.
    """
    generator = torch.Generator(device=unet.device).manual_seed(seed)
    layers: dict[str, LoraLayer] = {}
    for module, layer in sorted(unet.named_modules()):
        if module.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            outputs, inputs = layer.weight.shape
            down = torch.randn(rank, inputs, generator=generator, device=unet.device) / math.sqrt(inputs)
            up = torch.randn(outputs, rank, generator=generator, device=unet.device) * (0.01 / math.sqrt(rank))
            layers[module] = LoraLayer(down.to(unet.dtype), up.to(unet.dtype), 1.0)
    size = sum(half.numel() * half.element_size() for layer in layers.values() for half in layer[:2])
    return LoraFile(name, size, layers)


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{file}: this is not a whole safetensors file ({reason}).") from None


def _layer_of(file: Path, key: str) -> tuple[str, str]:
    """The layer's module path inside the UNet and which part of it this tensor is."""
    for ending, part in _HALVES.items():
        if key.endswith(ending):
            module = key.removesuffix(ending).removeprefix(_PEFT).removeprefix(_PREFIX)
            if module.startswith(("text_encoder", "text_model", "lora_te")):
                raise UnservedLora(f"{file}: the layer {module} is one of a text encoder; only a UNet's can be merged.")
            return (_from_kohya(module.removeprefix(_KOHYA)) if module.startswith(_KOHYA) else module), part
    if key.endswith(_DORA):
        raise UnservedLora(f"{file}: the tensor {key} is one of a DoRA, which cannot be merged here.")
    raise UnservedLora(
        f"{file}: the tensor {key} is none of a LoRA's; each must be <layer>.lora_A.weight, <layer>.lora_B.weight or "
        "<layer>.alpha with unet. or base_model.model. before it, or lora_unet_<layer> with .lora_down.weight, "
        ".lora_up.weight or .alpha."
    )


def _from_kohya(name: str) -> str:
    """`down_blocks_0_attentions_1_proj_in` or `input_blocks_2_1_proj_in` -> `down_blocks.0.attentions.1.proj_in`.

    Numbered blocks hold two layers and what resizes them, as in every public UNet; a name that is none stays as it is.
    """
    name = _ORIGINAL.get(name, name)
    if found := re.fullmatch(r"(in|out)put_blocks_(\d+)_(\d)_(.+)", name):
        side, number, part, rest = found.groups()
        block, layer = divmod(int(number) - (side == "in"), 3)
        where = f"{'down' if side == 'in' else 'up'}_blocks_{block}"
        if rest in ("op", "conv"):
            name = f"{where}_{'down' if side == 'in' else 'up'}samplers_0_conv"
        else:
            name = f"{where}_{'attentions' if int(part) else 'resnets'}_{layer}_{_ORIGINAL.get(rest, rest)}"
    elif found := re.fullmatch(r"middle_block_([012])_(.+)", name):
        where = ("resnets_0", "attentions_0", "resnets_1")[int(found[1])]
        name = f"mid_block_{where}_{_ORIGINAL.get(found[2], found[2])}"
    words: list[str] = _WORDS.findall(name)
    return ".".join(words) if "_".join(words) == name else name


def _config_of(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings as diffusers keeps them, of the UNet where the file may hold several parts, or as peft does."""
    beside = file.with_name("adapter_config.json")
    if _METADATA in metadata:
        text, where = metadata[_METADATA], f"its {_METADATA}"
    elif file.name == "adapter_model.safetensors" and beside.is_file():
        text, where = beside.read_text(encoding="utf-8", errors="replace"), beside.name
    else:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{file}: {where} is not a JSON object.")
    config = {key.removeprefix(_PREFIX): value for key, value in config.items()}
    for option in ("use_rslora", "use_dora", "lora_bias"):
        if config.get(option):
            raise UnservedLora(f"{file}: it was made with {option}, which cannot be merged here.")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", key) for key in patterns):
        raise InputError(f"{file}: the alpha_pattern of {where} must map names of layers to numbers.")
    return config


def _alpha_of(file: Path, module: str, rank: int, config: Mapping[str, Any]) -> float:
    """By peft's settings: the first entry of `alpha_pattern` that names the layer or its end, else `lora_alpha`."""
    alpha = config.get("lora_alpha", rank)
    for name, value in (config.get("alpha_pattern") or {}).items():
        if f".{module}".endswith(f".{name}"):
            alpha = value
            break
    if not finite(alpha, lambda _: True):
        raise InputError(
            f"{file}: the alpha of layer {module} in its settings must be a number, not {shown(repr(alpha))}."
        )
    return float(alpha)


def _layer(file: Path, module: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> LoraLayer:
    for part in ("down", "up"):
        if part not in parts:
            raise InputError(f"{file}: the layer {module} has no {part} matrix.")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0] if down.dim() else 0
    is_pair = rank > 0 and (
        (down.dim() == 2 and up.dim() == 2 and up.shape[1] == rank)
        or (down.dim() == 4 and up.dim() == 4 and tuple(up.shape[1:]) == (rank, 1, 1))
    )
    if not is_pair:
        raise InputError(
            f"{file}: in layer {module} a down matrix of {tuple(down.shape)} and an up matrix of {tuple(up.shape)} "
            "make no product."
        )
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise InputError(f"{file}: the alpha of layer {module} must be one number, not {parts['alpha'].numel()}.")
        alpha = float(parts["alpha"])
    else:
        alpha = _alpha_of(file, module, rank, config)
    return LoraLayer(down, up, alpha / rank)
