"""GroupNorm, with SiLU where that follows, over channels-last memory: on a GPU three Triton kernels, else torch's.

torch's CUDA GroupNorm first copies a channels-last input into contiguous memory. Here the reduction is split over
positions, so that one image fills a GPU: (1) each program takes mean and squared deviations of a block of channels over
a part of the positions (Chan, Golub and LeVeque 1983: parts are combined without cancellation); (2) one program a group
combines the parts into scale and shift of each channel; (3) all elements are scaled, shifted and activated. The input
is read twice, the output written once.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from triton.language import constexpr

tl: Any = None
"""triton.language, once `_kernels` has been called."""
PROGRAMS = 512
"""About so many programs take the moments: four for each multiprocessor of an H100."""
MOST_SPLITS = 256


def _moments(x, parts, positions, channels, length, BLOCK_N: constexpr, BLOCK_C: constexpr):  # type: ignore[no-untyped-def]
    image, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = split * length
    last = tl.minimum(first + length, positions)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = (position[:, None] < last) & (channel[None, :] < channels)
        row = image.to(tl.int64) * positions + position
        values = tl.load(x + row[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        taken = (tl.minimum(start + BLOCK_N, last) - start).to(tl.float32)
        own = tl.sum(values, 0) / taken
        centred = tl.where(inside, values - own[None, :], 0.0)
        delta, total = own - mean, count + taken
        mean += delta * taken / total
        squares += tl.sum(centred * centred, 0) + delta * delta * count * taken / total
        count = total
    at = (image * splits + split) * 2 * channels + channel
    tl.store(parts + at, mean, mask=channel < channels)
    tl.store(parts + at + channels, squares, mask=channel < channels)


def _affine(  # type: ignore[no-untyped-def]
    parts, weight, bias, affine, positions, channels, length, splits, size, eps, BLOCK_S: constexpr, BLOCK_G: constexpr
):
    image, group = tl.program_id(0), tl.program_id(1)
    own = tl.arange(0, BLOCK_G)
    channel = group * size + own
    sums = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        inside = (split[:, None] < splits) & (own[None, :] < size)
        at = (image * splits + split[:, None]) * 2 * channels + channel[None, :]
        taken = (tl.minimum((split + 1) * length, positions) - split * length).to(tl.float32)
        sums += tl.load(parts + at, mask=inside, other=0.0) * tl.where(inside, taken[:, None], 0.0)
    mean = tl.sum(tl.sum(sums, 1), 0) / (positions * size)
    sums = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        inside = (split[:, None] < splits) & (own[None, :] < size)
        at = (image * splits + split[:, None]) * 2 * channels + channel[None, :]
        taken = (tl.minimum((split + 1) * length, positions) - split * length).to(tl.float32)
        away = tl.load(parts + at, mask=inside, other=0.0) - mean
        sums += tl.load(parts + at + channels, mask=inside, other=0.0)
        sums += tl.where(inside, taken[:, None], 0.0) * away * away
    variance = tl.sum(tl.sum(sums, 1), 0) / (positions * size)
    known = own < size
    scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32) - mean * scale
    tl.store(affine + image * 2 * channels + channel, scale, mask=known)
    tl.store(affine + (image * 2 + 1) * channels + channel, shift, mask=known)


def _scaled(  # type: ignore[no-untyped-def]
    x, affine, out, positions, channels, SILU: constexpr, BLOCK_N: constexpr, BLOCK_C: constexpr
):
    image = tl.program_id(0)
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    scale = tl.load(affine + image * 2 * channels + channel, mask=known, other=0.0)
    shift = tl.load(affine + (image * 2 + 1) * channels + channel, mask=known, other=0.0)
    inside = (position[:, None] < positions) & known[None, :]
    row = image.to(tl.int64) * positions + position
    at = row[:, None] * channels + channel[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@cache
def _kernels() -> tuple[Any, Any, Any]:
    """The three functions above as kernels; TRITON_INTERPRET=1, set before the first call, interprets them on a CPU."""
    import triton
    import triton.language

    # A kernel's names, those of its signature too, are looked up in its module; triton itself is only there on a GPU.
    globals().update(tl=triton.language, constexpr=triton.language.constexpr)
    return triton.jit(_moments), triton.jit(_affine), triton.jit(_scaled)


def launch_group_norm(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """Contiguous (images, positions, channels) -> the same, normalised over positions and channels of each group."""
    moments, affine_of, scaled = _kernels()
    images, positions, channels = rows.shape
    block_c = min(64, _power_of_2(channels))
    block_n = 4096 // block_c if positions >= 4096 // block_c else _power_of_2(positions)
    blocks = -(-channels // block_c)
    splits = max(1, min(MOST_SPLITS, PROGRAMS // (images * blocks), -(-positions // block_n)))
    length = -(-positions // splits)
    splits = -(-positions // length)
    parts = rows.new_empty((images, splits, 2, channels), dtype=torch.float32)
    affine, out = rows.new_empty((images, 2, channels), dtype=torch.float32), torch.empty_like(rows)
    moments[(images, splits, blocks)](rows, parts, positions, channels, length, BLOCK_N=block_n, BLOCK_C=block_c)
    size = channels // groups
    affine_of[(images, groups)](
        parts,
        weight,
        bias,
        affine,
        positions,
        channels,
        length,
        splits,
        size,
        eps,
        BLOCK_S=16,
        BLOCK_G=_power_of_2(size),
    )
    grid = (images, -(-positions // block_n), blocks)
    scaled[grid](rows, affine, out, positions, channels, SILU=silu, BLOCK_N=block_n, BLOCK_C=block_c)
    return out


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


# An operation of its own: torch's compiler takes it as it is instead of tracing into the launches.
_group_norm = torch.library.custom_op("synerdiff::group_norm", launch_group_norm, mutates_args=())
_group_norm.register_fake(lambda rows, weight, bias, groups, eps, silu: torch.empty_like(rows))


class ChannelsLastGroupNorm(torch.nn.Module):
    """A GroupNorm, by its own weights, that leaves channels-last memory; with `silu` also what follows it."""

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, channels, ...) -> the same shape."""
        if hidden.device.type != "cuda":
            normed = functional.group_norm(hidden, self.num_groups, self.weight, self.bias, self.eps)
            return functional.silu(normed) if self.silu else normed
        rows = hidden.flatten(2).transpose(1, 2).contiguous()
        of_rows: torch.Tensor = _group_norm(rows, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        return of_rows.transpose(1, 2).reshape(hidden.shape)
