"""What both the profiler and the real runner execute: prepared steps, prepared chunks, and the finished picture.

On a GPU both are CUDA graphs: the denoiser's forward captured once per row bucket, and each chunk of a decode once per
lane. Graphs that share a pool must never replay at the same time, so the denoiser's and each decode lane's have a pool
of their own. Captures use `capture_error_mode="thread_local"`: another lane's thread may allocate meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from synerdiff.core import InputError
from synerdiff.device.cuda import CudaLane
from synerdiff.device.lanes import Lane
from synerdiff.diffusion.decoder import Chunking
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.rows import RowInputs
from synerdiff.diffusion.solvers import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

ChunkFunction = Callable[[torch.Tensor], torch.Tensor]
T = TypeVar("T")

WARM_UPS = 3


def prepare_steps(model: DiffusionModel, row_buckets: Sequence[int], lane: Lane) -> None:
    """From now on the model pads every step to one of `row_buckets`; unless it is eager, each becomes a CUDA graph.

    Buckets on a CPU too, although nothing is captured there: its kernels are also chosen and cached per shape, and
    both devices then follow the rule that the profile states. `lane` is the one that will run the steps.
    """
    if "compile" in model.execution.levers:
        condition = model.encode_prompt(model.prompts.default_prompt(0))
        for rows in row_buckets:
            example = model.example_rows(rows, condition)
            lane.submit(lambda example=example: _compile_forward(model, example)).result()  # type: ignore[misc]
    if captures(model):
        assert isinstance(lane, CudaLane)
        capture_denoiser(model, row_buckets, lane.stream, lane.graph_pool)
    else:
        model.row_buckets = tuple(sorted(row_buckets))


def captures(model: DiffusionModel) -> bool:
    """Whether steps and chunks become CUDA graphs."""
    return model.device.type == "cuda" and model.execution.kind != "eager"


@torch.inference_mode()
def _compile_forward(model: DiffusionModel, example: RowInputs) -> None:
    """The first forward of these rows, which compiles blocks for them. InputError, one sentence, when that fails."""
    try:
        model.denoise(example)
    except Exception as error:  # whatever a compiler raises
        raise InputError(f"the lever compile: torch cannot compile {model.name} here: {first_line(error)}.") from error


def prepare_chunks(model: DiffusionModel, chunking: Chunking, lane: Lane) -> tuple[ChunkFunction, ...]:
    """The chunks of one sample's decode for one decode lane; unless the model is eager, a GPU's are CUDA graphs."""
    if captures(model):
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


class CapturedFunction(Generic[T]):
    """A function of tensors with fixed shapes, captured; its output buffers are overwritten by the next call."""

    def __init__(
        self,
        function: Callable[..., T],
        examples: Sequence[torch.Tensor],
        stream: torch.cuda.Stream,
        pool: Any,
        chained: bool = False,
    ) -> None:
        """`chained`: the examples are themselves the buffers that it reads, those of a function captured before."""
        self._inputs = list(examples)
        if not chained:
            self._inputs = [example.clone(memory_format=torch.contiguous_format) for example in examples]
        # Warm-up on the capture stream: libraries choose their kernels and allocate workspaces outside the capture.
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*self._inputs)
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = function(*self._inputs)

    # The buffers are inference tensors, which only inference mode may write to, and a chunk's caller is not in it.
    @torch.inference_mode()
    def __call__(self, *arguments: torch.Tensor) -> T:
        """Copy the arguments into the captured buffers and replay, all on the current stream."""
        for buffer, argument in zip(self._inputs, arguments, strict=True):
            if argument is not buffer:
                buffer.copy_(argument, non_blocking=True)
        self._graph.replay()
        return self.output


class CapturedChunk:
    """A chunk that reads the buffer which the one before it, on the same lane, has written.

    What it returns is a copy, which outlives another decode's chunks in between (and, at the end, the next decode).
    Only a decode that was interrupted copies its own back.
    """

    def __init__(self, graph: CapturedFunction[torch.Tensor], before: CapturedChunk | None) -> None:
        self.graph, self._before = graph, before
        self._latest: weakref.ref[torch.Tensor] | None = None
        """The copy of what the buffer holds."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        before = self._before
        if before is not None:
            if before._latest is not None and before._latest() is hidden:
                hidden = before.graph.output
            else:
                before._latest = None
        copy = self.graph(hidden).clone()
        self._latest = weakref.ref(copy)
        return copy


class GraphedDenoiser:
    """A `Denoise` that replays the graph of exactly the rows given; the caller pads to a bucket first."""

    def __init__(self, graphs: dict[int, CapturedFunction[torch.Tensor]]) -> None:
        self._graphs = graphs

    def __call__(self, inputs: RowInputs) -> torch.Tensor:
        rows = inputs.latents.shape[0]
        if rows not in self._graphs:
            raise InputError(f"No graph was captured for {rows} rows; captured: {sorted(self._graphs)}.")
        return self._graphs[rows](*inputs.tensors())


@torch.inference_mode()
def capture_denoiser(
    model: DiffusionModel, buckets: Sequence[int], stream: torch.cuda.Stream, pool: Any | None = None
) -> None:
    """Capture the model's denoiser at each bucket and make the model use it: steps are then padded to a bucket.

    Large buckets are captured first, so that the smaller ones find their memory in the pool.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    eager, graphs = model.denoise, {}
    condition = model.encode_prompt(model.prompts.default_prompt(0))
    for rows in sorted(buckets, reverse=True):
        example = model.example_rows(rows, condition)

        def forward(*tensors: torch.Tensor) -> torch.Tensor:
            return eager(RowInputs(*tensors))

        graphs[rows] = CapturedFunction(forward, example.tensors(), stream, pool)
    model.denoise = GraphedDenoiser(graphs)
    model.row_buckets = tuple(sorted(buckets))


@torch.inference_mode()
def capture_chunks(
    model: DiffusionModel, chunking: Chunking, stream: torch.cuda.Stream, pool: Any | None = None
) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """The chunks of one sample's decode as graphs, for one decode lane (each lane captures its own).

    A chunk is captured on the buffer that the one before it writes.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    latent = torch.zeros(model.latent_shape, device=model.device)
    captured: list[CapturedChunk] = []
    for chunk in model.chunks(chunking):
        before = captured[-1] if captured else None
        example = latent if before is None else before.graph.output
        captured.append(CapturedChunk(CapturedFunction(chunk, [example], stream, pool, before is not None), before))
    return tuple(captured)
