"""Writes docs/data/ssim-conventions.csv: the same images under three conventions of SSIM.

python -m tools.ssim_conventions
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional

from synerdiff.core import CONDITIONAL
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.fidelity.rules import SkipRule, adaptive, first, full, last, spread
from synerdiff.fidelity.sampling import Sampler, Subject, ssim_of
from synerdiff.files import write_rows

DATA = Path(__file__).resolve().parent.parent / "docs" / "data"
COLUMNS = ["rule", "gaussian_0_1", "gaussian_range_2", "uniform_range_2"]
STEPS, GUIDANCE, IMAGES, FIRST_SEED = 25, 4.0, 128, 1000
RULES = [
    *(last(STEPS, skips, CONDITIONAL) for skips in (25, 5, 10, 15, 20)),
    *(first(STEPS, skips) for skips in (5, 10)),
    spread(STEPS, 12, mode=CONDITIONAL),
    *(spread(STEPS, skips) for skips in (12, 16, 18)),
    *(adaptive(STEPS, threshold) for threshold in (0.99, 0.97)),
    spread(STEPS, 16, warmup_steps=3),
    *(full(steps) for steps in (16, 12, 10)),
]


def windowed_ssim(a: torch.Tensor, b: torch.Tensor, gaussian: bool) -> torch.Tensor:
    """SSIM (n,) of images in [-1, 1], data range 2, over whole windows only.

    Windows: 11x11 Gaussian of sigma 1.5, or 7x7 uniform with unbiased variances.
    """
    if gaussian:
        line = torch.exp(-((torch.arange(11) - 5) ** 2) / (2 * 1.5**2))
        window, unbiased = torch.outer(line, line) / line.sum() ** 2, 1.0
    else:
        window, unbiased = torch.full((7, 7), 1 / 49), 49 / 48

    def mean(x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, window[None, None])

    c1, c2 = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = unbiased * (mean(a * a) - mean_a**2), unbiased * (mean(b * b) - mean_b**2)
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def conventions(images: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Mean SSIM of images given in [-1, 1]: taken on [0, 1]; and on [-1, 1], Gaussian and uniform windows."""
    a, b = images.clamp(-1, 1), reference.clamp(-1, 1)
    scores = [ssim_of(a / 2 + 0.5, b / 2 + 0.5)]
    scores += [windowed_ssim(a, b, gaussian) for gaussian in (True, False)]
    return [float(values.mean()) for values in scores]


def main() -> None:
    """Make the images of every rule and write their scores."""
    model = load_model("digits")
    subjects = [Subject(seed, model.prompts.default_prompt(seed)) for seed in range(FIRST_SEED, FIRST_SEED + IMAGES)]
    sampler = Sampler(model, GUIDANCE, 32, lambda rows: None)

    def made(rule: SkipRule) -> torch.Tensor:
        return torch.cat([model.decode(latents).float() for latents, _ in sampler.latents(rule, subjects)])

    reference = made(full(STEPS))
    rows = ([rule.name, *(f"{value:.4f}" for value in conventions(made(rule), reference))] for rule in RULES)
    write_rows(DATA / "ssim-conventions.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
