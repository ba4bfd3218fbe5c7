"""The pieces that are measured: a denoiser step of so many rows, and the chunks of one decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.stages import ChunkFunction

SAMPLE_STEPS = 50
GUIDANCE = 7.5
UNGUIDED = 1.0


class StepPiece:
    """``DiffusionModel.step`` of ``rows`` rows, all that the runner executes as one step.

    That is: scaling the latents, assembling (and padding) the rows, the denoiser, guidance, the scheduler's update.
    The batch is made of guided samples, two rows each, and one unguided sample when the rows are odd; with
    ``guided=False`` of as many unguided samples as rows.
    """

    def __init__(self, model: DiffusionModel, rows: int, guided: bool = True) -> None:
        pairs = rows // 2 if guided else 0
        self._model = model
        self._guidance = [GUIDANCE] * pairs + [UNGUIDED] * (rows - 2 * pairs)
        self._conditions = [
            model.encode_prompt(model.prompts.default_prompt(seed)) for seed in range(len(self._guidance))
        ]
        self._steps_left = 0

    def again(self) -> Callable[[], object]:
        if self._steps_left == 0:
            self._states = [
                self._model.start(seed, SAMPLE_STEPS, guidance, condition=condition)
                for seed, (guidance, condition) in enumerate(zip(self._guidance, self._conditions, strict=True))
            ]
            # Heun and PNDM call the denoiser more often than they are asked for.
            self._steps_left = self._states[0].steps
        self._steps_left -= 1
        model, states = self._model, self._states
        return lambda: model.step(states)


class ChunkPiece:
    """One chunk, always on the same input (what the chunk before it made). Its output is dropped."""

    def __init__(self, function: ChunkFunction, hidden: torch.Tensor) -> None:
        self._function, self._hidden = function, hidden

    def again(self) -> Callable[[], object]:
        return self._run

    def _run(self) -> None:
        self._function(self._hidden)


class LinkedChunk:
    """A chunk of a decode that goes on from what the chunk before it has just made, as in a real decode."""

    def __init__(self, function: ChunkFunction, hidden: list[torch.Tensor], first: torch.Tensor | None) -> None:
        self._function, self._hidden, self._first = function, hidden, first

    def again(self) -> Callable[[], object]:
        return self._run

    def _run(self) -> None:
        self._hidden[0] = self._function(self._hidden[0] if self._first is None else self._first)


def linked(functions: Sequence[ChunkFunction], latent: torch.Tensor) -> list[LinkedChunk]:
    """The chunks of one decode, to be run in order on one lane."""
    hidden = [latent]
    return [LinkedChunk(function, hidden, None if index else latent) for index, function in enumerate(functions)]
