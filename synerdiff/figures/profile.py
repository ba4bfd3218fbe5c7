"""The picture of a profile: step times, chunk times, and how badly the two sides slow each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synerdiff.core import NS_PER_S, PPM
from synerdiff.figures.comparison import MOST_NUMBERS, draw_map, map_bar
from synerdiff.figures.style import (
    BLUE,
    MARK,
    ORANGE,
    beside,
    finish,
    legend_above,
    new_figure,
    panel_title,
    plain_log_ticks,
    save,
    styled,
)  # fmt: skip
from synerdiff.profile.batching import BatchPoint, best_point
from synerdiff.profile.tables import Profile

_SHADES = ("#e69f00", "#f6d48a")
MS = NS_PER_S / 1000


@styled
def profile_picture(profile: Profile, *, caption: str = "") -> Figure:
    """Step time by rows (p10-p90, held-out points apart), chunk times per chunking, and three heat maps over rows and
    chunks: step slowdown, chunk slowdown, and 1/s_u + 1/s_v (above 1, running beside pays)."""
    cells = [(chunking, i) for chunking in profile.chunkings for i in range(profile.chunk_count(chunking))]
    figure = new_figure(5.4)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    above, below = halves
    steps, chunks = above.subplots(1, 2)
    _steps(steps, profile)
    _chunks(chunks, profile)
    rows, s_u, s_v = _slowdowns(profile, cells)
    if rows:
        axes = below.subplots(1, 3, sharey=True)
        worst = max(float(np.nanmax([s_u, s_v])), 1.1)
        gain = 1 / s_u + 1 / s_v
        away = max(float(2 ** np.nanmax(np.abs(np.log2(gain)))), 1.1)
        numbers = 3 * s_u.size <= MOST_NUMBERS
        maps = ((s_u, "step slowdown s_u", "Oranges", worst, 0), (s_v, "chunk slowdown s_v", "Oranges", worst, 0),
                (gain, "1/s_u + 1/s_v", "RdBu", away, -1))  # fmt: skip
        for axis, (values, name, colors, limit, lower) in zip(axes, maps, strict=True):
            shades = draw_map(axis, values, limit=limit, numbers=numbers, colors=colors, lower=lower)
            axis.set_facecolor("#dddddd")
            panel_title(axis, f"{name}\n{np.nanmin(values):.2f} to {np.nanmax(values):.2f}", profile.estimated)
            map_bar(below, shades, axis, limit, "")
            _chunk_ticks(axis, cells, rows)
        axes[0].set_ylabel("rows of the step")
    else:
        below.text(0.5, 0.5, "no co-run slowdowns in this profile", ha="center")
    overheads = ", ".join(f"{name} {profile.overhead_ns(name) / MS:.3g} ms" for name in profile.overheads)
    note = f"1/s_u + 1/s_v above 1 (blue): overlap pays. Grey: not in the profile. Overheads: {overheads or 'none'}."
    return finish(figure, f"Profile {profile.name}", f"{note} {caption}")


def _steps(axis: Axes, profile: Profile) -> None:
    rows = sorted(profile.steps)
    low, median, high = (
        np.array([getattr(profile.steps[r], part) for r in rows]) / MS for part in ("p10", "median", "p90")
    )
    # With buckets every number of rows takes the time of the next bucket; only an eager profile interpolates.
    axis.plot(rows, median, color=BLUE, drawstyle="steps-pre" if profile.row_buckets else "default")
    spread = np.array([median - low, high - median])
    axis.errorbar(rows, median, yerr=spread, fmt="o", color=BLUE, capsize=2, label="median, p10-p90")
    if profile.held_out_steps:
        held = sorted(profile.held_out_steps)
        times = [profile.held_out_steps[r].median / MS for r in held]
        axis.plot(held, times, "X", color=ORANGE, markersize=5, linestyle="none", label="held out of the lookups")
    labelled = -rows[-1]
    for row, value in zip(rows, median, strict=True):
        # Above and left of its own point: times rise with rows, so that nothing else stands there.
        if row - labelled >= 0.12 * rows[-1]:
            beside(axis, f"{value:.3g}", row, value, (-2, 3), ha="right", va="bottom")
            labelled = row
    axis.set(xlabel="rows", ylabel="step time (ms)")
    panel_title(axis, "step alone" + ("" if profile.row_buckets else " (eager: interpolated)"), profile.estimated)
    axis.set_xlim(left=-0.1 * rows[-1])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")


def _chunks(axis: Axes, profile: Profile) -> None:
    axis.grid(visible=False, axis="y")
    whole = profile.decode_ns() / MS
    for place, chunking in enumerate(profile.chunkings):
        left = 0.0
        for i in range(profile.chunk_count(chunking)):
            length = profile.chunk_ns(chunking, i) / MS
            axis.barh(place, length, left=left, height=0.6, color=_SHADES[i % 2], edgecolor="#7a5c00", linewidth=0.4)
            if profile.chunk_count(chunking) > 1 and length > 0.09 * whole:
                axis.text(left + length / 2, place, f"{length:.3g}", ha="center", va="center", fontsize=6.5)
            left += length
        axis.text(left, place, f" {left:.3g} ms", va="center", fontsize=7)
    axis.set_yticks(range(len(profile.chunkings)), list(profile.chunkings))
    axis.set_ylim(len(profile.chunkings) - 0.4, -0.6)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.16)
    axis.set_xlabel("time (ms)")
    panel_title(axis, "decode alone, by chunking", profile.estimated)


def _slowdowns(profile: Profile, cells: list[tuple[str, int]]) -> tuple[list[int], Any, Any]:
    """The rows that have co-run times, and two arrays (rows x chunks) of slowdowns, NaN where the profile has none."""
    rows = sorted({rows for coruns in profile.corun.values() for rows in coruns})
    s_u = np.full((len(rows), len(cells)), np.nan)
    s_v = s_u.copy()
    for column, cell in enumerate(cells):
        for line, row in enumerate(rows):
            corun = profile.corun.get(cell, {}).get(row)
            if corun is not None:
                s_u[line, column], s_v[line, column] = corun.step.median / PPM, corun.chunk.median / PPM
    return rows, s_u, s_v


def _chunk_ticks(axis: Axes, cells: list[tuple[str, int]], rows: list[int]) -> None:
    """Each chunking's name under its chunks, white lines between chunkings."""
    starts = [i for i, (chunking, _) in enumerate(cells) if i == 0 or cells[i - 1][0] != chunking]
    ends = [*starts[1:], len(cells)]
    for start in starts[1:]:
        axis.axvline(start - 0.5, color="white", linewidth=2.5)
    axis.set_xticks([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], [cells[i][0] for i in starts])
    axis.set_yticks(range(len(rows)), [str(row) for row in rows])
    axis.set_xlabel("chunks, first to last")


@styled
def batching_picture(points: Sequence[BatchPoint], slo_s: float | None, profile: Profile, caption: str) -> Figure:
    """Images a second with their band, gain over the smallest batch, and latency at full batches, by batch; one line a
    resolution, the chosen batch filled."""
    figure = new_figure(3.1)
    panels = figure.subplots(1, 3)
    handles = []
    for number, at in enumerate(dict.fromkeys(point.resolution for point in points)):
        own = [point for point in points if point.resolution == at]
        color, marker = _SIZES[number % len(_SIZES)]
        best, x = best_point(own, slo_s), [point.batch for point in own]
        panels[0].fill_between(x, [p.low for p in own], [p.high for p in own], color=color, alpha=0.15, linewidth=0)
        curves = ([p.images_per_s for p in own], [p.images_per_s / own[0].images_per_s for p in own],
                  [p.latency_s for p in own])  # fmt: skip
        for axis, values in zip(panels, curves, strict=True):
            axis.plot(x, values, marker, color=color, linestyle="-", markerfacecolor="white", markersize=4)
            if best is not None:
                axis.plot(best.batch, values[x.index(best.batch)], marker, color=color, markersize=6)
        handles += panels[0].plot([], [], marker, color=color, linestyle="-", label=at or "its resolution")
    if slo_s is not None:
        panels[2].axhline(slo_s, color=MARK, linewidth=0.9, zorder=1)
    for axis, name in zip(panels, ("images/s", "gain over the smallest batch", "seconds an image"), strict=True):
        axis.set_xscale("log", base=2)
        sizes = sorted({point.batch for point in points})
        shown = [size for size in sizes if size & (size - 1) == 0] or sizes
        axis.set_xticks(shown, [str(size) for size in shown])
        axis.minorticks_off()
        axis.set_xlabel("images in a batch")
        panel_title(axis, name, profile.estimated)
    panels[1].set_ylim(bottom=min(1.0, panels[1].get_ylim()[0]))
    for axis in (panels[0], panels[2]):
        plain_log_ticks(axis)
    legend_above(figure, handles)
    return finish(figure, f"Batching on {profile.label}", caption)


def save_batching(
    points: Sequence[BatchPoint], slo_s: float | None, profile: Profile, caption: str, out: Path
) -> list[Path]:
    """The picture of a profile's points as ``batching`` in the folder; the files."""
    return save(batching_picture(points, slo_s, profile, caption), out, "batching")


_SIZES = (("#0072b2", "o"), ("#e69f00", "s"), ("#009e73", "^"), ("#882255", "D"), ("#56b4e9", "v"), ("#000000", "P"))
