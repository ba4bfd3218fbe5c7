"""The VAE decode as atoms, and where it is cut into chunks: names, cuts, and the choice of cuts from measured times.

Atoms are the smallest consecutive layers that run apart and together equal the whole bit for bit. Light to import:
plans of a measurement and profiles name chunkings where nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from synerdiff.core import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Chunking:
    """A decode cut into `len(cuts) + 1` chunks; a cut is the index of the atom that starts the next chunk.

    Raises InputError when the cuts do not rise strictly from at least 1.
    """

    name: str
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounds = (0, *self.cuts)
        if any(left >= right for left, right in pairwise(bounds)):
            raise InputError(f"The cuts of chunking {self.name} must rise strictly from at least 1, not {self.cuts}.")

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def ranges(self, atoms: int) -> tuple[range, ...]:
        """The atoms of each chunk of a decoder with `atoms` atoms. Raises InputError when a cut lies beyond them."""
        if self.cuts and self.cuts[-1] >= atoms:
            raise InputError(f"Chunking {self.name} cuts at atom {self.cuts[-1]}, but the decoder has only {atoms}.")
        bounds = (0, *self.cuts, atoms)
        return tuple(range(left, right) for left, right in pairwise(bounds))


WHOLE = Chunking("whole")


def choose_cuts(atom_times_ns: Sequence[int], chunks: int) -> Chunking:
    """Cut into `chunks` chunks so that the largest takes as little time as any cutting allows (exact).

    The classical linear partition by dynamic programming: best[k][i] = min over j of max(best[k-1][j], time of
    atoms j..i-1). Ties take the earliest cut. The result is named `whole` for one chunk, else `c4`, `c8`, ...
    Raises InputError when `chunks` is not between 1 and the number of atoms.
    """
    atoms = len(atom_times_ns)
    if not 1 <= chunks <= atoms:
        raise InputError(f"A decoder of {atoms} atoms can be cut into 1 to {atoms} chunks, not {chunks}.")
    if chunks == 1:
        return WHOLE
    before = [0]
    for time_ns in atom_times_ns:
        before.append(before[-1] + time_ns)
    best = list(before)
    start_of: list[list[int]] = []
    for k in range(2, chunks + 1):
        longest, starts = [0] * (atoms + 1), [0] * (atoms + 1)
        for end in range(k, atoms + 1):
            longest[end], starts[end] = min(
                (max(best[start], before[end] - before[start]), start) for start in range(k - 1, end)
            )
        best = longest
        start_of.append(starts)
    cuts, end = [], atoms
    for starts in reversed(start_of):
        end = starts[end]
        cuts.append(end)
    return Chunking(f"c{chunks}", tuple(reversed(cuts)))


TensorFunction = Callable[["torch.Tensor"], "torch.Tensor"]


class DecodeAtom(NamedTuple):
    """One indivisible part of a decode."""

    name: str
    run: TensorFunction


class Chunk:
    """Consecutive atoms of a decode: call it with the previous chunk's output (the first one with latents).

    Latents are float32 (n, C, h, w); what lies between chunks is (n, channels, height, width) of the VAE's dtype.
    """

    __slots__ = ("atoms", "name")

    def __init__(self, name: str, atoms: tuple[DecodeAtom, ...]) -> None:
        self.name = name
        self.atoms = atoms

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
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


def _atoms(vae: Any) -> tuple[DecodeAtom, ...]:
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

    atoms = [DecodeAtom("conv_in", conv_in)]
    middle = decoder.mid_block
    atoms.append(DecodeAtom("mid.res0", _resnet(middle.resnets[0])))
    for index, (attention, resnet) in enumerate(zip(middle.attentions, middle.resnets[1:], strict=True)):
        if attention is not None:
            atoms.append(DecodeAtom(f"mid.attn{index}", _resnet(attention)))
        atoms.append(DecodeAtom(f"mid.res{index + 1}", _resnet(resnet)))
    for level, block in enumerate(decoder.up_blocks):
        atoms += [DecodeAtom(f"up{level}.res{index}", _resnet(resnet)) for index, resnet in enumerate(block.resnets)]
        atoms += [DecodeAtom(f"up{level}.up", upsampler) for upsampler in block.upsamplers or ()]
    atoms.append(DecodeAtom("out", out))
    return tuple(atoms)


def _resnet(module: Any) -> TensorFunction:
    """A module that takes a time embedding, which a decoder has not."""

    def run(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = module(hidden, temb=None)
        return result

    return run
