"""The picture of a trace: its rate over time, its burstiness and what is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synerdiff.core import NS_PER_S, Request
from synerdiff.figures.style import BLUE, GREY, UNITS_S, finish, new_figure, panel_title, styled

if TYPE_CHECKING:
    from traces.describe import TraceSummary

_BINS = {
    1: "second",
    10: "10 s",
    60: "minute",
    600: "10 min",
    3600: "hour",
    21_600: "6 h",
    86_400: "day",
    604_800: "week",
}
_MOST_BINS, _FEWEST_BINS, _REQUESTS_PER_BIN = 600, 20, 5
_MOST_BARS = 8


@styled
def trace_picture(requests: Sequence[Request], summary: TraceSummary, *, title: str) -> Figure:
    """Four panels: rate over time, index of dispersion by window, shares of steps and of images."""
    figure = new_figure(4.4)
    grid = figure.subplots(2, 2)
    _rate(grid[0, 0], requests, summary.span_s)
    _dispersion(grid[0, 1], summary)
    _shares(grid[1, 0], summary.steps, "steps per image")
    _shares(grid[1, 1], summary.images, "images per request")
    return finish(figure, title, "")


def _rate(axis: Axes, requests: Sequence[Request], span_s: float) -> None:
    times_s = np.array([request.arrival_ns for request in requests]) / NS_PER_S
    most_bins = min(_MOST_BINS, max(_FEWEST_BINS, len(times_s) / _REQUESTS_PER_BIN))
    bin_s = next((length for length in _BINS if span_s / length <= most_bins), max(_BINS))
    first = times_s[0] // bin_s * bin_s
    edges = first + np.arange(int((times_s[-1] - first) // bin_s) + 2) * bin_s
    _, unit_s, unit = next(entry for entry in UNITS_S if edges[-1] >= entry[0])
    axis.stairs(np.histogram(times_s, edges)[0], edges / unit_s, fill=True, color=BLUE)
    axis.set(xlabel=f"time ({unit})", ylabel=f"requests per {_BINS[bin_s]}")
    panel_title(axis, "arrivals over time")


def _dispersion(axis: Axes, summary: TraceSummary) -> None:
    axis.set(xlabel="window (s)", ylabel="variance / mean of counts")
    panel_title(axis, "index of dispersion")
    if not summary.windows:
        axis.text(0.5, 0.5, "the trace is too short", ha="center", va="center", transform=axis.transAxes)
        return
    lengths = [counts.window_s for counts in summary.windows]
    axis.axhline(1, color=GREY, linestyle="--", label="Poisson = 1")
    axis.plot(lengths, [counts.index_of_dispersion for counts in summary.windows], "o-", color=BLUE, label="trace")
    axis.set(xscale="log", yscale="log")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.5), max(high, 2))  # sampling noise around 1 must look like what it is
    axis.legend(loc="upper left")


def _shares(axis: Axes, shares: Mapping[int, float], title: str) -> None:
    """Bars for the most frequent values in rising order; the rest is one bar."""
    most = sorted(sorted(shares, key=lambda value: -shares[value])[:_MOST_BARS])
    heights = [100 * shares[value] for value in most]
    labels = [str(value) for value in most]
    if len(shares) > len(most):
        labels.append(f"others\n({len(shares) - len(most)})")
        heights.append(100 - sum(heights))
    bars = axis.bar(labels, heights, color=BLUE)
    texts = ["<0.1" if 0 < height < 0.05 else f"{height:.1f}" if height < 99.95 else "100" for height in heights]
    axis.bar_label(bars, texts, padding=2, fontsize=6.5)
    axis.set(ylabel="share of requests (%)")
    panel_title(axis, title)
    axis.margins(y=0.14)
    slots = max(4, len(labels))  # a single bar must not fill the panel
    axis.set_xlim((len(labels) - 1 - slots) / 2, (len(labels) - 1 + slots) / 2)
