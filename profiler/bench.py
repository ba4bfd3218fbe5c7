"""A model on a device with its two lanes, and the pieces of its work that are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from profiler.sampling import FULL_CPU, FULL_GPU, QUICK, Rule
from profiler.settings import Settings
from synerdiff.device import open_device
from synerdiff.device.lanes import Device, Lane, available_cores
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.kernels import apply_execution
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.stages import ChunkFunction, captures, prepare_steps


@dataclass(frozen=True, slots=True)
class Bench:
    """Steps are prepared for the settings' row buckets. ``rule``: how often to sample.

    ``others``: the model at further resolutions.
    """

    model: DiffusionModel
    device: Device
    denoise: Lane
    decode: Lane
    rule: Rule
    others: tuple[DiffusionModel, ...] = ()

    @property
    def faces(self) -> tuple[Bench, ...]:
        """A bench of each resolution, the first one first."""
        return (self, *(replace(self, model=model, others=()) for model in self.others))

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.torch_device.type == "cuda"

    def latent(self) -> torch.Tensor:
        """Something to decode: how it looks changes no time."""
        return self.model.start(0, 2).latent


@contextmanager
def open_bench(settings: Settings, device: torch.device) -> Iterator[Bench]:
    """Load the model, open and close the lanes. Raises InputError as ``load_model`` does."""
    on_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    if not on_gpu:
        # The lanes have one intra-op thread each; a pool of more for this thread would disturb both.
        torch.set_num_threads(1)
    try:
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        model = load_model(settings.model, device, dtype, settings.resolution)
        if settings.execution is not None:
            apply_execution(model, settings.execution)
        others = tuple([model.at(size) for size in settings.others])
        with open_device(device) as lanes:
            cores = (None, None) if on_gpu else lane_cores()
            own_thread = on_gpu and not captures(model)
            denoise = lanes.lane("denoise", high_priority=True, core=cores[0], launch_thread=own_thread)
            decode = lanes.lane("decode0", core=cores[1], launch_thread=own_thread)
            # The largest first, so that the smaller ones find their memory in the lane's pool.
            for one in sorted((model, *others), key=lambda one: -one.height * one.width):
                prepare_steps(one, settings.rows, denoise)
            rule = QUICK if settings.quick else FULL_GPU if on_gpu else FULL_CPU
            yield Bench(model, lanes, denoise, decode, rule, others)
    finally:
        torch.set_num_threads(threads)


def lane_cores() -> tuple[int, int]:
    """The first core for the denoise lane and the next for the decode lane; one core alone serves both."""
    cores = available_cores()
    return cores[0], cores[1 if len(cores) > 1 else 0]


Again = Callable[[], Callable[[], object]]
"""What gives a piece of work to run once more; called by the thread that submits it."""
SAMPLE_STEPS = 50
GUIDANCE = 7.5
UNGUIDED = 1.0


class TimedStep:
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
        """What to run for one more step."""
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


def timed_chunk(function: ChunkFunction, hidden: torch.Tensor) -> Again:
    """One chunk, always on the same input (what the chunk before it made). Its output is dropped."""

    def run() -> None:
        function(hidden)

    return lambda: run


def linked(functions: Sequence[ChunkFunction], latent: torch.Tensor) -> list[Again]:
    """The chunks of one decode, to be run in order on one lane, each on what the one before has just made."""
    hidden = [latent]

    def run(index: int, function: ChunkFunction) -> None:
        hidden[0] = function(hidden[0] if index else latent)

    return [partial(partial, run, *pair) for pair in enumerate(functions)]
