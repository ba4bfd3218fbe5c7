"""How much guidance matters in each step, from one pass with full guidance; and which steps to skip, given how many.

The noise of a guided step is eps_c + (w - 1) d with d = eps_c - eps_u. Reusing an older difference d' instead puts an
error (w - 1)(d' - d) into it, which the solver, being linear in the noise, puts into the latent with a known factor.
From there to the end an error keeps its size when latents are scaled to unit variance: exactly so for data that are
themselves of unit variance and Gaussian, which latents are scaled to resemble. A run of skips costs the mean square
of the sum of its errors; runs add up. (1 - SSIM is quadratic in small errors.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from synerdiff.diffusion import SCHEDULERS
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.solvers import Coefficients, LinearProgress, LinearSolver
from synerdiff.fidelity.sampling import Sampler, Subject

OLDEST = 4
"""Reuse errors are kept for a difference up to this many steps old."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Means over the calibration's images; arrays by step."""

    timesteps: numpy.ndarray[Any, Any]
    x0_similarity: numpy.ndarray[Any, Any]
    """Cosine of the x0 that the conditional and the unconditional row predict."""
    drop_error: numpy.ndarray[Any, Any]
    """RMS of what dropping guidance changes in the predicted x0: |Q| (w - 1) |d|, in latent units."""
    reuse_error: numpy.ndarray[Any, Any]
    """(steps, 4): the same when the difference is 1 to 4 steps old; NaN where there is none."""
    run_cost: numpy.ndarray[Any, Any]
    """(steps, steps): [g, l] = mean square error in the final latent of l skips in a row after a guided step g."""


def can_calibrate(model: DiffusionModel) -> bool:
    """Whether the model runs DDIM, Euler or DPM-Solver++ 2M, whose steps are known linear functions of the noise."""
    return isinstance(model.solver, LinearSolver) and model.solver.scheduler_name in SCHEDULERS.values()


def calibrate(sampler: Sampler, steps: int, subjects: Sequence[Subject]) -> Calibration:
    """One pass with full guidance over the subjects. Only for schedulers that ``can_calibrate`` allows."""
    weight = sampler.guidance_scale - 1.0
    totals: dict[str, Any] = {}
    timesteps: list[float] = []
    for states in sampler.batches(steps, subjects):
        progress = states[0].progress
        assert isinstance(progress, LinearProgress)
        table = progress.table.rows
        timesteps = list(progress.timesteps)
        differences, similarity = [], []
        for _ in range(steps):
            sampler.step(states)
            latest = [state.last_difference for state in states if state.last_difference is not None]
            differences.append(torch.cat(latest).flatten(1))
            similarity.append([sampler.model.x0_similarity(state) for state in states])
        d = torch.stack(differences).cpu() * weight
        sums = _batch(d, table)
        sums["x0_similarity"] = numpy.array(similarity).sum(axis=1)
        for name, values in sums.items():
            totals[name] = totals.get(name, 0) + values
    means = {name: values / len(subjects) for name, values in totals.items()}
    return Calibration(numpy.array(timesteps), **means)


def _batch(d: torch.Tensor, table: Sequence[Coefficients]) -> dict[str, Any]:
    """Sums over a batch of d = (w - 1) (eps_c - eps_u), of shape (steps, images, features)."""
    steps = len(d)
    x0 = torch.tensor([abs(row.x0_output) for row in table])
    gain = torch.tensor(end_gains(table), dtype=torch.float32)
    root = d.shape[2] ** 0.5
    drop = (d.norm(dim=2) * x0[:, None] / root).sum(dim=1)
    reuse = torch.full((steps, OLDEST), float("nan"))
    for age in range(1, min(OLDEST, steps - 1) + 1):
        reuse[age:, age - 1] = ((d[:-age] - d[age:]).norm(dim=2) * x0[age:, None] / root).sum(dim=1)
    cost = torch.zeros(steps, steps)
    for guided in range(steps - 1):
        error = (d[guided] - d[guided + 1 :]) * gain[guided + 1 :, None, None]
        cost[guided, 1 : steps - guided] = error.cumsum(dim=0).square().mean(dim=2).sum(dim=1)
    sums = {"drop_error": drop, "reuse_error": reuse, "run_cost": cost}
    return {name: value.double().numpy() for name, value in sums.items()}


def end_gains(table: Sequence[Coefficients]) -> list[float]:
    """By step: what a unit error in its noise becomes in the final latent.

    The error enters the next latent and, with a multistep solver, through x0 also the one after; each is brought to
    unit variance by that step's ``input_scale`` (1 for DDIM and DPM-Solver++, whose latents have it anyway).
    """
    scales = [row.input_scale for row in table] + [1.0, 1.0]
    gains = []
    for step, row in enumerate(table):
        gain = row.output * scales[step + 1]
        if step + 1 < len(table):
            gain += table[step + 1].previous * row.x0_output * scales[step + 2]
        gains.append(gain)
    return gains


def choose_skips(run_cost: numpy.ndarray[Any, Any], skips: int) -> tuple[int, ...]:
    """The ``skips`` steps whose runs cost least in sum; the first step stays guided. Exact, by dynamic programming.

    best[k][g]: least cost of everything before step g when g is the k-th guided step. Ties go to the earlier step.
    Raises ValueError when so many steps cannot be skipped.
    """
    steps = len(run_cost)
    guided = steps - skips
    if not 1 <= guided <= steps:
        raise ValueError(f"{skips} of {steps} steps cannot be skipped")
    infinite = float("inf")
    best = [0.0 if step == 0 else infinite for step in range(steps + 1)]
    before: list[list[int]] = []
    for count in range(1, guided + 1):
        # The last guided step's run reaches the end, which stands as one more guided step.
        targets = [steps] if count == guided else range(count, steps)
        new, origin = [infinite] * (steps + 1), [0] * (steps + 1)
        for target in targets:
            for step in range(count - 1, target):
                cost = best[step] + float(run_cost[step][target - step - 1])
                if cost < new[target]:
                    new[target], origin[target] = cost, step
        best = new
        before.append(origin)
    guided_steps, step = [], steps
    for origin in reversed(before):
        step = origin[step]
        guided_steps.append(step)
    return tuple(step for step in range(steps) if step not in set(guided_steps))
