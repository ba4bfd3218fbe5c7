"""ControlNets: networks that steer a denoiser by an image, through residuals for its skip connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from synerdiff.core import InputError
from synerdiff.diffusion import SHIPPED_CONTROLNETS
from synerdiff.diffusion.architectures import WEIGHTS_SEED, empty_controlnet, fill_randomly
from synerdiff.diffusion.denoisers.unet import Residuals
from synerdiff.diffusion.rows import RowInputs, select_rows
from synerdiff.diffusion.solvers import to_device

if TYPE_CHECKING:
    from synerdiff.diffusion.model import DiffusionModel


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

    def example_call(self, model: DiffusionModel, rows: int) -> ControlCall:
        """`rows` rows of the right shapes for `model`, all alike: what a measurement of a forward needs."""
        inputs = model.example_rows(rows, model.encode_prompt(model.prompts.default_prompt(0)))
        images = torch.zeros(rows, self.channels, model.height, model.width, dtype=model.dtype, device=model.device)
        return ControlCall(self.name, tuple(range(rows)), inputs, images, (1.0,) * rows)


def load_controlnet(name_or_path: str | Path, model: DiffusionModel, name: str | None = None) -> ControlNet:
    """A ControlNet for `model`, in its dtype and on its device: `outline` (trained for `digits`), or a folder that
    diffusers saved. It answers to `name`, by default what it was asked for by (a folder: its last part).

    Raises InputError, one sentence, for a folder that cannot be read or whose residuals do not fit the model.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        shipped = SHIPPED_CONTROLNETS.get(str(name_or_path))
        if shipped is None:
            known = ", ".join(SHIPPED_CONTROLNETS)
            raise InputError(f"There is no ControlNet {name_or_path}; give a folder that diffusers saved, or {known}.")
        folder = shipped
    net = _read(folder, model.dtype).to(model.device).eval().requires_grad_(False)
    own = name or (str(name_or_path) if str(name_or_path) in SHIPPED_CONTROLNETS else folder.name)
    _check(folder, net, model)
    return ControlNet(own, net)


def random_controlnet(name: str, model: DiffusionModel, seed: int = WEIGHTS_SEED) -> ControlNet:
    """A ControlNet of the architecture that belongs to `model`'s UNet, with random weights: for timing.

    It reads images of 3 channels (`digits`: 1) in the model's resolution.
    """
    net = empty_controlnet(model.unet.config, _reduction(model), int(model.vae.config.out_channels))
    return ControlNet(name, fill_randomly(net, model.device, model.dtype, seed))


class ReadsImages(Protocol):
    """A ControlNet, or what is known of one that runs elsewhere: the channels of its images."""

    @property
    def channels(self) -> int: ...


def read_control_image(path: str | Path, folder: str | Path, controlnet: ReadsImages, model: DiffusionModel) -> Any:
    """A picture from an allowed folder, as the tensor that `ControlUse` wants. Links are followed before the check.

    Nothing is resized: InputError, one sentence, unless it has the model's resolution; colours become grey, or grey
    becomes three equal colours, as the ControlNet's channels demand.
    """
    from PIL import Image, UnidentifiedImageError

    allowed = Path(folder).resolve()
    file = (allowed / path).resolve()
    if not file.is_relative_to(allowed):
        raise InputError(f"{path}: this picture lies outside the folder of conditioning pictures, {folder}.")
    try:
        with Image.open(file) as opened:
            if opened.size != (model.width, model.height):
                raise InputError(
                    f"{file}: a conditioning picture for {model.name} has {model.height}x{model.width} pixels "
                    f"(height x width); this one has {opened.height}x{opened.width}."
                )
            picture = opened.convert("L" if controlnet.channels == 1 else "RGB")
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such conditioning picture.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{file}: this is not a picture that can be read ({error}).") from None
    levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = levels.view(1, model.height, model.width, -1).permute(0, 3, 1, 2)
    return (pixels.float() / 255).to(model.device, model.dtype)


def _read(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import ControlNetModel

    try:
        kind = ControlNetModel.load_config(str(folder)).get("_class_name")
        if kind != "ControlNetModel":
            raise InputError(f"{folder}: this is a {kind}; a ControlNetModel is needed.")
        return ControlNetModel.from_pretrained(  # type: ignore[no-untyped-call]
            str(folder), torch_dtype=dtype, use_safetensors=True
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".:")
        raise InputError(f"{folder}: the ControlNet cannot be loaded ({reason}).") from error


def _check(folder: Path, net: Any, model: DiffusionModel) -> None:
    options = ("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")
    for option in options:
        found, wanted = net.config[option], model.unet.config[option]
        found, wanted = (tuple(value) if isinstance(value, list) else value for value in (found, wanted))
        if found != wanted:
            raise InputError(
                f"{folder}: this ControlNet does not fit {model.name}: its {option} is {found}, not {wanted}."
            )
    reduction, factor = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1), _reduction(model)
    if reduction != factor:
        raise InputError(
            f"{folder}: this ControlNet does not fit {model.name}: it reduces images {reduction} times, not {factor}."
        )


def _reduction(model: DiffusionModel) -> int:
    return model.height // model.latent_shape[2]
