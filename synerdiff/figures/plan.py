"""A plan of SynerDiff's dynamic program: its path through the states, its lanes, and the constraint that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synerdiff.figures.style import finish, new_figure, styled

_GUIDED, _SKIPPED, _CHUNKS = "#9fb8cf", "#dfe8f0", ("#d55e00", "#e69f5c")
_MS = 1_000_000


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
    title: str = "A plan of the dynamic program",
    caption: str = "",
) -> Figure:
    """Three panels: states (steps done, chunks done), lanes over time, and what the constraint leaves at every step."""
    figure = new_figure(11.0, 6.0)
    grid = figure.add_gridspec(2, 2, width_ratios=[1, 1.35])
    _states(figure.add_subplot(grid[:, 0]), steps, chunk_count * images)
    _lanes(figure.add_subplot(grid[0, 1]), steps)
    _constraint(figure.add_subplot(grid[1, 1]), steps, full_ns, credit_ns, theta)
    return finish(figure, title, caption, estimated)


def _states(axis: Axes, steps: Sequence[PlannedStep], total: int) -> None:
    points = [(j, i) for j in range(len(steps) + 1) for i in range(total + 1)]
    axis.plot([j for j, _ in points], [i for _, i in points], "o", color="#d5d5d5", markersize=4)
    done = 0
    for j, step in enumerate(steps):
        after = done + len(step.chunks)
        line = "--" if step.skipped else "-"
        axis.annotate(
            "", (j + 1, after), (j, done), arrowprops={"arrowstyle": "-|>", "color": _CHUNKS[0], "linestyle": line}
        )
        label = f"m={len(step.chunks)}" + (", skip" if step.skipped else "")
        axis.annotate(label, (j + 0.5, (done + after) / 2), xytext=(6, -8), textcoords="offset points", fontsize=8)
        axis.plot(j + 1, after, "o", color=_CHUNKS[0], markersize=6)
        done = after
    axis.plot(0, 0, "o", color=_CHUNKS[0], markersize=6)
    axis.set_title("states f[j][i][k] and the plan's path", loc="left")
    axis.set(xlabel="steps done (j)", ylabel="chunks done (i)", xticks=range(len(steps) + 1), yticks=range(total + 1))
    axis.margins(x=0.12)


def _lanes(axis: Axes, steps: Sequence[PlannedStep]) -> None:
    for j, step in enumerate(steps):
        span = (step.start_ns / _MS, (step.end_ns - step.start_ns) / _MS)
        color = _SKIPPED if step.skipped else _GUIDED
        axis.broken_barh([span], (1.1, 0.8), facecolor=color, edgecolor="white")
        axis.annotate(f"{j + 1}" + (" skip" if step.skipped else ""), (span[0] + span[1] / 2, 1.5), ha="center",
                      va="center", fontsize=8)  # fmt: skip
        for image, chunk, begin_ns, end_ns in step.chunks:
            span = (begin_ns / _MS, (end_ns - begin_ns) / _MS)
            axis.broken_barh([span], (0.1, 0.8), facecolor=_CHUNKS[image % 2], edgecolor="white")
            axis.annotate(str(chunk), (span[0] + span[1] / 2, 0.5), ha="center", va="center", fontsize=7)
    axis.set_yticks([0.5, 1.5], ["decode", "denoise"])
    axis.set_title("its lanes (two colours: two images; numbers: chunks)", loc="left")
    axis.set_xlabel("time (ms)")
    axis.grid(axis="y", visible=False)


def _constraint(axis: Axes, steps: Sequence[PlannedStep], full_ns: int, credit_ns: int, theta: float) -> None:
    j = range(1, len(steps) + 1)
    slack = [(count * full_ns + credit_ns - theta * step.end_ns) / _MS for count, step in zip(j, steps, strict=True)]
    bars = axis.bar(j, slack, width=0.5, color=_GUIDED)
    axis.bar_label(bars, [f"{value:.1f}" for value in slack], fontsize=8, padding=2)
    axis.margins(y=0.15)
    axis.set_title(f"feasible while j T_full + credit - {theta:g} f >= 0", loc="left")
    axis.set(xlabel="steps done (j)", ylabel="left (ms)", xticks=list(j))
