"""The estimator's constants, fitted on published times; and the roofline of two constants that they have to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log, nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.datasheets import GPUS, MODELS
from profiler.durations import FITTED, Constants
from profiler.operations import Operations, decoder, text_encoders, total, unet
from synerdiff.experiments.page import Printed
from synerdiff.figures.style import save
from synerdiff.figures.validation import estimate_errors
from synerdiff.files import write_rows
from synerdiff.validation.published_times import (
    Compared,
    Published,
    errors_of,
    estimate_ms,
    read_published,
    summary_table,
    table,
)

Array = NDArray[np.float64]
FITTED_NAMES = ("feed", "single", "softmax", "bandwidth", "kernel_s", "host_s", "samsung")
START = Constants(6000.0, 400.0, 16.0, 0.85, 4e-6, 20e-6, 0.45e12)
"""Where every fit starts, and the centre of its priors."""
PRIOR = (0.5, 0.2, 0.4, 0.08, 0.3, 1.0, 0.2)
"""How far a constant may lie from its start (a standard deviation of its logarithm): what is known of it beforehand."""
SOFT = 0.05
"""Errors well above this count by their size, not by their square: hosts and software releases differ."""


def _smallest(errors: Callable[[Array], Array], start: Array, centre: Array, width: Array) -> Array:
    """Logarithms of constants that make ``errors`` (of logarithms) small: Levenberg-Marquardt on a loss that grows
    linearly beyond ``SOFT``, with normal priors of ``width`` around ``centre``."""

    def loss(off: Array, at: Array) -> float:
        soft = np.sqrt(SOFT**2 + off**2) - SOFT
        return float(soft.sum() / (2 * SOFT) + 0.5 * (((at - centre) / width) ** 2).sum())

    at, off, damping = start, errors(start), 1e-2
    for _ in range(20):
        slopes = np.array([(errors(at + 0.03 * unit) - off) / 0.03 for unit in np.eye(len(at))]).T
        weights = 1 / np.sqrt(SOFT**2 + off**2) / (2 * SOFT)
        curvature = slopes.T @ (weights[:, None] * slopes) + np.diag(1 / width**2)
        gradient = slopes.T @ (weights * off) + (at - centre) / width**2
        for _ in range(8):
            change = -np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
            there = at + np.clip(change, -0.5, 0.5)
            off_there = errors(there)
            gain = loss(off, at) - loss(off_there, there)
            if gain > 0:
                break
            damping *= 4
        else:
            break
        at, off, damping = there, off_there, damping / 3
        if gain < 1e-4:
            break
    return at


def _logs(constants: Constants) -> Array:
    return np.log([getattr(constants, name) for name in FITTED_NAMES])


def _constants(logs: Array) -> Constants:
    return Constants(**{name: exp(value) for name, value in zip(FITTED_NAMES, logs, strict=True)})


def fit(rows: Sequence[Published], start: Constants = START) -> Constants:
    """The constants that bring the estimates of ``rows`` nearest to what was published; any ``start`` leads there."""

    def errors(logs: Array) -> Array:
        at = _constants(logs)
        return np.array([log(estimate_ms(row, at) / row.ms) for row in rows])

    return _constants(_smallest(errors, _logs(start), _logs(START), np.array(PRIOR)))


def roofline_ms(row: Published, compute_share: float, memory_share: float) -> float:
    """A roofline of two constants: the longer of FLOPs over a share of the peak and eager bytes over a share of the
    bandwidth. It knows 8- and 32-bit rates, and neither kernels, executions nor shapes."""
    gpu = GPUS[row.gpu]

    def seconds(listed: Operations, rows: int, factor: float, size: int) -> float:
        flops, elements, weights, _ = total(listed)
        rate = gpu.peak_flops * factor * compute_share
        return max(flops * rows / rate, (elements * rows + weights) * size / (gpu.bandwidth * memory_share))

    result = 0.0
    eight = gpu.eight_bit if row.precision in ("fp8", "int8") else 1
    if row.part in ("step", "image"):
        result += row.steps * seconds(unet(row.model, row.height, row.width, "compiled"), row.rows, eight, 2)
    if row.part in ("text", "image"):
        result += seconds(text_encoders(MODELS[row.model].text_encoders, "compiled"), 1, 1, 2)
    if row.part in ("decode", "image"):
        layers = tuple(pair for _, atom in decoder(row.model, row.height, row.width, "compiled") for pair in atom)
        result += row.images * seconds(layers, 1, 1 if row.decode_bits == 16 else 0.5, row.decode_bits // 8)
    return result * 1e3 / (row.images if row.part == "image" else 1)


def fit_roofline(rows: Sequence[Published]) -> tuple[float, float]:
    """Its two shares, fitted to ``rows`` by the same loss without a prior."""

    def errors(logs: Array) -> Array:
        return np.array([log(roofline_ms(row, exp(logs[0]), exp(logs[1])) / row.ms) for row in rows])

    compute, memory = np.exp(_smallest(errors, np.log([0.5, 0.5]), np.log([0.5, 0.5]), np.array([9.0, 9.0])))
    return float(compute), float(memory)


def judge(
    rows: Sequence[Published], update: Callable[[float, float], None] = lambda done, total: None
) -> list[Compared]:
    """Every row under the committed constants, under a fit without its card, and under the two-constant roofline.

    ``update`` is told (done, total) cards.
    """
    fitted = [row for row in rows if row.use == "fit"]
    shares = fit_roofline(fitted)
    judged: list[Compared] = []
    cards = list(dict.fromkeys(row.gpu for row in rows))
    for done, gpu in enumerate(cards):
        update(done, len(cards))
        others = [row for row in fitted if row.gpu != gpu]
        constants = fit(others, FITTED) if len(others) < len(fitted) else FITTED
        judged += [
            Compared(row, estimate_ms(row), estimate_ms(row, constants), roofline_ms(row, *shares))
            for row in rows
            if row.gpu == gpu
        ]
    return judged


def score_times(out: Path | None, update: Callable[[float, float], None] = lambda done, total: None) -> list[Printed]:
    """The answer and two tables of the estimator against published times; written into ``out`` with a figure."""
    rows, others = read_published()
    judged = judge(rows, update)
    summarised, (headers, lines) = summary_table(judged), table(judged)
    if out is not None:
        write_rows(out / "times-summary.csv", *summarised)
        write_rows(out / "times.csv", headers, lines)
        write_rows(out / "times-unusable.csv", ("card", "model", "what", "source", "why"), others)
        caption = "After: constants fitted without the card's own rows. Numbers in brackets: published times."
        save(estimate_errors(_frame(judged), caption=caption), out, "times")
    printed = headers.index("roofline")
    note = f"{len(others)} further rows cannot be judged (times-unusable.csv)"
    left_out = errors_of((case.left_out_ms, case.row.ms) for case in judged)
    return [
        f"{left_out.n} published times, each card left out of the fit: the median error of an estimate is "
        f"{left_out.size:.1%}, and {left_out.within_10:.0%} are within 10%.",
        "Every published time beside its estimate",
        (headers[:printed], [line[:printed] for line in lines]),
        f"How far estimates are off, card left out of the fit unless said otherwise; {note}",
        summarised,
    ]


def _frame(judged: Sequence[Compared]) -> Any:
    import pandas as pd

    return pd.DataFrame(
        {
            "card": case.row.gpu,
            "execution": case.row.execution,
            "before": nan if case.row.before_ms is None else case.row.before_ms / case.row.ms - 1,
            "after": case.left_out_ms / case.row.ms - 1,
        }
        for case in judged
    )
