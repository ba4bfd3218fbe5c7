"""CUDA graphs where ControlNets take part: a step in two halves, and a ControlNet's own forward, per row count.

Residuals are added between the two replays, in place, to what the first one left. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from synerdiff.core import InputError
from synerdiff.diffusion.controlnet import ControlNet
from synerdiff.diffusion.graphs import CapturedFunction
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.rows import RowInputs
from synerdiff.diffusion.split import Encoded, Residuals, Split

T = TypeVar("T")


class GraphedSplit:
    """A `Split` that replays the graphs of exactly the rows given; the caller pads to a bucket first.

    What `encode` returns are the graph's own buffers: decode it once, and before the next `encode`.
    """

    def __init__(
        self, encoders: dict[int, CapturedFunction[Encoded]], decoders: dict[int, CapturedFunction[torch.Tensor]]
    ) -> None:
        self._encoders, self._decoders = encoders, decoders

    def __call__(self, inputs: RowInputs, fetch: Callable[[], Residuals | None]) -> torch.Tensor:
        encoded = self.encode(inputs)
        return self.decode(encoded, fetch())

    @torch.inference_mode()
    def encode(self, inputs: RowInputs) -> Encoded:
        return _graph_of(self._encoders, len(inputs.latents))(*inputs.tensors())

    @torch.inference_mode()
    def decode(self, encoded: Encoded, residuals: Residuals | None = None) -> torch.Tensor:
        if residuals is not None:
            for buffer, change in zip((*encoded.skips, encoded.hidden), residuals.tensors(), strict=True):
                buffer.add_(change)
        return _graph_of(self._decoders, len(encoded.hidden))()


def _graph_of(graphs: dict[int, CapturedFunction[T]], rows: int) -> CapturedFunction[T]:
    if rows not in graphs:
        raise InputError(f"No graph was captured for {rows} rows; captured: {sorted(graphs)}.")
    return graphs[rows]


@torch.inference_mode()
def capture_halves(
    model: DiffusionModel, buckets: Sequence[int], stream: torch.cuda.Stream, pool: Any | None = None
) -> None:
    """Capture both halves of the denoiser at each bucket and make the model use them: steps are padded to a bucket.

    Both halves share a pool (they never replay at the same time), with the whole denoiser's graphs too if given.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    eager: Split = model.split
    encoders: dict[int, CapturedFunction[Encoded]] = {}
    decoders: dict[int, CapturedFunction[torch.Tensor]] = {}
    condition = model.encode_prompt(model.prompts.default_prompt(0))
    for rows in sorted(buckets, reverse=True):
        example = model.example_rows(rows, condition).tensors()
        encoders[rows] = CapturedFunction(lambda *tensors: eager.encode(RowInputs(*tensors)), example, stream, pool)
        # The decoder reads the encoder's buffers where they are, so it has no arguments of its own.
        encoded = encoders[rows](*example)
        decoders[rows] = CapturedFunction(lambda encoded=encoded: eager.decode(encoded), (), stream, pool)
    model.split = GraphedSplit(encoders, decoders)
    model.row_buckets = tuple(sorted(buckets))


@torch.inference_mode()
def capture_controlnet(
    controlnet: ControlNet,
    model: DiffusionModel,
    row_counts: Sequence[int],
    stream: torch.cuda.Stream,
    pool: Any | None = None,
) -> None:
    """Capture the ControlNet's forward at each of `row_counts`; other counts still run eagerly."""
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    eager = controlnet.forward
    graphs: dict[int, CapturedFunction[tuple[torch.Tensor, ...]]] = {}
    for rows in sorted(row_counts, reverse=True):
        call = controlnet.example_call(model, rows)
        examples = (*call.inputs.tensors(), call.images)
        graphs[rows] = CapturedFunction(
            lambda *tensors: eager(RowInputs(*tensors[:-1]), tensors[-1]), examples, stream, pool
        )

    def forward(inputs: RowInputs, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        graph = graphs.get(len(images))
        return eager(inputs, images) if graph is None else graph(*inputs.tensors(), images)

    controlnet.forward = forward
