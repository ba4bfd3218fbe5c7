"""What the feedback controller does in a burst: queue, theta and skipped guidance over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from synerdiff.core import NS_PER_S, PPM
from synerdiff.figures.style import finish, new_figure, policy_styles, styled

_BINS = 60


@styled
def controller_over_time(
    trail: Sequence[tuple[int, int, int]],
    work: pd.DataFrame,
    *,
    batch: int,
    estimated: bool,
    title: str = "SynerDiff's controller in a burst",
    caption: str = "",
) -> Figure:
    """Three panels over one time axis: waiting samples, theta, and the share of sample-steps that skip guidance.

    ``trail``: (now_ns, theta_ppm, waiting) at every step, as ``synerdiff-feedback`` keeps it. ``work``: the run's work
    table. Skips are counted in 60 equal bins of time.
    """
    times = np.array([point[0] for point in trail]) / NS_PER_S
    style = policy_styles(["synerdiff-feedback"])["synerdiff-feedback"]
    figure = new_figure(9.5, 5.6)
    queue, theta, skips = figure.subplots(3, 1, sharex=True)
    queue.plot(times, [point[2] for point in trail], drawstyle="steps-post", color="#444444", linewidth=1)
    queue.axhspan(0.25 * batch, 0.75 * batch, color="#cfe3f5", zorder=0)
    queue.set_ylabel("waiting samples")
    queue.annotate("dead band", (times[0], 0.5 * batch), fontsize=7.5, va="center", color="#33607f")
    theta.plot(times, [point[1] / PPM for point in trail], drawstyle="steps-post", color=style.color)
    theta.set_ylabel("theta")
    steps = work[work["kind"] == "step"]
    skipped = steps["modes"].str.count("r") + (
        steps["modes"].str.count("c") if steps["modes"].str.contains("g").any() else 0
    )
    edges = np.linspace(times[0], float(steps["end_ns"].max()) / NS_PER_S, _BINS + 1)
    middle = steps["start_ns"].to_numpy(float) / NS_PER_S
    taken = np.histogram(middle, edges, weights=steps["modes"].str.len().to_numpy(float))[0]
    share = np.histogram(middle, edges, weights=skipped.to_numpy(float))[0] / np.maximum(taken, 1)
    skips.stairs(100 * share, edges, fill=True, color=style.color, alpha=0.5)
    skips.set_ylabel("guidance skipped (%)")
    skips.set_ylim(bottom=0)
    skips.set_xlabel("time (s)")
    return finish(figure, title, caption, estimated)
