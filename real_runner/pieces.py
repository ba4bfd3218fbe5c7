"""What one piece of work on a lane does: the model layer's step or chunk, its retry, and the check of what came out.

A piece runs on a lane's thread (or is launched into its stream) and keeps what it found for the engine, which looks
once the piece has ended. What a piece does is what the profiler measures: ``DiffusionModel.step`` and the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from real_runner.account import is_out_of_memory, one_line
from synerdiff.core import Mode, Sample
from synerdiff.diffusion.model import DiffusionModel, SampleState
from synerdiff.diffusion.solvers import LinearProgress
from synerdiff.diffusion.stages import finished_picture

if TYPE_CHECKING:
    import PIL.Image


class Image:
    """A sample's own data: its state before the decode, the decoder's activations during it."""

    __slots__ = ("failure", "hidden", "sample", "state")

    def __init__(self, sample: Sample, state: SampleState) -> None:
        self.sample = sample
        self.state = state
        self.hidden: torch.Tensor | None = None
        self.failure = ""
        """Why the sample fails; pieces leave it out from then on."""


class StepPiece:
    """One denoiser step. Without memory it is halved down to one sample, tried twice; one that raises fails alone."""

    def __init__(self, model: DiffusionModel, images: Sequence[Image], modes: Sequence[Mode], pad_rows: int) -> None:
        self.model, self.images, self.modes, self.pad_rows = model, images, modes, pad_rows
        self.out_of_memory = ""
        """What the first attempt said when memory ran out."""
        self.fitted_rows = 0
        """The most rows that fitted after memory ran out; 0: none did."""
        self.forward_began: Callable[[], int] | None = None
        """When the denoiser's own forward began, in ns on the monotonic clock, where something went before it."""
        self._flags: list[tuple[Image, torch.Tensor]] = []

    def run(self) -> None:
        """On the lane."""
        batch = [(image, mode) for image, mode in zip(self.images, self.modes, strict=True) if not image.failure]
        self._step(batch, self.pad_rows)
        for image, _ in batch:
            if image.state.done and not image.failure:
                self._flags.append((image, finite_flag(image.state.latent)))

    def check(self) -> None:
        """Once the piece has ended: finished latents that are not finite fail."""
        for image, flag in self._flags:
            if not bool(flag):
                image.failure = "its latent is not finite"

    def advance(self, batch: list[tuple[Image, Mode]], pad_rows: int) -> None:
        """All samples of the batch by one step; none of them when it raises."""
        self.model.step([image.state for image, _ in batch], [mode for _, mode in batch], pad_rows)

    def _step(self, batch: list[tuple[Image, Mode]], pad_rows: int, is_retry: bool = False) -> None:
        if not batch:
            return
        try:
            self.advance(batch, pad_rows)
            if is_retry:
                self.fitted_rows = max(self.fitted_rows, self.model.rows([mode for _, mode in batch], pad_rows))
            return
        except Exception as raised:  # whatever it is, it concerns these samples and not the run
            # The traceback would keep the failed attempt's tensors alive during the retry.
            error = raised.with_traceback(None)
        no_memory = is_out_of_memory(error)
        # A scheduler copied per sample may have moved before the error, so its step cannot be repeated.
        repeatable = all(isinstance(image.state.progress, LinearProgress) for image, _ in batch)
        if no_memory and repeatable and (len(batch) > 1 or not is_retry):
            self.out_of_memory = self.out_of_memory or one_line(error)
            free_memory(self.model.device)
            middle = (len(batch) + 1) // 2
            for half in (batch[:middle], batch[middle:]):
                self._step(half, 0, is_retry=True)
        elif not no_memory and len(batch) > 1 and repeatable:
            for one in batch:
                self._step([one], 0, is_retry)
        else:
            for image, _ in batch:
                image.failure = one_line(error)


class ChunkPiece:
    """One chunk of one sample's decode; retried once when memory ran out."""

    def __init__(
        self, image: Image, chunk: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, device: torch.device
    ) -> None:
        self.image, self._chunk, self._hidden, self._device = image, chunk, hidden, device
        self.out_of_memory = ""

    def run(self) -> None:
        """On the lane."""
        error = self._attempt()
        if error is not None and is_out_of_memory(error):
            self.out_of_memory = one_line(error)
            free_memory(self._device)
            error = self._attempt()
        if error is not None:
            self.image.failure = one_line(error)

    def _attempt(self) -> Exception | None:
        try:
            self.image.hidden = self._chunk(self._hidden)
        except Exception as error:  # as above
            return error.with_traceback(None)
        return None


class Picture(NamedTuple):
    """A finished image on the host, and whether every value that the decoder gave was finite."""

    image: PIL.Image.Image
    finite: bool


@torch.inference_mode()
def picture_of(decoded: torch.Tensor) -> Picture:
    """Runs on the lane ``results`` and waits for its copy."""
    return Picture(finished_picture(decoded), bool(decoded.isfinite().all()))


@torch.inference_mode()
def finite_flag(tensor: torch.Tensor) -> torch.Tensor:
    """A bool (1,) on the host: whether all values are finite; valid once the piece that asks has ended."""
    flag = tensor.isfinite().all()[None]
    if tensor.device.type != "cuda":
        return flag
    # Into pinned memory, so that the launching thread does not wait.
    return torch.empty(1, dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)


def free_memory(device: torch.device) -> None:
    """Give cached blocks back, so that a retry finds one of the size that it needs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
