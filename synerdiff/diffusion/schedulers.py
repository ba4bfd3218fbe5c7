"""diffusers schedulers by name, and any of them as a solver: exact with one copy per sample, which advances alone."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.diffusion import SCHEDULERS
from synerdiff.diffusion.solvers import LinearSolver, Solver, is_linear, set_timesteps


def make_scheduler(class_name: str, config: Any) -> Any:
    """A diffusers scheduler by class name. Raises InputError when diffusers has none of that name."""
    import diffusers

    scheduler_class = getattr(diffusers, class_name, None)
    if not class_name.endswith("Scheduler") or not hasattr(scheduler_class, "from_config"):
        raise InputError(f"There is no scheduler {class_name}; use {', '.join(SCHEDULERS)} or a diffusers class name.")
    # Options of another scheduler's configuration that this one does not know are no news to the user.
    logger = logging.getLogger("diffusers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return scheduler_class.from_config(config)  # type: ignore[union-attr]
    finally:
        logger.setLevel(level)


class CopiedProgress:
    """One sample's own scheduler and, for schedulers that draw noise, its generator."""

    __slots__ = ("generator", "scheduler", "timesteps")

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self.scheduler = scheduler
        self.generator = generator
        self.timesteps = tuple(float(t) for t in scheduler.timesteps)

    @property
    def initial_noise_scale(self) -> float:
        return float(self.scheduler.init_noise_sigma)


class CopiedSolver:
    """One shallow copy of the prototype per sample.

    Attributes that are lists (the history of a multistep method) are listed anew, because a shallow copy shares them
    and a scheduler appends in place; tensors are replaced by schedulers, never written in place.
    """

    def __init__(self, scheduler: Any) -> None:
        self._prototype = scheduler
        self._draws = "generator" in inspect.signature(scheduler.step).parameters

    @property
    def scheduler_name(self) -> str:
        return type(self._prototype).__name__

    def start(self, steps: int, generator: torch.Generator) -> CopiedProgress:
        own = copy.copy(self._prototype)
        for name, value in vars(own).items():
            if isinstance(value, list):
                setattr(own, name, list(value))
        set_timesteps(own, steps)
        return CopiedProgress(own, generator)

    def denoiser_inputs(
        self, progress: Sequence[CopiedProgress], steps_done: Sequence[int], latents: torch.Tensor
    ) -> torch.Tensor:
        return torch.cat(
            [
                one.scheduler.scale_model_input(latents[i : i + 1], one.scheduler.timesteps[done])
                for i, (one, done) in enumerate(zip(progress, steps_done, strict=True))
            ]
        )

    def advance(
        self,
        progress: Sequence[CopiedProgress],
        steps_done: Sequence[int],
        latents: torch.Tensor,
        outputs: torch.Tensor,
    ) -> torch.Tensor:
        advanced = []
        for i, (one, done) in enumerate(zip(progress, steps_done, strict=True)):
            options = {"generator": one.generator} if self._draws else {}
            timestep = one.scheduler.timesteps[done]
            result = one.scheduler.step(outputs[i : i + 1], timestep, latents[i : i + 1], return_dict=False, **options)
            advanced.append(result[0])
        return torch.cat(advanced)


def make_solver(scheduler: Any) -> Solver:
    """The vectorised solver where it reproduces the scheduler, else one copy per sample."""
    return LinearSolver(scheduler) if is_linear(scheduler) else CopiedSolver(scheduler)
