"""Two results side by side: two runs request by request, two sweeps cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from synerdiff.figures.comparison import ratio_axis
from synerdiff.figures.style import BLUE, ORANGE, finish, legend_above, new_figure, panel_title, styled
from synerdiff.results.intervals import PairedRatio

_MOST_POINTS = 4000


@styled
def paired_requests(a: pd.DataFrame, b: pd.DataFrame, names: Sequence[str], title: str, estimated: bool) -> Figure:
    """Left: share of requests slower than a latency. Right: each request's latency in B over A's.

    ``a`` and ``b``: the request tables of the same requests, all done, in one order.
    """
    figure = new_figure(3.3)
    tail, pairs = figure.subplots(1, 2)
    values = [table["request_latency_s"].to_numpy(float) for table in (a, b)]
    lines: Any = ("-", "--")
    handles = []
    for own, color, line, side, name in zip(values, (BLUE, ORANGE), lines, "AB", names, strict=True):
        ordered = np.sort(own)
        tail.step(ordered, 1 - np.arange(len(ordered)) / len(ordered), where="post", color=color, linestyle=line)
        handles.append(Line2D([], [], color=color, linestyle=line, label=f"{side}: {name}"))
    for axis in (tail, pairs):
        axis.set(xscale="log", yscale="log")
    tail.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    tail.axhline(0.01, color="#b0b0b0", linewidth=0.7, zorder=1)
    tail.set(xlabel="latency (s)", ylabel="share of requests that take longer")
    panel_title(tail, "latencies; grey: P99", estimated)
    step = -(-len(values[0]) // _MOST_POINTS)
    pairs.plot(values[0][::step], values[1][::step], ".", color="#555555", markersize=2, alpha=0.5)
    ends = [float(np.min(values)), float(np.max(values))]
    pairs.plot(ends, ends, color="#222222", linewidth=0.7)
    pairs.set(xlabel="latency in A (s)", ylabel="latency in B (s)")
    panel_title(pairs, "request by request; below the line B is faster", estimated)
    for axis in (tail, pairs):
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    pairs.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    legend_above(figure, handles, columns=1)
    return finish(figure, title, f"{len(values[0]):,} measured requests that are done in both.")


@styled
def paired_sweeps(
    cells: Sequence[tuple[str, Mapping[str, PairedRatio]]], names: Sequence[str], estimated: bool
) -> Figure:
    """One row per cell, one panel per measure: the ratio B / A with its interval."""
    titles = list(dict.fromkeys(title for _, ratios in cells for title in ratios))
    figure = new_figure(0.22 * len(cells) + 1.9)
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=True):
        drawn = [(row, ratios[title]) for row, (_, ratios) in enumerate(cells) if title in ratios]
        for row, ratio in drawn:
            if ratio.high < np.inf:
                axis.plot([ratio.low, ratio.high], [row, row], color=BLUE, linewidth=1)
            axis.plot(ratio.ratio, row, "o", color=BLUE)
        ends = [end for _, ratio in drawn for end in (ratio.ratio, ratio.low, ratio.high) if 0 < end < np.inf]
        ratio_axis(axis, "x", ends, "change", 5)
        axis.axvline(1, color="#222222", linewidth=0.8, zorder=1)
        panel_title(axis, title, estimated)
    axes[0].set_yticks(range(len(cells)), [name for name, _ in cells])
    axes[0].invert_yaxis()
    return finish(figure, f"B against A, {len(cells)} cells", f"A: {names[0]}. B: {names[1]}. Means over seeds, 95% t.")
