"""From what the decoder returns to pixels on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Pixels(NamedTuple):
    """An image on the host: uint8 (height, width, channels), and whether every value of it was finite."""

    values: torch.Tensor
    finite: bool


@torch.inference_mode()
def finite_flag(tensor: torch.Tensor) -> torch.Tensor:
    """A bool (1,) on the host: whether all values are finite; valid once what is enqueued so far has ended."""
    return _to_host(tensor.isfinite().all()[None])


@torch.inference_mode()
def to_pixels(decoded: torch.Tensor) -> Pixels:
    """The decode (1, channels, height, width), about [-1, 1], as diffusers turns it into 8 bits; waits for the copy.

    On a GPU this runs on the current stream, which is then waited for: give it a stream of its own.
    """
    finite = finite_flag(decoded)
    scaled = (decoded[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    values = _to_host(scaled.to(torch.uint8).permute(1, 2, 0).contiguous())
    if decoded.device.type == "cuda":
        torch.cuda.current_stream(decoded.device).synchronize()
    return Pixels(values, bool(finite))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host; from a GPU into pinned memory, so that the host does not wait for it."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
