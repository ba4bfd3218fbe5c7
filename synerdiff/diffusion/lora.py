"""LoRA files: low-rank changes of a UNet's weights, read from safetensors only and only from an allowed folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from synerdiff.core import InputError
from synerdiff.files import atomic

_PREFIX = "unet."
_HALVES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
"""How diffusers writes the two matrices of a layer: peft's names, and those of its older versions."""
_METADATA = "lora_adapter_metadata"


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
    """Read a LoRA for a UNet as diffusers saves it (`save_lora_adapter`, `save_lora_weights`) into host memory.

    `path`: inside `folder`, absolute or relative to it; links are followed before that is checked. Only safetensors,
    which hold no code. alpha comes from the file's `alpha` keys, else from its metadata, else it is the rank.
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
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
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
    for ending, part in _HALVES.items():
        if key.endswith(ending):
            module = key.removesuffix(ending).removeprefix(_PREFIX)
            if module.startswith("text_encoder"):
                raise InputError(f"{file}: the layer {module} is one of a text encoder; only a UNet's can be merged.")
            return module, part
    raise InputError(
        f"{file}: the tensor {key} is none of those that diffusers writes; each must be "
        "unet.<layer>.lora_A.weight, unet.<layer>.lora_B.weight or unet.<layer>.alpha."
    )


def _config_of(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings as diffusers keeps them: of the UNet where the file may hold several parts."""
    if _METADATA not in metadata:
        return {}
    try:
        config = json.loads(metadata[_METADATA])
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{file}: its {_METADATA} is not a JSON object.")
    config = {key.removeprefix(_PREFIX): value for key, value in config.items()}
    for option in ("use_rslora", "use_dora", "lora_bias", "alpha_pattern"):
        if config.get(option):
            raise InputError(f"{file}: it was made with {option}, which cannot be merged here.")
    return config


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
        alpha = config.get("lora_alpha", rank)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise InputError(f"{file}: the lora_alpha of its {_METADATA} must be a number, not {alpha!r}.")
    return LoraLayer(down, up, float(alpha) / rank)
