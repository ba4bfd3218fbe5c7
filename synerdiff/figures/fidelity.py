"""Pictures of what skipping guidance costs in images: fidelity against rows, contact sheets, sensitivity by step, and
latency against fidelity."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synerdiff.figures.style import (
    PAGE_IN,
    SSIM_NOTE,
    beside,
    finish,
    legend_above,
    new_figure,
    panel_grid,
    panel_title,
    plain_log_ticks,
    policy_legend,
    policy_styles,
    ssim_axis,
    ssim_error,
    styled,
)

FEWER_STEPS = "fewer steps, full guidance"
"""The equal-cost baseline of every rule that skips."""
_FAMILIES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("guided", "full"): (FEWER_STEPS, "#000000", "o"),
    ("reuse", "spread"): ("reuse, spread evenly", "#0072b2", "s"),
    ("reuse", "calibrated"): ("reuse, calibrated (held-out images)", "#d55e00", "*"),
    ("reuse", "last"): ("reuse, last steps", "#56b4e9", "v"),
    ("reuse", "random-half"): ("reuse, random half of a spread rule", "#44aa99", "P"),
    ("conditional", "spread"): ("conditional, spread evenly", "#cc79a7", "D"),
    ("conditional", "last"): ("conditional, last steps", "#882255", "^"),
    ("conditional", "first"): ("conditional, first steps", "#ddaa33", "<"),
    ("conditional", "adaptive"): ("conditional, adaptive", "#999933", "X"),
}
"""(mode, schedule) -> label, colour, marker. Where a line is drawn it joins one family in order of rows."""
_JOINED = {("guided", "full"), ("reuse", "spread"), ("conditional", "last"), ("reuse", "calibrated")}


@styled
def fidelity_against_rows(settings: Mapping[str, Sequence[Any]], *, caption: str = "") -> Figure:
    """One panel per setting (label -> rows of a fidelity table): mean SSIM with its interval over the share of rows.

    The SSIM axis is logarithmic in 1 - SSIM, upside down. Full guidance in all steps (SSIM 1) is left out.
    """
    figure, grid = panel_grid(len(settings), 3, 2.3, 1.3, sharex=True, sharey=True)
    shown: dict[tuple[str, str], Any] = {}
    for axis, (label, rows) in zip(grid.flat, settings.items(), strict=False):
        for family, (name, color, marker) in _FAMILIES.items():
            own = [row for row in rows if (str(row.mode), row.schedule) == family and row.ssim < 1]
            if own:
                shown[family] = _family(
                    axis, sorted(own, key=lambda row: row.rows), name, color, marker, family in _JOINED
                )
        panel_title(axis, textwrap.fill(label, 32))
        axis.set_xlabel("rows, share of full guidance")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.tick_params(labelbottom=True)
    ssim_axis(grid[0, 0], "y")
    for axis in grid[:, 0]:
        axis.set_ylabel("SSIM, same seeds")
    legend_above(figure, [shown[family] for family in _FAMILIES if family in shown])
    note = "Means over images, bars: 95% t intervals. Up and to the left is better."
    return finish(figure, "Fidelity against rows", f"{note} {caption}")


def _family(axis: Axes, rows: Sequence[Any], name: str, color: str, marker: str, joined: bool) -> Any:
    x = [row.rows_share for row in rows]
    error = [ssim_error(row.ssim) for row in rows]
    low = [max(0.0, e - ssim_error(row.ssim_high)) for e, row in zip(error, rows, strict=True)]
    high = [max(0.0, ssim_error(row.ssim_low) - e) for e, row in zip(error, rows, strict=True)]
    line = "-" if joined and len({*x}) == len(x) else "none"
    looks: Any = {"markersize": 6 if marker == "*" else 3.5, "linestyle": line, "linewidth": 0.8, "elinewidth": 0.7}
    return axis.errorbar(x, error, yerr=[low, high], fmt=marker, color=color, label=name, capsize=1.5, **looks)


@styled
def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray[Any, Any]]], *, title: str = "Same seeds side by side", caption: str = ""
) -> Figure:
    """One line of images per rule: (label, uint8 (n, height, width, channels)); the same column is the same seed."""
    count = max(len(images) for _, images in rows)
    cell_in = min(0.75, (PAGE_IN - 1.9) / count)
    figure = new_figure(cell_in * len(rows) + 0.9)
    grid = figure.subplots(len(rows), count, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for axes, (label, images) in zip(grid, rows, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for axis, image in zip(axes, images, strict=False):
            axis.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
        place: Any = {"transform": axes[0].transAxes, "ha": "right", "va": "center"}
        axes[0].text(-0.15, 0.5, label, fontsize=6.5, linespacing=1.1, **place)
    return finish(figure, title, caption)


@styled
def sensitivity_by_step(
    x0_similarity: np.ndarray[Any, Any],
    drop_error: np.ndarray[Any, Any],
    reuse_error: np.ndarray[Any, Any],
    chosen: Mapping[str, Sequence[int]],
    *,
    caption: str = "",
) -> Figure:
    """Similarity of the two x0 predictions; errors in x0 of dropping and of reusing the difference (steps, ages); and
    which steps each named schedule skips."""
    steps = np.arange(len(x0_similarity))
    figure = new_figure(0.13 * len(chosen) + 3.9)
    grid = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1.5, 0.22 * len(chosen) + 0.25])
    similarity, error, skips = grid
    similarity.plot(steps, x0_similarity, "o-", color="#000000", markersize=3)
    similarity.set_ylabel("x0 cosine")
    error.plot(steps, drop_error, "D-", color="#cc79a7", markersize=3, label="dropped")
    for age, color in zip(range(reuse_error.shape[1]), ("#0b3c5d", "#0072b2", "#56b4e9", "#a6d4ee"), strict=False):
        label = f"reused, {age + 1} step{'s' if age else ''} old"
        error.plot(steps, reuse_error[:, age], "s-", color=color, markersize=3, label=label)
    plain_log_ticks(error)
    error.set_ylabel("error in x0 (RMS)")
    legend_above(figure, error.get_legend_handles_labels()[0])
    for line, skipped in enumerate(chosen.values()):
        guided = sorted(set(steps.tolist()) - set(skipped))
        skips.plot(guided, [line] * len(guided), "o", color="#000000", markersize=3)
        skips.plot(list(skipped), [line] * len(skipped), "o", color="#0072b2", markerfacecolor="white", markersize=3)
    skips.set_yticks(range(len(chosen)), list(chosen))
    skips.set_ylim(len(chosen) - 0.5, -0.5)
    skips.set_xlabel("step")
    title = "How much guidance matters in each step"
    return finish(figure, title, f"Full circles: guided; hollow: reused. {caption}")


@styled
def latency_against_fidelity(
    runs: pd.DataFrame,
    *,
    caption: str = "",
) -> Figure:
    """P99 latency over fidelity, and achieved requests per second over fidelity; one point per run (or mean of seeds).

    ``runs``: profile, estimated, policy, load, ssim and the two metrics; a row per (policy, load, seed).
    Runs of fewer steps are a policy of their own, named ``FEWER_STEPS``, whose variants begin with the number of steps.
    Points of one policy are joined in the order of ``runs``.
    """
    loads = sorted(set(runs["load"].tolist()))
    styles = policy_styles(runs["policy"])
    figure = new_figure(4.4)
    grid = figure.subplots(2, len(loads), squeeze=False, sharex=True, sharey="row")
    panels = (("request_latency_p99_s", "P99 latency (s)"), ("request_throughput", "achieved requests/s"))
    for line, (axes, (column, label)) in enumerate(zip(grid, panels, strict=True)):
        for axis, load in zip(axes, loads, strict=True):
            at_load = runs[runs["load"] == load]
            for policy, style in styles.items():
                own = at_load[at_load["policy"] == policy].groupby("variant", sort=False)[["ssim", column]].mean()
                error = [ssim_error(value) for value in own["ssim"]]
                axis.plot(error, own[column], marker=style.marker, color=style.color, linestyle=style.linestyle)
                if policy == FEWER_STEPS and line == 0:
                    for name, x, y in zip(own.index, error, own[column], strict=True):
                        beside(axis, str(name).split()[0], x, y, (3, -8))
            axis.margins(y=0.15)
            panel_title(axis, f"load {load:g}" if line == 0 else "", bool(at_load["estimated"].any()))
        axes[0].set_ylabel(label)
    plain_log_ticks(grid[0][0])
    for axis in grid[1]:
        ssim_axis(axis, "x")
    policy_legend(figure, styles)
    note = f"Numbers: steps with full guidance. To the right is closer to full guidance. {SSIM_NOTE}"
    return finish(figure, "Latency, throughput and fidelity", f"{note} {caption}")
