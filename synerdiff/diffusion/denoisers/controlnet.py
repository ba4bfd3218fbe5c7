"""ControlNets beside a UNet: which rows of a step each one steers, and its forward, which gives the residuals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from synerdiff.core import InputError
from synerdiff.diffusion.denoisers.unet import Residuals
from synerdiff.diffusion.rows import RowInputs, select_rows
from synerdiff.diffusion.solvers import to_device


@dataclass(frozen=True, slots=True, eq=False)
class ControlUse:
    """One sample's use of a ControlNet. `image`: (1, channels, height, width) in [0, 1], in the model's dtype."""

    name: str
    image: torch.Tensor
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class ControlCall:
    """One forward of one ControlNet: the rows of a step that use it, with an image and a scale each.

    `rows`: which rows of the step these are. All that a service needs, and all of it tensors and numbers.
    """

    name: str
    rows: tuple[int, ...]
    inputs: RowInputs
    images: torch.Tensor
    scales: tuple[float, ...]


class _Steered(Protocol):
    @property
    def controls(self) -> tuple[ControlUse, ...]: ...


def control_calls(
    states: Sequence[_Steered], rows_of_state: Callable[[int], Sequence[int]], inputs: RowInputs
) -> list[ControlCall]:
    """The ControlNet forwards that a step needs, in order of the names; empty when no sample uses one.

    Conditional and unconditional rows are both steered, as in diffusers. A sample that names a ControlNet twice (with
    two images) gets a second call of it. The order is the one in which `sum_residuals` adds them.
    """
    uses: dict[tuple[str, int], list[tuple[int, ControlUse]]] = {}
    for position, state in enumerate(states):
        times: Counter[str] = Counter()
        for use in state.controls:
            uses.setdefault((use.name, times[use.name]), []).extend((row, use) for row in rows_of_state(position))
            times[use.name] += 1
    calls = []
    for name, nth in sorted(uses):
        chosen = sorted(uses[name, nth], key=lambda pair: pair[0])
        rows = tuple(row for row, _ in chosen)
        images = torch.cat([use.image for _, use in chosen])
        calls.append(ControlCall(name, rows, select_rows(inputs, rows), images, tuple(use.scale for _, use in chosen)))
    return calls


class ControlNet:
    """A diffusers ControlNetModel by name; several may serve one step."""

    def __init__(self, name: str, net: Any) -> None:
        if net.config.global_pool_conditions or net.config.controlnet_conditioning_channel_order != "rgb":
            raise InputError(f"ControlNet {name} pools its residuals or reads BGR images, which is not supported.")
        self.name = name
        self.net = net
        self.channels = int(net.config.conditioning_channels)
        """Of the images that it reads."""

    @property
    def size_bytes(self) -> int:
        """Of its weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.net.parameters())

    @torch.inference_mode()
    def residuals(self, call: ControlCall) -> Residuals:
        """One forward: residuals of the call's rows, each multiplied by its own conditioning scale.

        Equal to diffusers' forward with that `conditioning_scale`, in half precision too: the product is rounded once.
        """
        tensors = self._forward(call.inputs, call.images)
        scales = to_device([call.scales], call.images.device).view(-1, 1, 1, 1)
        scaled = [(one * scales).to(one.dtype) for one in tensors]
        return Residuals(tuple(scaled[:-1]), scaled[-1])

    def _forward(self, inputs: RowInputs, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Unscaled residuals, down then mid."""
        added = None if inputs.pooled is None else {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
        down, mid = self.net(
            inputs.latents, inputs.timesteps, inputs.tokens, images, added_cond_kwargs=added, return_dict=False
        )
        return (*down, mid)
