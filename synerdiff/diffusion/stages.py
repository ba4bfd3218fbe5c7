"""What both the profiler and the real runner execute: prepared steps, prepared chunks, and the finished picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from synerdiff.device.lanes import Lane
from synerdiff.diffusion.chunking import Chunking
from synerdiff.diffusion.model import DiffusionModel

if TYPE_CHECKING:
    from PIL.Image import Image

ChunkFunction = Callable[[torch.Tensor], torch.Tensor]


def prepare_steps(model: DiffusionModel, row_buckets: Sequence[int], lane: Lane) -> None:
    """From now on the model pads every step to one of `row_buckets`; on a GPU each bucket becomes a CUDA graph.

    Buckets on a CPU too, although nothing is captured there: its kernels are also chosen and cached per shape, and
    both devices then follow the rule that the profile states. `lane` is the one that will run the steps.
    """
    if model.device.type == "cuda":
        from synerdiff.device.cuda import CudaLane
        from synerdiff.diffusion.graphs import capture_denoiser

        assert isinstance(lane, CudaLane)
        capture_denoiser(model, row_buckets, lane.stream, lane.graph_pool)
    else:
        model.row_buckets = tuple(sorted(row_buckets))


def prepare_split_steps(model: DiffusionModel, row_buckets: Sequence[int], lane: Lane) -> None:
    """As `prepare_steps`, for steps in two halves (`model.split`): on a GPU two CUDA graphs per bucket, on `lane`."""
    if model.device.type == "cuda":
        from synerdiff.device.cuda import CudaLane
        from synerdiff.diffusion.split_graphs import capture_halves

        assert isinstance(lane, CudaLane)
        capture_halves(model, row_buckets, lane.stream, lane.graph_pool)
    else:
        model.row_buckets = tuple(sorted(row_buckets))


def prepare_chunks(model: DiffusionModel, chunking: Chunking, lane: Lane) -> tuple[ChunkFunction, ...]:
    """The chunks of one sample's decode for one decode lane; on a GPU each is a CUDA graph of that lane."""
    if model.device.type == "cuda":
        from synerdiff.device.cuda import CudaLane
        from synerdiff.diffusion.graphs import capture_chunks

        assert isinstance(lane, CudaLane)
        return capture_chunks(model, chunking, lane.stream, lane.graph_pool)
    return model.chunks(chunking)


def finished_picture(image: torch.Tensor) -> Image:
    """A decode's result (1, 1 or 3 channels, height, width), about [-1, 1], as an 8-bit picture on the host.

    Waits for the device. What happens between the last chunk's end and a finished image.
    """
    from PIL import Image as images

    levels = (image[0].float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = levels.permute(1, 2, 0).cpu().numpy()
    return images.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
