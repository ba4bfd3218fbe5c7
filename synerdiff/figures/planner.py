"""SynerDiff at work: a plan of its dynamic program, and its controller in a burst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synerdiff.core import NS_PER_S, PPM
from synerdiff.figures.style import finish, new_figure, panel_title, policy_styles, styled

_GUIDED, _SKIPPED, _CHUNKS = "#9fb8cf", "#dfe8f0", ("#d55e00", "#e69f5c")
_MS = 1_000_000
_BINS = 60


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of a plan: its begin and end, and the chunks beside it as (image, chunk, begin, end); times in ns."""

    start_ns: int
    end_ns: int
    skipped: bool
    chunks: tuple[tuple[int, int, int, int], ...]


@styled
def plan_picture(
    steps: Sequence[PlannedStep],
    *,
    chunk_count: int,
    images: int,
    full_ns: int,
    credit_ns: int,
    theta: float,
    estimated: bool,
    caption: str = "",
) -> Figure:
    """Three panels: states (steps done, chunks done), lanes over time, and what the constraint leaves at every step."""
    figure = new_figure(3.9)
    grid = figure.add_gridspec(2, 2, width_ratios=[1, 1.35])
    states, lanes, left = (figure.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    _states(states, steps, chunk_count * images)
    _lanes(lanes, steps)
    j = range(1, len(steps) + 1)
    slack = [(count * full_ns + credit_ns - theta * step.end_ns) / _MS for count, step in zip(j, steps, strict=True)]
    left.bar_label(left.bar(j, slack, width=0.5, color=_GUIDED), [f"{value:.1f}" for value in slack], padding=2)
    left.margins(y=0.15)
    left.set(xlabel="steps done (j)", ylabel="left (ms)", xticks=list(j))
    titles = ("states f[j][i][k], the plan's path", "its lanes (colours: images; numbers: chunks)")
    for axis, text in zip(
        (states, lanes, left), (*titles, f"j T_full + credit - {theta:g} f, at least 0"), strict=True
    ):
        panel_title(axis, text, estimated)
    return finish(figure, "A plan of the dynamic program", caption)


def _states(axis: Axes, steps: Sequence[PlannedStep], total: int) -> None:
    points = [(j, i) for j in range(len(steps) + 1) for i in range(total + 1)]
    axis.plot([j for j, _ in points], [i for _, i in points], "o", color="#d5d5d5", markersize=3)
    done = 0
    axis.plot(0, 0, "o", color=_CHUNKS[0], markersize=5)
    for j, step in enumerate(steps):
        after = done + len(step.chunks)
        arrow = {"arrowstyle": "-|>", "color": _CHUNKS[0], "linestyle": "--" if step.skipped else "-"}
        axis.annotate("", (j + 1, after), (j, done), arrowprops=arrow)
        label = f"m={len(step.chunks)}" + (", skip" if step.skipped else "")
        axis.annotate(label, (j + 0.5, (done + after) / 2), xytext=(5, -7), textcoords="offset points", fontsize=7)
        axis.plot(j + 1, after, "o", color=_CHUNKS[0], markersize=5)
        done = after
    axis.set(xlabel="steps done (j)", ylabel="chunks done (i)", xticks=range(len(steps) + 1), yticks=range(total + 1))
    axis.margins(x=0.15)


def _lanes(axis: Axes, steps: Sequence[PlannedStep]) -> None:
    pieces = []
    for j, step in enumerate(steps):
        text = f"{j + 1}" + (" skip" if step.skipped else "")
        pieces.append((1, step.start_ns, step.end_ns, _SKIPPED if step.skipped else _GUIDED, text))
        pieces += [(0, begin, end, _CHUNKS[image % 2], "") for image, _, begin, end in step.chunks]
        if step.chunks:
            numbers = " " + ", ".join(str(chunk) for _, chunk, _, _ in step.chunks)
            axis.text(step.chunks[-1][-1] / _MS, 0, numbers, va="center", fontsize=6.5)
    for lane, begin_ns, end_ns, color, text in pieces:
        axis.barh(lane, (end_ns - begin_ns) / _MS, left=begin_ns / _MS, height=0.8, color=color, edgecolor="white")
        axis.text((begin_ns + end_ns) / 2 / _MS, lane, text, ha="center", va="center", fontsize=6.5)
    axis.set_yticks([0, 1], ["decode", "denoise"])
    axis.set_xlabel("time (ms)")
    axis.grid(axis="y", visible=False)


@styled
def controller_over_time(
    trail: Sequence[tuple[int, int, int]],
    work: pd.DataFrame,
    *,
    batch: int,
    estimated: bool,
    caption: str = "",
) -> Figure:
    """Three panels over one time axis: waiting samples, theta, and the share of sample-steps that skip guidance.

    ``trail``: (now_ns, theta_ppm, waiting) at every step, as ``synerdiff-feedback`` keeps it. ``work``: the run's work
    table. Skips are counted in 60 equal bins of time.
    """
    times = np.array([point[0] for point in trail]) / NS_PER_S
    color = policy_styles(["synerdiff-feedback"])["synerdiff-feedback"].color
    figure = new_figure(4.2)
    queue, theta, skips = figure.subplots(3, 1, sharex=True)
    queue.plot(times, [point[2] for point in trail], drawstyle="steps-post", color="#444444", linewidth=0.8)
    queue.axhspan(0.25 * batch, 0.75 * batch, color="#cfe3f5", zorder=0)
    queue.annotate("dead band", (times[0], 0.5 * batch), fontsize=6.5, va="center", color="#33607f")
    theta.plot(times, [point[1] / PPM for point in trail], drawstyle="steps-post", color=color)
    steps = work[work["kind"] == "step"]
    skipped = steps["modes"].str.count("r") + (
        steps["modes"].str.count("c") if steps["modes"].str.contains("g").any() else 0
    )
    edges = np.linspace(times[0], float(steps["end_ns"].max()) / NS_PER_S, _BINS + 1)
    starts_s = steps["start_ns"].to_numpy(float) / NS_PER_S
    taken = np.histogram(starts_s, edges, weights=steps["modes"].str.len().to_numpy(float))[0]
    share = np.histogram(starts_s, edges, weights=skipped.to_numpy(float))[0] / np.maximum(taken, 1)
    skips.stairs(100 * share, edges, fill=True, color=color, alpha=0.5)
    skips.set_ylim(bottom=0)
    skips.set_xlabel("time (s)")
    for axis, name in zip((queue, theta, skips), ("waiting samples", "theta", "guidance skipped (%)"), strict=True):
        panel_title(axis, name, estimated)
    return finish(figure, "SynerDiff's controller in a burst", caption)
