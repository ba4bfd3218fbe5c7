"""Noise-schedule state per sample, so that samples at different steps and step counts share one denoiser forward.

DDIM, DDPM, TCD, LCM, Euler (ancestral and flow matching too) and DPM-Solver++ 2M are linear in the latent, the
denoiser's output, the previous x0 and the noise that a step adds, so one table of coefficients per step count serves
them all and a batch advances in a handful of vectorised operations. Every other diffusers scheduler runs as one copy
per sample (`schedulers`). Latents and their arithmetic are float32.
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

    def start(self, steps: int, generator: torch.Generator, latent: torch.Tensor | None = None) -> Progress:
        """A fresh schedule. Raises InputError for impossible `steps`.

        `generator`, on the CPU, feeds schedulers that draw noise; `latent` (1, C, h, w) has the shape and the device of
        that noise (None: the schedule is only looked at, and no noise is drawn).
        """

    def denoiser_inputs(
        self, progress: Sequence[Any], steps_done: Sequence[int], latents: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser reads for latents (n, C, h, w) after so many steps: the same, scaled by the schedule."""

    def advance(
        self, progress: Sequence[Any], steps_done: Sequence[int], latents: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        """The next latents (n, C, h, w) from these and the noise (or x0, or v) that the denoiser predicted."""


class Coefficients(NamedTuple):
    """One step: input = input_scale x; x0 = x0_latent x + x0_output m.

    Next x = latent x + output m + previous x0' + noise z, where m is the denoiser's output, x0' the x0 of the step
    before and z fresh unit normal noise.
    """

    input_scale: float
    x0_latent: float
    x0_output: float
    latent: float
    output: float
    previous: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Table:
    """All steps of one step count, shared by the samples that have it."""

    timesteps: tuple[float, ...]
    initial_noise_scale: float
    rows: tuple[Coefficients, ...]


class LinearProgress:
    """A table, the x0 predicted by the last step (1, C, h, w), which DPM-Solver++ 2M needs, and the noise to come.

    `noise`: (draws, C, h, w), one for each step that adds some; drawn at the start, so that no step waits for a copy
    and a step that is repeated adds the same.
    """

    __slots__ = ("noise", "previous_x0", "table")

    def __init__(self, table: Table, noise: torch.Tensor | None) -> None:
        self.table = table
        self.noise = noise
        self.previous_x0: torch.Tensor | None = None

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.table.timesteps

    @property
    def initial_noise_scale(self) -> float:
        return self.table.initial_noise_scale


class LinearSolver:
    """The vectorised schedulers; spacing and sigmas come from the diffusers scheduler itself."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tables: dict[int, Table] = {}
        self._coefficients_of = _COEFFICIENTS[self.scheduler_name]

    @property
    def scheduler_name(self) -> str:
        return type(self._scheduler).__name__

    def start(self, steps: int, generator: torch.Generator, latent: torch.Tensor | None = None) -> LinearProgress:
        if steps not in self._tables:
            self._tables[steps] = self._table(steps)
        table = self._tables[steps]
        draws = sum(adds_noise(table.rows, step) for step in range(len(table.rows)))
        noise = None
        if draws and latent is not None:
            # One by one, as diffusers draws them.
            each = [torch.randn(latent.shape, generator=generator) for _ in range(draws)]
            noise = _to_device(torch.cat(each), latent.device)
        return LinearProgress(table, noise)

    def _table(self, steps: int) -> Table:
        scheduler = self._scheduler
        set_timesteps(scheduler, steps)
        try:
            rows = tuple(self._coefficients_of(scheduler))
        except (ArithmeticError, ValueError):
            rows = ()
        if not all(math.isfinite(number) for row in rows for number in row) or not rows:
            raise InputError(
                f"{self.scheduler_name} with this model's options cannot make {steps} steps: "
                "one of them has no length, or starts from noise alone."
            )
        timesteps = tuple(float(t) for t in scheduler.timesteps)
        return Table(timesteps, float(getattr(scheduler, "init_noise_sigma", 1.0)), rows)

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
        # One copy to the device for all coefficients: (6, n, 1, 1, 1).
        table = to_device(list(zip(*(row[1:] for row in rows), strict=True)), latents.device)[..., None, None, None]
        x0 = table[0] * latents + table[1] * outputs
        advanced = table[2] * latents + table[3] * outputs
        if any(row.previous for row in rows):
            # A first step has no previous x0 and a zero coefficient: any finite stand-in will do.
            previous = torch.cat([_or(one.previous_x0, x0[i : i + 1]) for i, one in enumerate(progress)])
            advanced = advanced + table[4] * previous
        if any(row.noise for row in rows):
            # A sample whose step adds none has a zero coefficient.
            noise = [
                _noise(one, done, x0[i : i + 1]) for i, (one, done) in enumerate(zip(progress, steps_done, strict=True))
            ]
            advanced = advanced + table[5] * torch.cat(noise)
        for i, one in enumerate(progress):
            one.previous_x0 = x0[i : i + 1]
        return advanced


def _or(tensor: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise if tensor is None else tensor


def adds_noise(rows: Sequence[Coefficients], step: int) -> bool:
    """Whether this step draws noise: those of a stochastic scheduler do, but for a last one that has no use for it."""
    return any(row.noise for row in rows) and (step < len(rows) - 1 or rows[step].noise != 0.0)


def _noise(progress: LinearProgress, step: int, otherwise: torch.Tensor) -> torch.Tensor:
    if progress.noise is None or step >= len(progress.noise):
        return otherwise
    return progress.noise[step : step + 1]


def to_device(values: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    """A float32 tensor on `device`; to a GPU through pinned memory, so that the host does not wait."""
    return _to_device(torch.tensor(values, dtype=torch.float32), device)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def set_timesteps(scheduler: Any, steps: int) -> None:
    """diffusers' set_timesteps. Raises InputError where the scheduler cannot make that many steps."""
    if steps < 1:
        raise InputError(f"A sample needs at least 1 step, not {steps}.")
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:  # whatever diffusers raises for options that do not go together
        raise InputError(f"{type(scheduler).__name__} cannot make {steps} steps: {first_line(error)}.") from error


def first_line(error: Exception) -> str:
    """What an error says, on one line and without a full stop; its kind where it says little."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".: ")
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


def _x0_of(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """x0 = first x + second m, where x = alpha x0 + sigma noise and m is epsilon, x0 or v = alpha noise - sigma x0."""
    if prediction == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    return 0.0, 1.0


def _noise_of(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """noise = first x + second m, written out so that epsilon prediction suffers no cancellation."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return sigma, alpha
    return 1.0 / sigma, -alpha / sigma


def _roots(product: float) -> tuple[float, float]:
    """alpha and sigma of x = alpha x0 + sigma noise from the cumulative product alpha^2."""
    return math.sqrt(product), math.sqrt(1.0 - product)


def _products(scheduler: Any) -> list[tuple[int, float, float]]:
    """By step: its timestep, and the cumulative products alpha^2 before and after it."""
    kind, count = type(scheduler).__name__, len(scheduler.timesteps)
    timesteps, products = scheduler.timesteps.tolist(), scheduler.alphas_cumprod
    rows = []
    for index, timestep in enumerate(timesteps):
        if kind == "DDIMScheduler":
            after = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        elif index + 1 < count:
            after = timesteps[index + 1]
        else:
            after = {"TCDScheduler": 0, "LCMScheduler": timestep}.get(kind, -1)
        final = 1.0 if kind == "DDPMScheduler" else scheduler.final_alpha_cumprod
        rows.append((timestep, float(products[timestep]), float(products[after] if after >= 0 else final)))
    return rows


def _ddim(scheduler: Any) -> list[Coefficients]:
    """DDIM with eta 0, Song et al. 2021 (arXiv:2010.02502), equation 12.

    Trajectory consistency distillation, Zheng et al. 2024 (arXiv:2402.19159), with the pipelines' eta 0 is the same
    step over timesteps of its own.
    """
    rows, prediction = [], scheduler.config.prediction_type
    for _, product, next_product in _products(scheduler):
        (alpha, sigma), (next_alpha, next_sigma) = _roots(product), _roots(next_product)
        p, q = _x0_of(prediction, alpha, sigma)
        noise_latent, noise_output = _noise_of(prediction, alpha, sigma)
        latent, output = next_alpha * p + next_sigma * noise_latent, next_alpha * q + next_sigma * noise_output
        rows.append(Coefficients(1.0, p, q, latent, output))
    return rows


def _ddpm(scheduler: Any) -> list[Coefficients]:
    """DDPM, Ho et al. 2020 (arXiv:2006.11239), equation 7, with the variance of its section 3.2."""
    rows, config = [], scheduler.config
    for timestep, product, next_product in _products(scheduler):
        p, q = _x0_of(config.prediction_type, *_roots(product))
        beta = 1.0 - product / next_product
        x0 = math.sqrt(next_product) * beta / (1.0 - product)
        latent = math.sqrt(product / next_product) * (1.0 - next_product) / (1.0 - product)
        variance = (
            beta if config.variance_type == "fixed_large" else max((1.0 - next_product) / (1.0 - product) * beta, 1e-20)
        )
        noise = math.sqrt(variance) if timestep > 0 else 0.0
        rows.append(Coefficients(1.0, p, q, x0 * p + latent, x0 * q, noise=noise))
    return rows


def _lcm(scheduler: Any) -> list[Coefficients]:
    """Multistep consistency sampling, Luo et al. 2023 (arXiv:2310.04378), algorithm 3 and section 3."""
    rows, products = [], _products(scheduler)
    for index, (timestep, product, next_product) in enumerate(products):
        p, q = _x0_of(scheduler.config.prediction_type, *_roots(product))
        skip, out = (float(scale) for scale in scheduler.get_scalings_for_boundary_condition_discrete(timestep))
        next_alpha, next_sigma = _roots(next_product) if index + 1 < len(products) else (1.0, 0.0)
        rows.append(Coefficients(1.0, p, q, next_alpha * (out * p + skip), next_alpha * out * q, noise=next_sigma))
    return rows


def _euler(scheduler: Any) -> list[Coefficients]:
    """Euler without churn, Karras et al. 2022 (arXiv:2206.00364), algorithm 1; x = x0 + sigma noise.

    The ancestral one steps further down, to `down`, and adds noise up to the next sigma (k-diffusion).
    """
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    rows = []
    for sigma, after in pairwise(sigmas):
        root = math.sqrt(sigma * sigma + 1.0)
        if scheduler.config.prediction_type == "epsilon":
            p, q, derivative_latent, derivative_output = 1.0, -sigma, 0.0, 1.0
        else:  # v_prediction on the scaled input x / root
            p, q = 1.0 / (root * root), -sigma / root
            derivative_latent, derivative_output = sigma / (root * root), 1.0 / root
        ancestral = type(scheduler).__name__ == "EulerAncestralDiscreteScheduler"
        up = after * math.sqrt(1.0 - (after / sigma) ** 2) if ancestral else 0.0
        down = after * after / sigma if ancestral else after
        step = down - sigma
        latent, output = 1.0 + step * derivative_latent, step * derivative_output
        rows.append(Coefficients(1.0 / root, p, q, latent, output, noise=up))
    return rows


def _flow_match(scheduler: Any) -> list[Coefficients]:
    """Euler along rectified flow, Esser et al. 2024 (arXiv:2403.03206), section 2: x = (1 - sigma) x0 + sigma noise."""
    rows = []
    for sigma, after in pairwise(float(sigma) for sigma in scheduler.sigmas):
        if scheduler.config.stochastic_sampling:
            rows.append(Coefficients(1.0, 1.0, -sigma, 1.0 - after, (after - 1.0) * sigma, noise=after))
        else:
            rows.append(Coefficients(1.0, 1.0, -sigma, 1.0, after - sigma))
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


_COEFFICIENTS = {
    "DDIMScheduler": _ddim,
    "TCDScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "LCMScheduler": _lcm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow_match,
    "DPMSolverMultistepScheduler": _dpm_solver,
}


LEAST_ALPHA = 1e-5
"""Share of the image in the noisiest latent below which float32 loses the digits in which two orders of the same
arithmetic agree (SD and SDXL: 0.0047; a schedule without a last signal: 0): the scheduler's own order is kept."""


def is_linear(scheduler: Any) -> bool:
    """Whether the table reproduces this scheduler with these options (no clipping and no thresholding)."""
    config = scheduler.config
    kind = type(scheduler).__name__
    prediction = getattr(config, "prediction_type", None)
    if kind == "FlowMatchEulerDiscreteScheduler":
        return True
    if kind not in _COEFFICIENTS or prediction not in ("epsilon", "v_prediction", "sample"):
        return False
    least = float(scheduler.alphas_cumprod.min())
    if least < LEAST_ALPHA and (least or prediction != "epsilon"):  # noise says nothing of an image without a share
        return False
    if kind.startswith("Euler"):
        return prediction != "sample" and getattr(config, "timestep_type", "discrete") == "discrete"
    if kind == "DPMSolverMultistepScheduler":
        return (
            config.algorithm_type == "dpmsolver++"
            and config.solver_order in (1, 2)
            and config.variance_type not in ("learned", "learned_range")
            and not config.thresholding
            and not config.use_flow_sigmas
        )
    variance = getattr(config, "variance_type", "fixed_small")
    return (
        not config.clip_sample
        and not config.thresholding
        and variance in ("fixed_small", "fixed_small_log", "fixed_large")
    )
