"""diffusers schedulers by name, and any of them as a solver: exact with one copy per sample, which advances alone."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.diffusion import SCHEDULERS
from synerdiff.diffusion.architectures import require_kinds
from synerdiff.diffusion.solvers import LinearSolver, Solver, first_line, is_linear, set_timesteps
from synerdiff.files import shown

MOST_TRAINED_STEPS = 100_000
"""Of a schedule, whose tables have an entry for each; models are trained with 1,000."""
PROBE_STEPS = 4


def make_scheduler(class_name: str, config: Any) -> Any:
    """A diffusers scheduler by class name. Raises InputError when it does not exist or cannot be made."""
    import diffusers

    # Options of another scheduler's configuration that this one does not know are no news to the user.
    logger = logging.getLogger("diffusers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        scheduler_class = getattr(diffusers, class_name, None)
        if not class_name.endswith("Scheduler") or not hasattr(scheduler_class, "from_config"):
            known = ", ".join(SCHEDULERS)
            raise InputError(f"There is no scheduler {class_name}; use {known} or a diffusers class name.")
        require_kinds(f"The scheduler {class_name}", scheduler_class, config)
        taught = config.get("num_train_timesteps", 1)
        if type(taught) is not int or not 1 <= taught <= MOST_TRAINED_STEPS:
            raise InputError(
                f"The scheduler {class_name} has num_train_timesteps {shown(repr(taught))}; a whole number from 1 to "
                f"{MOST_TRAINED_STEPS:,} is needed."
            )
        return scheduler_class.from_config(config)  # type: ignore[union-attr]
    except InputError:
        raise
    except ImportError as error:
        # diffusers stands in for a class whose library is missing, and says so at its first use.
        missing = re.search(r"requires the (\S+) library", str(error))
        library = missing[1] if missing else first_line(error)
        raise InputError(f"The scheduler {class_name} needs the library {library}, which is not installed.") from error
    except Exception as error:  # whatever options that do not go together raise
        raise InputError(f"The scheduler {class_name} cannot be made of the model's: {first_line(error)}.") from error
    finally:
        logger.setLevel(level)


def require_runs(name: str, solver: Solver, shape: tuple[int, ...]) -> None:
    """InputError, naming model and scheduler, unless it takes a latent of that shape through a few steps.

    Half of diffusers' schedulers are made for other pipelines and fail in a way of their own.
    """
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(shape, generator=generator)
    try:
        progress = solver.start(PROBE_STEPS, generator, latent)
        latent = latent * progress.initial_noise_scale
        for step in range(len(progress.timesteps)):
            inputs = solver.denoiser_inputs([progress], [step], latent)
            latent = solver.advance([progress], [step], latent, torch.zeros_like(inputs))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"{name} cannot run with the scheduler {solver.scheduler_name}: {reason}; try ddim."
        ) from error


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
    and a scheduler appends in place; tensors are replaced by schedulers, never written in place. A scheduler with a
    noise source of its own (DPMSolverSDE) gets the sample's seed, so that a seed's image is the same in every batch.
    """

    def __init__(self, scheduler: Any) -> None:
        self._prototype = scheduler
        step = getattr(scheduler, "step", None)  # a few have none: `require_runs` says so
        self._takes = frozenset(inspect.signature(step).parameters if step else ())

    @property
    def scheduler_name(self) -> str:
        return type(self._prototype).__name__

    def start(self, steps: int, generator: torch.Generator, latent: torch.Tensor | None = None) -> CopiedProgress:
        own = copy.copy(self._prototype)
        for name, value in vars(own).items():
            if isinstance(value, list):
                setattr(own, name, list(value))
        if hasattr(own, "noise_sampler_seed"):
            own.noise_sampler_seed = generator.initial_seed()
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
        # They may be a view of a graph's buffer, which the next replay overwrites and a history keeps.
        outputs = outputs.clone()
        advanced = []
        for i, (one, done) in enumerate(zip(progress, steps_done, strict=True)):
            # As the pipelines call it: eta 0, whatever the scheduler's own default is (TCD: 0.3).
            options = {"generator": one.generator, "eta": 0.0}
            options = {name: value for name, value in options.items() if name in self._takes}
            timestep = one.scheduler.timesteps[done]
            try:
                result = one.scheduler.step(
                    outputs[i : i + 1], timestep, latents[i : i + 1], return_dict=False, **options
                )
            except (IndexError, ValueError, ZeroDivisionError) as error:  # some take no step of some lengths
                raise InputError(
                    f"{self.scheduler_name} with this model's options cannot make {len(one.timesteps)} steps: "
                    f"{first_line(error)}."
                ) from error
            advanced.append(result[0])
        return torch.cat(advanced)


def make_solver(scheduler: Any) -> Solver:
    """The vectorised solver where it reproduces the scheduler, else one copy per sample."""
    return LinearSolver(scheduler) if is_linear(scheduler) else CopiedSolver(scheduler)
