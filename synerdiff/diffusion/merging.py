"""LoRAs in a UNet's weights: merged in place, and taken out again to the last bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.diffusion.kernels import Float8Linear
from synerdiff.diffusion.lora import LoraFile


class MergedWeights:
    """The one place that changes a UNet's weights. Merges and restores must not overlap with a forward.

    A weight that a LoRA touches is first copied on its own device; whatever is held is then added to that copy, each
    LoRA's own product (scale * alpha / rank * up @ down), in float32, in order of their names, and rounded once to
    the weight's dtype. So nothing is ever subtracted, the order of merges does not matter, and a restored weight is
    the copy. Weights are written in place: CUDA graphs that were captured with them stay valid, and work is enqueued
    on the current stream.
    """

    def __init__(self, unet: Any) -> None:
        self._modules: dict[str, Any] = {
            name: module
            for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }
        self._originals: dict[str, torch.Tensor] = {}
        self._held: dict[str, tuple[LoraFile, float]] = {}
        self._derived = [module for module in unet.modules() if isinstance(module, Float8Linear)]
        """Hold a copy of their weight in another form."""

    @property
    def held(self) -> Mapping[str, float]:
        """Name -> scale of every LoRA in the weights, in order of their names."""
        return {name: self._held[name][1] for name in sorted(self._held)}

    def check(self, lora: LoraFile) -> None:
        """Raises InputError, naming the LoRA and the layer, when it does not fit this UNet."""
        for name, layer in lora.layers.items():
            module = self._modules.get(name)
            if module is None:
                raise InputError(f"LoRA {lora.name}: this model has no layer {name} that a LoRA can change.")
            wanted = tuple(module.weight.shape)
            changed = (layer.up.shape[0], *layer.down.shape[1:])
            # Files of SD 1.5 and SDXL write a 1x1 convolution as a matrix, or a matrix as a 1x1 convolution.
            if _without_ones(changed) != _without_ones(wanted) or getattr(module, "groups", 1) != 1:
                raise InputError(
                    f"LoRA {lora.name}: its layer {name} changes a weight of {changed}; the model's is {wanted}."
                )

    @torch.no_grad()
    def merge(self, lora: LoraFile, scale: float = 1.0) -> None:
        """Put it into the weights, at another scale if it is there already. Raises InputError before any change.

        Copies it first to the weights' device where it is not there yet.
        """
        if self._held.get(lora.name) == (lora, scale):
            return
        self.check(lora)
        before = self._held.pop(lora.name, None)
        touched = {*lora.layers, *(before[0].layers if before else ())}
        device = next(iter(self._modules.values())).weight.device
        self._held[lora.name] = (lora.to(device), scale)
        self._write(touched)

    @torch.no_grad()
    def restore(self, keep: Collection[str] = ()) -> None:
        """Take out every LoRA whose name is not in `keep`: all of them by default."""
        leaving = [name for name in self._held if name not in keep]
        touched = {module for name in leaving for module in self._held[name][0].layers}
        for name in leaving:
            del self._held[name]
        self._write(touched)

    def _write(self, modules: Collection[str]) -> None:
        try:
            for name in sorted(modules):
                self._write_one(name)
        except BaseException:
            # Out of memory, say: leave the weights as they came rather than half merged.
            self._held.clear()
            for name in list(self._originals):
                self._write_one(name)
            raise
        finally:
            for derived in self._derived:
                derived.refresh()

    def _write_one(self, module: str) -> None:
        weight = self._modules[module].weight
        changes = [self._held[name] for name in sorted(self._held) if module in self._held[name][0].layers]
        if not changes:
            original = self._originals.pop(module, None)
            if original is not None:
                weight.copy_(original)
            return
        if module not in self._originals:
            self._originals[module] = weight.detach().clone()
        total = self._originals[module].float()
        for lora, scale in changes:
            total = total + scale * lora.layers[module].product().view(weight.shape)
        weight.copy_(total)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape
