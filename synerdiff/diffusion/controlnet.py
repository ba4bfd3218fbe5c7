"""ControlNets for a model: read from a folder, or random for timing; and the pictures that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from synerdiff.core import InputError
from synerdiff.diffusion import SHIPPED_CONTROLNETS
from synerdiff.diffusion.architectures import WEIGHTS_SEED, empty_controlnet, fill_randomly, require_kinds, whole
from synerdiff.diffusion.denoisers.controlnet import ControlCall, ControlNet
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.solvers import first_line


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


def example_call(controlnet: ControlNet, model: DiffusionModel, rows: int) -> ControlCall:
    """`rows` rows of the right shapes for `model`, all alike: what a measurement of a forward needs."""
    inputs = model.example_rows(rows, model.encode_prompt(model.prompts.default_prompt(0)))
    images = torch.zeros(rows, controlnet.channels, model.height, model.width, dtype=model.dtype, device=model.device)
    return ControlCall(controlnet.name, tuple(range(rows)), inputs, images, (1.0,) * rows)


class ReadsImages(Protocol):
    """A ControlNet, or what is known of one that runs elsewhere: the channels of its images."""

    @property
    def channels(self) -> int:
        """1 for grey pictures, 3 for colours."""


def read_control_image(path: str | Path, folder: str | Path, controlnet: ReadsImages, model: DiffusionModel) -> Any:
    """A picture from an allowed folder, as the tensor that `ControlUse` wants. Links are followed before the check.

    Nothing is resized: InputError, one sentence, unless it has the model's resolution; colours become grey, or grey
    becomes three equal colours, as the ControlNet's channels demand.
    """
    from PIL import Image

    allowed = Path(folder).resolve()
    file = (allowed / path).resolve()
    if not file.is_relative_to(allowed):
        raise InputError(f"{path}: this picture lies outside the folder of conditioning pictures, {folder}.")
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: this is no file; a conditioning picture is needed.")
    try:
        with Image.open(file) as opened:
            if opened.size != (model.width, model.height):
                raise InputError(
                    f"{file}: a conditioning picture for {model.name} has {model.height}x{model.width} pixels "
                    f"(height x width); this one has {opened.height}x{opened.width}."
                )
            if opened.mode.partition(";")[0] in ("I", "F"):  # PIL would cut their values off at 255
                raise InputError(f"{file}: this picture has values of more than 8 bits; save it with 8 bits a channel.")
            picture = opened.convert("L" if controlnet.channels == 1 else "RGB")
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such conditioning picture.") from None
    except InputError:
        raise
    except Exception as error:  # each format's decoder has its own
        raise InputError(f"{file}: this is not a picture that can be read ({first_line(error)}).") from None
    levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = levels.view(1, model.height, model.width, -1).permute(0, 3, 1, 2)
    return (pixels.float() / 255).to(model.device, model.dtype)


def _read(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import ControlNetModel

    try:
        config: Any = ControlNetModel.load_config(str(folder))
        require_kinds(f"{folder}: this ControlNet", ControlNetModel, config)
        kind = config.get("_class_name")
        if kind != "ControlNetModel":
            raise InputError(f"{folder}: this is a {kind}; a ControlNetModel is needed.")
        loaded = ControlNetModel.from_pretrained(  # type: ignore[no-untyped-call]
            str(folder), torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        return whole(str(folder), loaded)
    except InputError:
        raise
    except Exception as error:  # whatever a wrong configuration or file makes the libraries raise
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".:")
        raise InputError(f"{folder}: the ControlNet cannot be loaded ({reason}).") from error


def _check(folder: Path, net: Any, model: DiffusionModel) -> None:
    options = ("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")
    for option in options:
        own, wanted = net.config[option], model.unet.config[option]
        own, wanted = (tuple(value) if isinstance(value, list) else value for value in (own, wanted))
        if own != wanted:
            raise InputError(
                f"{folder}: this ControlNet does not fit {model.name}: its {option} is {own}, not {wanted}."
            )
    reduction, factor = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1), _reduction(model)
    if reduction != factor:
        raise InputError(
            f"{folder}: this ControlNet does not fit {model.name}: it reduces images {reduction} times, not {factor}."
        )


def _reduction(model: DiffusionModel) -> int:
    return model.height // model.latent_shape[2]
