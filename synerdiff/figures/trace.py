"""The picture of a trace: its rate over time, its burstiness and what is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.core import NS_PER_S, Request
from synerdiff.files import atomic

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
_UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
_BLUE, _GREY = "#2f6fab", "#888888"


def draw_trace(path: Path, requests: Sequence[Request], summary: TraceSummary, title: str) -> None:
    """Write the picture as PNG: rate over time, index of dispersion by window, shares of steps and of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    figure.suptitle(title)
    _rate(panels[0, 0], requests, summary.span_s)
    _dispersion(panels[0, 1], summary)
    _shares(panels[1, 0], summary.steps, "Steps per image")
    _shares(panels[1, 1], summary.images, "Images per request")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _rate(panel: Any, requests: Sequence[Request], span_s: float) -> None:
    import numpy as np

    times_s = np.array([request.arrival_ns for request in requests]) / NS_PER_S
    most_bins = min(_MOST_BINS, max(_FEWEST_BINS, len(times_s) / _REQUESTS_PER_BIN))
    bin_s = next((length for length in _BINS if span_s / length <= most_bins), max(_BINS))
    first = times_s[0] // bin_s * bin_s
    edges = first + np.arange(int((times_s[-1] - first) // bin_s) + 2) * bin_s
    _, unit_s, unit = next(entry for entry in _UNITS if edges[-1] >= entry[0])
    panel.stairs(np.histogram(times_s, edges)[0], edges / unit_s, fill=True, color=_BLUE)
    panel.set(title="Arrivals over time", xlabel=f"time ({unit})", ylabel=f"requests per {_BINS[bin_s]}")


def _dispersion(panel: Any, summary: TraceSummary) -> None:
    panel.set(
        title="Index of dispersion (variance / mean of counts)", xlabel="window (s)", ylabel="index of dispersion"
    )
    if not summary.windows:
        panel.text(0.5, 0.5, "the trace is too short", ha="center", va="center", transform=panel.transAxes)
        return
    lengths = [counts.window_s for counts in summary.windows]
    panel.axhline(1, color=_GREY, linestyle="--", label="Poisson = 1")
    panel.plot(lengths, [counts.index_of_dispersion for counts in summary.windows], "o-", color=_BLUE, label="trace")
    panel.set(xscale="log", yscale="log")
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 0.5), max(high, 2))  # sampling noise around 1 must look like what it is
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def _shares(panel: Any, shares: Mapping[int, float], title: str) -> None:
    """Bars for the most frequent values in rising order; the rest is one bar."""
    most = sorted(sorted(shares, key=lambda value: -shares[value])[:_MOST_BARS])
    heights = [100 * shares[value] for value in most]
    labels = [str(value) for value in most]
    if len(shares) > len(most):
        labels.append(f"others\n({len(shares) - len(most)})")
        heights.append(100 - sum(heights))
    bars = panel.bar(labels, heights, color=_BLUE)
    panel.bar_label(bars, [_percent(height) for height in heights], padding=2)
    panel.set(title=title, ylabel="share of requests (%)")
    panel.margins(y=0.12)
    slots = max(4, len(labels))  # a single bar must not fill the panel
    panel.set_xlim((len(labels) - 1 - slots) / 2, (len(labels) - 1 + slots) / 2)


def _percent(value: float) -> str:
    if 0 < value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if value < 99.95 else "100"
