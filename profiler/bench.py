"""A model on a device with its two lanes, ready to be measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from profiler.sampling import FULL_CPU, FULL_GPU, QUICK, Rule
from profiler.settings import Settings
from synerdiff.device import open_device
from synerdiff.device.lanes import Device, Lane, available_cores
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.stages import prepare_steps


@dataclass(frozen=True, slots=True)
class Bench:
    """Steps are prepared for the settings' row buckets. ``rule``: how often to sample."""

    model: DiffusionModel
    device: Device
    denoise: Lane
    decode: Lane
    rule: Rule

    @property
    def on_gpu(self) -> bool:
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
        with open_device(device) as lanes:
            cores = (None, None) if on_gpu else lane_cores()
            denoise = lanes.lane("denoise", high_priority=True, core=cores[0])
            decode = lanes.lane("decode0", core=cores[1])
            prepare_steps(model, settings.rows, denoise)
            yield Bench(model, lanes, denoise, decode, QUICK if settings.quick else FULL_GPU if on_gpu else FULL_CPU)
    finally:
        torch.set_num_threads(threads)


def lane_cores() -> tuple[int, int]:
    """The first core for the denoise lane and the next for the decode lane; one core alone serves both."""
    cores = available_cores()
    return cores[0], cores[1 if len(cores) > 1 else 0]
