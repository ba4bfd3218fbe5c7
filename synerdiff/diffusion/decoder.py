"""The VAE decode as atoms: the smallest consecutive layers that run apart and together equal the whole bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from synerdiff.core import InputError
from synerdiff.diffusion.chunking import WHOLE, Chunking

TensorFunction = Callable[[torch.Tensor], torch.Tensor]


class Atom(NamedTuple):
    """One indivisible part of a decode."""

    name: str
    run: TensorFunction


class Chunk:
    """Consecutive atoms of a decode: call it with the previous chunk's output (the first one with latents)."""

    __slots__ = ("atoms", "name")

    def __init__(self, name: str, atoms: tuple[Atom, ...]) -> None:
        self.name = name
        self.atoms = atoms

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        for atom in self.atoms:
            hidden = atom.run(hidden)
        return hidden


class ChunkedDecoder:
    """An AutoencoderKL's decode, cut into chunks on request.

    SD and SDXL decoders have 20 atoms, that of `digits` 13: conv_in (with the scaling and post_quant_conv before it);
    the middle's resnet, attention, resnet; each up block's resnets and, if any, its upsampler; out. Run in order they
    equal `vae.decode((latents / scaling_factor).to(vae.dtype)).sample` (`torch.equal`) for every grouping, because
    they are the same modules called with the same shapes.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.atoms = _atoms(vae)

    def chunks(self, chunking: Chunking = WHOLE) -> tuple[Chunk, ...]:
        """The chunks in order. Raises InputError when the chunking cuts beyond the last atom."""
        return tuple(
            Chunk(f"{chunking.name}.{index}", self.atoms[atoms.start : atoms.stop])
            for index, atoms in enumerate(chunking.ranges(len(self.atoms)))
        )


def _atoms(vae: Any) -> tuple[Atom, ...]:
    decoder = vae.decoder
    blocks = [type(block).__name__ for block in decoder.up_blocks]
    if set(blocks) != {"UpDecoderBlock2D"} or vae.use_tiling or vae.use_slicing:
        raise InputError(f"Only plain untiled AutoencoderKL decoders can be cut into chunks, not {', '.join(blocks)}.")
    # diffusers' `dtype` walks over all parameters, half a millisecond with the interpreter held: ask once.
    dtype: torch.dtype = vae.dtype
    scale, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)

    def conv_in(latents: torch.Tensor) -> torch.Tensor:
        # Like diffusers' pipelines; latents stay in float32 until here, whatever the weights are.
        hidden = latents / scale
        if shift:
            hidden = hidden + shift
        hidden = hidden.to(dtype)
        if vae.post_quant_conv is not None:
            hidden = vae.post_quant_conv(hidden)
        convolved: torch.Tensor = decoder.conv_in(hidden)
        return convolved

    def out(hidden: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden)))
        return image

    atoms = [Atom("conv_in", conv_in)]
    middle = decoder.mid_block
    atoms.append(Atom("mid.res0", _resnet(middle.resnets[0])))
    for index, (attention, resnet) in enumerate(zip(middle.attentions, middle.resnets[1:], strict=True)):
        if attention is not None:
            atoms.append(Atom(f"mid.attn{index}", _resnet(attention)))
        atoms.append(Atom(f"mid.res{index + 1}", _resnet(resnet)))
    for level, block in enumerate(decoder.up_blocks):
        atoms += [Atom(f"up{level}.res{index}", _resnet(resnet)) for index, resnet in enumerate(block.resnets)]
        atoms += [Atom(f"up{level}.up", upsampler) for upsampler in block.upsamplers or ()]
    atoms.append(Atom("out", out))
    return tuple(atoms)


def _resnet(module: Any) -> TensorFunction:
    """A module that takes a time embedding, which a decoder has not."""

    def run(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = module(hidden, temb=None)
        return result

    return run
