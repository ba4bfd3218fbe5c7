"""Noise-schedule state per sample, so that samples at different steps and step counts share one denoiser forward.

DDIM, Euler and DPM-Solver++ 2M are linear in the latent, the denoiser's output and the previous x0, so one table of
coefficients per step count serves them all and a batch advances in a handful of vectorised operations. Every other
diffusers scheduler runs as one copy per sample (`schedulers`). Latents and their arithmetic are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from synerdiff.core import InputError


class Progress(Protocol):
    """The schedule of one sample: a timestep per denoiser call (their number can exceed the steps asked for: Heun)."""

    @property
    def timesteps(self) -> Sequence[float]:
        """What the denoiser is told, one per call."""

    @property
    def initial_noise_scale(self) -> float:
        """Standard deviation of the latent before the first step."""


class Solver(Protocol):
    """Advances many samples at once; `progress[i]` belongs to row i of the (n, C, h, w) tensors."""

    @property
    def scheduler_name(self) -> str:
        """The class name of the diffusers scheduler that this one stands for."""

    def start(self, steps: int, generator: torch.Generator) -> Progress:
        """A fresh schedule; `generator` feeds schedulers that draw noise. Raises InputError for impossible `steps`."""

    def denoiser_inputs(
        self, progress: Sequence[Any], steps_done: Sequence[int], latents: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser reads for latents (n, C, h, w) after so many steps: the same, scaled by the schedule."""

    def advance(
        self, progress: Sequence[Any], steps_done: Sequence[int], latents: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        """The next latents (n, C, h, w) from these and the noise (or x0, or v) that the denoiser predicted."""


class Coefficients(NamedTuple):
    """One step: input = input_scale x; x0 = x0_latent x + x0_output m; next x = latent x + output m + previous x0'."""

    input_scale: float
    x0_latent: float
    x0_output: float
    latent: float
    output: float
    previous: float


@dataclass(frozen=True, slots=True)
class Table:
    """All steps of one step count, shared by the samples that have it."""

    timesteps: tuple[float, ...]
    initial_noise_scale: float
    rows: tuple[Coefficients, ...]


class LinearProgress:
    """A table, and the x0 predicted by the last step (1, C, h, w), which DPM-Solver++ 2M needs."""

    __slots__ = ("previous_x0", "table")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.previous_x0: torch.Tensor | None = None

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.table.timesteps

    @property
    def initial_noise_scale(self) -> float:
        return self.table.initial_noise_scale


class LinearSolver:
    """Vectorised DDIM, Euler and DPM-Solver++ 2M; spacing and sigmas come from the diffusers scheduler itself."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tables: dict[int, Table] = {}
        self._coefficients_of = _COEFFICIENTS[self.scheduler_name]

    @property
    def scheduler_name(self) -> str:
        return type(self._scheduler).__name__

    def start(self, steps: int, generator: torch.Generator) -> LinearProgress:
        if steps not in self._tables:
            set_timesteps(self._scheduler, steps)
            timesteps = tuple(float(t) for t in self._scheduler.timesteps)
            self._tables[steps] = Table(
                timesteps, float(self._scheduler.init_noise_sigma), tuple(self._coefficients_of(self._scheduler))
            )
        return LinearProgress(self._tables[steps])

    def denoiser_inputs(
        self, progress: Sequence[LinearProgress], steps_done: Sequence[int], latents: torch.Tensor
    ) -> torch.Tensor:
        scales = [one.table.rows[done].input_scale for one, done in zip(progress, steps_done, strict=True)]
        if all(scale == 1.0 for scale in scales):
            return latents
        return latents * to_device([scales], latents.device).view(-1, 1, 1, 1)

    def advance(
        self,
        progress: Sequence[LinearProgress],
        steps_done: Sequence[int],
        latents: torch.Tensor,
        outputs: torch.Tensor,
    ) -> torch.Tensor:
        rows = [one.table.rows[done] for one, done in zip(progress, steps_done, strict=True)]
        # One copy to the device for all coefficients: (5, n, 1, 1, 1).
        table = to_device(list(zip(*(row[1:] for row in rows), strict=True)), latents.device)[..., None, None, None]
        x0 = table[0] * latents + table[1] * outputs
        advanced = table[2] * latents + table[3] * outputs
        if any(row.previous for row in rows):
            # A first step has no previous x0 and a zero coefficient: any finite stand-in will do.
            previous = torch.cat([_or(one.previous_x0, x0[i : i + 1]) for i, one in enumerate(progress)])
            advanced = advanced + table[4] * previous
        for i, one in enumerate(progress):
            one.previous_x0 = x0[i : i + 1]
        return advanced


def _or(tensor: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise if tensor is None else tensor


def to_device(values: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    """A float32 tensor on `device`; to a GPU through pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.float32, device=device)
    return torch.tensor(values, dtype=torch.float32, pin_memory=True).to(device, non_blocking=True)


def set_timesteps(scheduler: Any, steps: int) -> None:
    """diffusers' set_timesteps. Raises InputError where the scheduler cannot make that many steps."""
    if steps < 1:
        raise InputError(f"A sample needs at least 1 step, not {steps}.")
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{type(scheduler).__name__} cannot make {steps} steps: {error}.") from error


def _x0_of(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """x0 = first x + second m, where x = alpha x0 + sigma noise and m is epsilon, x0 or v = alpha noise - sigma x0."""
    if prediction == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    return 0.0, 1.0


def _ddim(scheduler: Any) -> list[Coefficients]:
    """DDIM with eta 0, Song et al. 2021 (arXiv:2010.02502), equation 12."""
    config, steps = scheduler.config, scheduler.num_inference_steps
    rows = []
    for timestep in scheduler.timesteps.tolist():
        previous = timestep - config.num_train_timesteps // steps
        product = float(scheduler.alphas_cumprod[timestep])
        next_product = float(scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod)
        alpha, sigma = math.sqrt(product), math.sqrt(1.0 - product)
        next_alpha, next_sigma = math.sqrt(next_product), math.sqrt(1.0 - next_product)
        p, q = _x0_of(config.prediction_type, alpha, sigma)
        # noise = (x - alpha x0) / sigma, written out so that epsilon prediction suffers no cancellation.
        if config.prediction_type == "epsilon":
            noise_latent, noise_output = 0.0, 1.0
        elif config.prediction_type == "v_prediction":
            noise_latent, noise_output = sigma, alpha
        else:
            noise_latent, noise_output = 1.0 / sigma, -alpha / sigma
        rows.append(
            Coefficients(
                1.0, p, q, next_alpha * p + next_sigma * noise_latent, next_alpha * q + next_sigma * noise_output, 0.0
            )
        )
    return rows


def _euler(scheduler: Any) -> list[Coefficients]:
    """Euler without churn, Karras et al. 2022 (arXiv:2206.00364), algorithm 1; x = x0 + sigma noise."""
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    rows = []
    for sigma, after in pairwise(sigmas):
        root = math.sqrt(sigma * sigma + 1.0)
        if scheduler.config.prediction_type == "epsilon":
            p, q, derivative_latent, derivative_output = 1.0, -sigma, 0.0, 1.0
        else:  # v_prediction on the scaled input x / root
            p, q = 1.0 / (root * root), -sigma / root
            derivative_latent, derivative_output = sigma / (root * root), 1.0 / root
        step = after - sigma
        rows.append(Coefficients(1.0 / root, p, q, 1.0 + step * derivative_latent, step * derivative_output, 0.0))
    return rows


def _dpm_solver(scheduler: Any) -> list[Coefficients]:
    """DPM-Solver++ 2M, Lu et al. 2022 (arXiv:2211.01095), algorithm 2, as diffusers orders its steps."""
    config, sigmas = scheduler.config, [float(sigma) for sigma in scheduler.sigmas]
    count = len(scheduler.timesteps)
    rows: list[Coefficients] = []
    for index in range(count):
        alpha, sigma = _alpha_sigma(sigmas[index])
        next_alpha, next_sigma = _alpha_sigma(sigmas[index + 1])
        p, q = _x0_of(config.prediction_type, alpha, sigma)
        ratio = next_sigma / sigma
        # expm1(-h) with h = lambda_next - lambda; h is infinite at the last step when the last sigma is 0.
        h = math.inf if next_sigma == 0.0 else math.log(next_alpha / next_sigma) - math.log(alpha / sigma)
        weight = -next_alpha * math.expm1(-h)  # of x0
        current = previous = 0.0
        last = index == count - 1
        first_order_last = last and (
            config.euler_at_final or (config.lower_order_final and count < 15) or config.final_sigmas_type == "zero"
        )
        if config.solver_order == 2 and index > 0 and not first_order_last:
            before_alpha, before_sigma = _alpha_sigma(sigmas[index - 1])
            h_before = math.log(alpha / sigma) - math.log(before_alpha / before_sigma)
            if config.solver_type == "midpoint":
                bend = 0.5 * weight
            else:
                bend = next_alpha * (math.expm1(-h) / h + 1.0)
            current, previous = bend * h / h_before, -bend * h / h_before
        x0 = weight + current
        rows.append(Coefficients(1.0, p, q, ratio + x0 * p, x0 * q, previous))
    return rows


def _alpha_sigma(sigma: float) -> tuple[float, float]:
    """From x = x0 + sigma noise to the variance-preserving x = alpha x0 + sigma' noise."""
    alpha = 1.0 / math.sqrt(sigma * sigma + 1.0)
    return alpha, sigma * alpha


_COEFFICIENTS = {"DDIMScheduler": _ddim, "EulerDiscreteScheduler": _euler, "DPMSolverMultistepScheduler": _dpm_solver}


def is_linear(scheduler: Any) -> bool:
    """Whether the table reproduces this scheduler with these options (no clipping, thresholding or drawn noise)."""
    config = scheduler.config
    kind = type(scheduler).__name__
    prediction = getattr(config, "prediction_type", None)
    if kind == "DDIMScheduler":
        known = ("epsilon", "v_prediction", "sample")
        return prediction in known and not config.clip_sample and not config.thresholding
    if kind == "EulerDiscreteScheduler":
        return prediction in ("epsilon", "v_prediction") and config.timestep_type == "discrete"
    if kind == "DPMSolverMultistepScheduler":
        return (
            prediction in ("epsilon", "v_prediction", "sample")
            and config.algorithm_type == "dpmsolver++"
            and config.solver_order in (1, 2)
            and config.variance_type not in ("learned", "learned_range")
            and not config.thresholding
            and not config.use_flow_sigmas
        )
    return False
