"""The picture of a profile: step times, chunk times, and how badly the two sides slow each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from synerdiff.core import NS_PER_S, PPM
from synerdiff.figures.style import finish, new_figure, styled
from synerdiff.profile.tables import Profile

_BLUE, _RED = "#0072b2", "#d55e00"
_SHADES = ("#e69f00", "#f6d48a")
MS = NS_PER_S / 1000


@styled
def profile_picture(profile: Profile, *, title: str = "", caption: str = "") -> Figure:
    """Step time by rows (p10-p90, held-out points apart), chunk times per chunking, and three heat maps over rows and
    chunks: step slowdown, chunk slowdown, and 1/s_u + 1/s_v (above 1, running beside pays)."""
    cells = [(chunking, i) for chunking in profile.chunkings for i in range(profile.chunk_count(chunking))]
    figure = new_figure(12, 8.2)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    above, below = halves
    steps, chunks = above.subplots(1, 2)
    _steps(steps, profile)
    _chunks(chunks, profile)
    s_u, s_v = _slowdowns(profile, cells)
    if s_u.size:
        maps = below.subplots(1, 3)
        worst = float(max(np.nanmax(s_u), np.nanmax(s_v), 1.01))
        _heat_map(maps[0], profile, cells, s_u, "step slowdown beside a chunk", "Oranges", (1.0, worst))
        _heat_map(maps[1], profile, cells, s_v, "chunk slowdown beside a step", "Oranges", (1.0, worst))
        _heat_map(maps[2], profile, cells, 1 / s_u + 1 / s_v, "1/s_u + 1/s_v (above 1: beside pays)", "PuOr", None)
    else:
        below.text(0.5, 0.5, "no co-run slowdowns in this profile", ha="center")
    overheads = ", ".join(f"{name} {profile.overhead_ns(name) / MS:.3g} ms" for name in profile.overheads)
    note = f"Overheads: {overheads or 'none'}. A dash: not in the profile. {caption}"
    return finish(figure, title or f"Profile {profile.name}", note, profile.estimated)


def _steps(axis: Axes, profile: Profile) -> None:
    rows = sorted(profile.steps)
    spreads = [profile.steps[r] for r in rows]
    median = np.array([spread.median for spread in spreads]) / MS
    low = median - np.array([spread.p10 for spread in spreads]) / MS
    high = np.array([spread.p90 for spread in spreads]) / MS - median
    # With buckets every number of rows takes the time of the next bucket; only an eager profile interpolates.
    shape = "steps-pre" if profile.row_buckets else "default"
    axis.plot(rows, median, color=_BLUE, drawstyle=shape)
    axis.errorbar(rows, median, yerr=np.array([low, high]), fmt="o", color=_BLUE, capsize=3, label="median, p10-p90")
    if profile.held_out_steps:
        held = sorted(profile.held_out_steps)
        axis.plot(
            held,
            [profile.held_out_steps[r].median / MS for r in held],
            "X",
            color=_RED,
            markersize=7,
            linestyle="none",
            label="held out of the lookups",
        )
    labelled = -1.0
    for row, value in zip(rows, median, strict=True):
        if row - labelled >= 0.06 * rows[-1] or row == rows[0]:
            axis.annotate(f"{value:.3g}", (row, value), xytext=(4, -10), textcoords="offset points", fontsize=7.5)
            labelled = row
    axis.set(xlabel="rows", ylabel="step time (ms)")
    axis.set_title("Denoiser step alone" + ("" if profile.row_buckets else " (eager: interpolated)"), loc="left")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")


def _chunks(axis: Axes, profile: Profile) -> None:
    axis.grid(visible=False, axis="y")
    whole = profile.decode_ns() / MS
    for place, chunking in enumerate(profile.chunkings):
        left = 0.0
        for i in range(profile.chunk_count(chunking)):
            length = profile.chunk_ns(chunking, i) / MS
            axis.barh(place, length, left=left, height=0.6, color=_SHADES[i % 2], edgecolor="#7a5c00", linewidth=0.5)
            if length > 0.05 * whole:
                axis.text(left + length / 2, place, f"{length:.3g}", ha="center", va="center", fontsize=7.5)
            left += length
        axis.text(left, place, f" {left:.3g} ms", va="center", fontsize=8)
    axis.set_yticks(range(len(profile.chunkings)), list(profile.chunkings))
    axis.set_ylim(len(profile.chunkings) - 0.4, -0.6)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.1)
    axis.set_xlabel("time (ms)")
    axis.set_title("Decode alone, by chunking", loc="left")


def _corun_rows(profile: Profile) -> list[int]:
    return sorted({rows for cells in profile.corun.values() for rows in cells})


def _slowdowns(profile: Profile, cells: list[tuple[str, int]]) -> tuple[Any, Any]:
    """Two arrays (rows x chunks) of slowdowns, NaN where the profile has none."""
    rows = _corun_rows(profile)
    s_u = np.full((len(rows), len(cells)), np.nan)
    s_v = s_u.copy()
    for column, cell in enumerate(cells):
        for line, row in enumerate(rows):
            corun = profile.corun.get(cell, {}).get(row)
            if corun is not None:
                s_u[line, column], s_v[line, column] = corun.step.median / PPM, corun.chunk.median / PPM
    return s_u, s_v


def _heat_map(
    axis: Axes,
    profile: Profile,
    cells: list[tuple[str, int]],
    values: Any,
    title: str,
    colors: str,
    limits: tuple[float, float] | None,
) -> None:
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_facecolor("#dddddd")
    away = max(float(np.nanmax(np.abs(values - 1))), 0.05)
    norm: Any = TwoSlopeNorm(1.0, 1 - away, 1 + away) if limits is None else None
    low, high = limits if limits is not None else (None, None)
    image = axis.imshow(values, cmap=colors, norm=norm, vmin=low, vmax=high, aspect="auto", origin="lower")
    for (line, column), value in np.ndenumerate(values):
        if np.isnan(value):
            axis.text(column, line, "-", ha="center", va="center", fontsize=6.5)
            continue
        level: Any = image.norm(value)
        light = level > 0.65 if limits is not None else not 0.2 < level < 0.8
        axis.text(
            column,
            line,
            f"{value:.2f}",
            ha="center",
            va="center",
            rotation=90 if len(cells) > 9 else 0,
            fontsize=6.5,
            color="white" if light else "#222222",
        )
    for column in range(1, len(cells)):
        if cells[column][0] != cells[column - 1][0]:
            axis.axvline(column - 0.5, color="white", linewidth=3)
    axis.set_yticks(range(len(values)), [str(row) for row in _corun_rows(profile)])
    axis.set_xticks(
        range(len(cells)),
        [chunking if chunking == "whole" else f"{chunking} #{i}" for chunking, i in cells],
        rotation=90,
    )
    axis.set(ylabel="rows of the step")
    axis.set_title(title, loc="left")
