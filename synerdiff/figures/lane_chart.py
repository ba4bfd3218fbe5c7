"""What every lane did in some seconds of a run."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from synerdiff.core import NS_PER_S
from synerdiff.figures.style import finish, new_figure, styled

_CHUNK_COLORS = ("#e69f00", "#f6d48a")
_EXCLUSIVE_HATCH = "xxxx"
_FORCED_EDGE = "#c1121f"
_STEPS_SHOWN = 30
_NOTE = (
    "Steps: rows, shaded by rows; +p: padding; c and r: samples that skip guidance (conditional only, difference "
    "reused). Chunks: sample, chunk number."
)


@styled
def lane_chart(
    work: pd.DataFrame,
    start_s: float,
    end_s: float,
    *,
    estimated: bool,
    title: str = "What the lanes do",
    caption: str = "",
) -> Figure:
    """Gantt chart of the work that overlaps [start_s, end_s]: one bar per step or chunk, one line per lane.

    ``work``: the columns of work.parquet. Steps are shaded by rows and name rows and skipping samples; chunks name
    their sample and number, alternate in shade by sample, are hatched when exclusive and outlined red when forced.
    """
    figure = new_figure(12, 0.62 * len(lanes_of(work)) + 2.0)
    most_rows = largest_step(work)
    shown = draw_lanes(figure.subplots(), work, start_s, end_s, most_rows)
    lane_legend(figure, shown, most_rows)
    return finish(figure, title, f"{_NOTE} {caption}", estimated)


@styled
def lanes_of_policies(
    works: Mapping[str, pd.DataFrame],
    *,
    estimated: bool,
    title: str = "What the lanes do",
    caption: str = "",
) -> Figure:
    """``lane_chart`` of the same seconds of several runs, one below the other: about 30 steps from the middle on."""
    first = next(iter(works.values()))
    steps = first[first["kind"] == "step"]
    start_s = float(steps["start_ns"].iloc[len(steps) // 2]) / NS_PER_S
    end_s = start_s + _STEPS_SHOWN * float((steps["end_ns"] - steps["start_ns"]).median()) / NS_PER_S
    most_rows = max(largest_step(work) for work in works.values())
    lines = sum(len(lanes_of(work)) for work in works.values())
    figure = new_figure(12, 0.5 * lines + 0.75 * len(works) + 1.2)
    axes = figure.subplots(len(works), 1, sharex=True, squeeze=False)[:, 0]
    drawn = []
    for axis, (policy, work) in zip(axes, works.items(), strict=True):
        drawn.append(draw_lanes(axis, work, start_s, end_s, most_rows))
        axis.set_title(policy, loc="left")
        if axis is not axes[-1]:
            axis.set_xlabel("")
    lane_legend(figure, pd.concat(drawn), most_rows)
    return finish(figure, title, f"{_NOTE} {caption}", estimated)


def draw_lanes(axis: Axes, work: pd.DataFrame, start_s: float, end_s: float, most_rows: int) -> pd.DataFrame:
    """Draw the chart of ``lane_chart`` into an axis 10.2 inches wide and return the work that is in it.

    ``most_rows``: rows of the darkest step.
    """
    shown = work[(work["end_ns"] > start_s * NS_PER_S) & (work["start_ns"] < end_s * NS_PER_S)]
    lanes = lanes_of(work)
    axis.grid(visible=False, axis="y")
    shades = Normalize(0, most_rows)
    colormap = matplotlib.colormaps["Blues"]
    samples = {name: i for i, name in enumerate(dict.fromkeys(shown.loc[shown["kind"] == "chunk", "sample_ids"]))}
    inches_per_s = 10.2 / (end_s - start_s)
    for row in shown.to_dict("records"):
        place = lanes[(int(row["gpu"]), str(row["lane"]))]
        begin, length = row["start_ns"] / NS_PER_S, (row["end_ns"] - row["start_ns"]) / NS_PER_S
        visible_in = (min(begin + length, end_s) - max(begin, start_s)) * inches_per_s
        middle = (min(begin + length, end_s) + max(begin, start_s)) / 2
        if row["kind"] == "step":
            shade = shades(row["rows"])
            axis.barh(place, length, left=begin, height=0.8, color=colormap(shade), edgecolor="white", linewidth=0.6)
            _label(axis, middle, place, step_label(row["rows"], row["pad_rows"], row["modes"]), visible_in, shade > 0.6)
            continue
        axis.barh(
            place,
            length,
            left=begin,
            height=0.8,
            color=_CHUNK_COLORS[samples[row["sample_ids"]] % 2],
            edgecolor=_FORCED_EDGE if row["forced"] else "#7a5c00",
            linewidth=1.6 if row["forced"] else 0.5,
            hatch=_EXCLUSIVE_HATCH if row["exclusive"] else "",
        )
        _label(axis, middle, place, f"{row['sample_ids']}\n#{row['chunk']}", visible_in, False)
    axis.set_yticks(list(lanes.values()), [f"GPU {gpu} {lane}" for gpu, lane in lanes])
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    axis.set_xlim(start_s, end_s)
    axis.set_xlabel("time (s)")
    return shown


def largest_step(work: pd.DataFrame) -> int:
    """Rows of the largest step, 1 without any."""
    steps = work.loc[work["kind"] == "step", "rows"]
    return int(steps.max()) if len(steps) else 1


def step_label(rows: int, pad_rows: int, modes: str) -> str:
    """Rows, then what is unusual: pads and samples that take the step without guidance."""
    parts = [f"{rows}"]
    if pad_rows:
        parts.append(f"+{pad_rows}p")
    parts += [f"{modes.count(letter)}{letter}" for letter in "cr" if letter in modes]
    return "\n".join(parts)


def lanes_of(work: pd.DataFrame) -> dict[tuple[int, str], int]:
    """Lines of the chart: by GPU, the denoise lane first."""
    found = {(int(gpu), str(lane)) for gpu, lane in zip(work["gpu"], work["lane"], strict=True)}
    ordered = sorted(found, key=lambda key: (key[0], key[1] != "denoise", key[1]))
    return {key: i for i, key in enumerate(ordered)}


def _label(axis: Axes, x_s: float, place: int, text: str, width_in: float, light: bool) -> None:
    """Written only where it fits."""
    if width_in >= 0.068 * max(len(line) for line in text.split("\n")):
        color = "white" if light else "#222222"
        axis.text(x_s, place, text, ha="center", va="center", fontsize=6.5, color=color, linespacing=0.95, clip_on=True)


def lane_legend(figure: Figure, shown: pd.DataFrame, most_rows: int) -> None:
    """What the colours of ``draw_lanes`` mean."""
    handles = [
        Patch(facecolor=matplotlib.colormaps["Blues"](0.65), label=f"step (darkest: {most_rows} rows)"),
        Patch(facecolor=_CHUNK_COLORS[0], edgecolor="#7a5c00", label="decode chunk"),
    ]
    if shown["exclusive"].any():
        handles.append(
            Patch(facecolor="white", hatch=_EXCLUSIVE_HATCH, edgecolor="#7a5c00", label="exclusive (denoise lane held)")
        )
    if shown["forced"].any():
        handles.append(Patch(facecolor="white", edgecolor=_FORCED_EDGE, linewidth=1.6, label="forced"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
