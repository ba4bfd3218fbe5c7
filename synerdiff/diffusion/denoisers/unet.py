"""UNets: a forward as a whole, and in two halves between which ControlNet residuals arrive.

The halves are the encoder with the mid block, then the decoder, which residuals steer. Between them a worker may wait
for a ControlNet that runs elsewhere, and each can be timed alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.diffusion.architectures import require_kinds
from synerdiff.diffusion.rows import RowInputs, runs_of
from synerdiff.files import finite


class EagerDenoiser:
    """The UNet called as it is; the default `Denoise`."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def __call__(self, inputs: RowInputs) -> torch.Tensor:
        added = None if inputs.pooled is None else {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
        output: torch.Tensor = self.unet(
            inputs.latents, inputs.timesteps, inputs.tokens, added_cond_kwargs=added, return_dict=False
        )[0]
        return output


@dataclass(frozen=True, slots=True)
class Residuals:
    """What ControlNets add to R rows: `down` to the skip connections, in the encoder's order, and `mid` to its end."""

    down: tuple[torch.Tensor, ...]
    mid: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, down then mid: (R, channels, height, width) each."""
        return (*self.down, self.mid)

    def named(self) -> dict[str, torch.Tensor]:
        """A message's tensors, for `from_named`."""
        return {str(number): tensor for number, tensor in enumerate(self.tensors())}

    @classmethod
    def from_named(cls, tensors: Mapping[str, torch.Tensor]) -> Residuals:
        """From what `named` gave."""
        all_of_them = tuple(tensors[str(number)] for number in range(len(tensors)))
        return cls(all_of_them[:-1], all_of_them[-1])

    @property
    def size_bytes(self) -> int:
        """What a message carries."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the decoder reads of R rows: the mid block's output, skip connections, time embedding and tokens."""

    hidden: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    embedding: torch.Tensor
    tokens: torch.Tensor


class SplitDenoiser:
    """A UNet2DConditionModel's forward, in halves: the same modules in the same order with the same shapes.

    So the result equals the forward with `down_block_additional_residuals` and `mid_block_additional_residual` to the
    last bit. Other UNets than those that are conditioned on text alone raise InputError when they are called.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self._by_text_alone = (
            unet.mid_block is not None
            and not unet.config.center_input_sample
            and getattr(unet.config, "addition_embed_type", None) in (None, "text_time")
        )

    def __call__(self, inputs: RowInputs, fetch: Callable[[], Residuals | None]) -> torch.Tensor:
        """Encoder and mid block, then `fetch()`, then the decoder: predicted noise (R, C, h, w)."""
        encoded = self.encode(inputs)
        return self.decode(encoded, fetch())

    @torch.inference_mode()
    def encode(self, inputs: RowInputs) -> Encoded:
        """The encoder and the mid block over R rows."""
        if not self._by_text_alone:
            raise InputError("Only UNets with a mid block that are conditioned on text alone can be split.")
        unet, tokens = self.unet, inputs.tokens
        added = None if inputs.pooled is None else {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
        times = unet.get_time_embed(sample=inputs.latents, timestep=inputs.timesteps)
        embedding = unet.time_embedding(times, None)
        more = unet.get_aug_embed(emb=embedding, encoder_hidden_states=tokens, added_cond_kwargs=added)
        if more is not None:
            embedding = embedding + more
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        tokens = unet.process_encoder_hidden_states(encoder_hidden_states=tokens, added_cond_kwargs=added)
        hidden = unet.conv_in(inputs.latents)
        skips = (hidden,)
        for block in unet.down_blocks:
            hidden, own = block(hidden_states=hidden, temb=embedding, **_attended(block, tokens))
            skips += own
        hidden = unet.mid_block(hidden, embedding, **_attended(unet.mid_block, tokens))
        return Encoded(hidden, skips, embedding, tokens)

    @torch.inference_mode()
    def decode(self, encoded: Encoded, residuals: Residuals | None = None) -> torch.Tensor:
        """The decoder: predicted noise (R, C, h, w), with the residuals added where there are some."""
        unet = self.unet
        if residuals is not None:
            encoded = add_residuals(encoded, residuals)
        hidden, skips = encoded.hidden, encoded.skips
        for block in unet.up_blocks:
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            hidden = block(
                hidden_states=hidden,
                temb=encoded.embedding,
                res_hidden_states_tuple=own,
                **_attended(block, encoded.tokens),
            )
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        output: torch.Tensor = unet.conv_out(hidden)
        return output


def add_residuals(encoded: Encoded, residuals: Residuals) -> Encoded:
    """The skip connections and the mid block's output with what ControlNets add to them."""
    return replace(
        encoded,
        hidden=encoded.hidden + residuals.mid,
        skips=tuple(skip + change for skip, change in zip(encoded.skips, residuals.down, strict=True)),
    )


def sum_residuals(total_rows: int, parts: Sequence[tuple[Sequence[int], Residuals]]) -> Residuals:
    """Residuals of all `total_rows` rows from those of some ((rows, residuals), ...), added in the order given.

    Rows that no ControlNet steers get zeros. At least one part.
    """
    first = parts[0][1]
    if len(parts) == 1 and list(parts[0][0]) == list(range(total_rows)):
        return first
    sums = tuple(tensor.new_zeros((total_rows, *tensor.shape[1:])) for tensor in first.tensors())
    for rows, residuals in parts:
        for total, change in zip(sums, residuals.tensors(), strict=True):
            done = 0
            for run in runs_of(rows):
                count = run.stop - run.start
                total[run] += change[done : done + count]
                done += count
    return Residuals(sums[:-1], sums[-1])


def _attended(block: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}


_FED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "UNet": {
        "time_cond_proj_dim": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "attention_type": ("default",),
    },
    "VAE": {"latents_mean": (None,), "latents_std": (None,), "shift_factor": (None, 0)},
}
"""Options that ask for more than a text-to-image step feeds -> the values with which they do not.

All other options of the two classes are served by the class's own forward.
"""


def require_fed(name: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """InputError unless a text-to-image step feeds everything that the networks of these configurations read.

    Without this check an input that is left out gives other images than the pipeline's, and no error. An option that
    the installed diffusers does not know would be left out too.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for part, network, config in (("UNet", UNet2DConditionModel, unet), ("VAE", AutoencoderKL, vae)):
        require_kinds(f"{name}: its {part}", network, config)
        known = inspect.signature(network).parameters
        for option, value in config.items():
            if option.startswith("_"):
                continue
            if option not in known and value not in (None, False):
                raise InputError(
                    f"{name}: its {part} has the option {option}, which diffusers does not know; not served."
                )
            if value not in _FED[part].get(option, (value,)):
                raise InputError(f"{name}: its {part} has {option} {value}, an input that is not fed; not served.")
    scale = vae.get("scaling_factor", 1.0)
    if not finite(scale, lambda factor: factor > 0):
        raise InputError(f"{name}: its VAE has scaling_factor {scale}; a number above 0 is needed.")
    width = unet.get("cross_attention_dim", 1280)
    if not isinstance(width, int):
        raise InputError(f"{name}: its UNet has cross_attention_dim {width}; one number is needed.")
    reads, writes, latent = (
        int(config.get(option, 4))
        for config, option in ((unet, "in_channels"), (unet, "out_channels"), (vae, "latent_channels"))
    )
    if reads != latent:
        raise InputError(
            f"{name}: its UNet reads {reads} channels; a text-to-image model's reads as many as its VAE has, {latent} "
            "(inpainting, pix2pix and upscaling models are not served)."
        )
    if writes != latent:
        raise InputError(f"{name}: its UNet predicts {writes} channels for {latent} of its VAE; not served.")
