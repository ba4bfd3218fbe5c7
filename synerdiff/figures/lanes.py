"""Where the time goes: what every lane did in some seconds of a run, and mean latency by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from synerdiff.core import NS_PER_S
from synerdiff.figures.load import row_panels
from synerdiff.figures.style import (
    PAGE_IN,
    finish,
    legend_above,
    new_figure,
    panel_title,
    policy_styles,
    styled,
    x_labels,
)
from synerdiff.results.metrics import STAGES

_CHUNK_COLORS, _CHUNK_EDGE = ("#e69f00", "#f6d48a"), "#7a5c00"
_EXCLUSIVE_HATCH, _FORCED_EDGE = "xxxx", "#c1121f"
_STEPS_SHOWN = 20
_STAGE_LOOKS = {
    "queue": ("#bdbdbd", ""),
    "denoise": ("#0072b2", ""),
    "decode_wait": ("#f0e442", "////"),
    "decode": ("#d55e00", ""),
}


@styled
def lane_chart(
    works: Mapping[str, pd.DataFrame],
    window_s: tuple[float, float] | None = None,
    *,
    estimated: bool,
    title: str = "What the lanes do",
    caption: str = "",
) -> Figure:
    """Gantt charts of the same seconds of several runs, one below the other: a bar per step or chunk, a line per lane.

    ``works``: label -> columns of work.parquet. ``window_s``: start and end; by default about 20 steps from the middle
    of the first run on. Steps are shaded by rows and name rows and skipping samples; chunks name their sample and
    number, alternate in shade by sample, are hatched when exclusive and outlined red when forced.
    """
    start_s, end_s = _middle(next(iter(works.values()))) if window_s is None else window_s
    steps = [
        int(work.loc[work["kind"] == "step", "rows"].max()) for work in works.values() if (work["kind"] == "step").any()
    ]
    most_rows = max(steps, default=1)
    lines = [len(lanes_of(work)) for work in works.values()]
    figure = new_figure(0.3 * sum(lines) + 0.4 * len(works) + 1.1)
    axes = figure.subplots(len(works), 1, sharex=True, squeeze=False, height_ratios=lines)[:, 0]
    drawn = []
    for axis, (name, work) in zip(axes, works.items(), strict=True):
        drawn.append(_draw(axis, work, start_s, end_s, most_rows))
        panel_title(axis, name, estimated)
    axes[-1].set_xlabel("time (s)")
    shown = pd.concat(drawn)
    handles: list[Artist] = [
        Patch(facecolor=matplotlib.colormaps["Blues"](0.65), label=f"step (darkest: {most_rows} rows)"),
        Patch(facecolor=_CHUNK_COLORS[0], edgecolor=_CHUNK_EDGE, label="decode chunk"),
    ]
    if shown["exclusive"].any():
        handles.append(
            Patch(facecolor="white", hatch=_EXCLUSIVE_HATCH, edgecolor=_CHUNK_EDGE, label="exclusive (steps wait)")
        )
    if shown["forced"].any():
        handles.append(Patch(facecolor="white", edgecolor=_FORCED_EDGE, linewidth=0.9, label="forced"))
    legend_above(figure, handles)
    note = (
        "Steps: rows; +p: padding; c, r: samples that skip guidance (conditional, difference reused). Chunks: number."
    )
    return finish(figure, title, f"{note} {caption}")


def _middle(work: pd.DataFrame) -> tuple[float, float]:
    steps = work[work["kind"] == "step"]
    start_s = float(steps["start_ns"].iloc[len(steps) // 2]) / NS_PER_S
    return start_s, start_s + _STEPS_SHOWN * float((steps["end_ns"] - steps["start_ns"]).median()) / NS_PER_S


def _draw(axis: Axes, work: pd.DataFrame, start_s: float, end_s: float, most_rows: int) -> pd.DataFrame:
    """Draw the work that overlaps the window and return it."""
    shown = work[(work["end_ns"] > start_s * NS_PER_S) & (work["start_ns"] < end_s * NS_PER_S)]
    lanes = lanes_of(work)
    axis.grid(visible=False, axis="y")
    shades, colormap = Normalize(0, most_rows), matplotlib.colormaps["Blues"]
    samples = {name: i for i, name in enumerate(dict.fromkeys(shown.loc[shown["kind"] == "chunk", "sample_ids"]))}
    for row in shown.to_dict("records"):
        place = lanes[(int(row["gpu"]), str(row["lane"]))]
        begin_s, length_s = row["start_ns"] / NS_PER_S, (row["end_ns"] - row["start_ns"]) / NS_PER_S
        visible_s = (max(begin_s, start_s), min(begin_s + length_s, end_s))
        if row["kind"] == "step":
            text, dark = step_label(row["rows"], row["pad_rows"], row["modes"]), shades(row["rows"]) > 0.6
            looks: Any = {"color": colormap(shades(row["rows"])), "edgecolor": "white", "linewidth": 0.4}
        else:
            text, dark = f"{row['chunk']}", False
            looks = {
                "color": _CHUNK_COLORS[samples.get(row["sample_ids"], 0) % 2],
                "edgecolor": _FORCED_EDGE if row["forced"] else _CHUNK_EDGE,
                "linewidth": 0.9 if row["forced"] else 0.4,
                "hatch": _EXCLUSIVE_HATCH if row["exclusive"] else "",
            }
        axis.barh(place, length_s, left=begin_s, height=0.86, **looks)
        width_in = (visible_s[1] - visible_s[0]) / (end_s - start_s) * (PAGE_IN - 1.1)
        # Written only where it fits.
        if width_in >= 0.06 * max(len(line) for line in text.split("\n")):
            fit: Any = {"ha": "center", "va": "center", "fontsize": 5.5, "linespacing": 0.9, "clip_on": True}
            axis.text(sum(visible_s) / 2, place, text, color="white" if dark else "#222222", **fit)
    axis.set_yticks(list(lanes.values()), [f"GPU {gpu} {lane}" for gpu, lane in lanes])
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    axis.set_xlim(start_s, end_s)
    return shown


def step_label(rows: int, pad_rows: int, modes: str) -> str:
    """Rows, then what is unusual: pads and samples that take the step without guidance."""
    parts = [f"{rows}"]
    if pad_rows:
        parts.append(f"+{pad_rows}p")
    parts += [f"{modes.count(letter)}{letter}" for letter in "cr" if letter in modes]
    return "\n".join(parts)


def lanes_of(work: pd.DataFrame) -> dict[tuple[int, str], int]:
    """Lines of the chart: by GPU, the denoise lane first."""
    lanes = {(int(gpu), str(lane)) for gpu, lane in zip(work["gpu"], work["lane"], strict=True)}
    ordered = sorted(lanes, key=lambda key: (key[0], key[1] != "denoise", key[1]))
    return {key: i for i, key in enumerate(ordered)}


@styled
def where_the_time_goes(runs: pd.DataFrame, loads: Sequence[float], *, caption: str = "") -> Figure:
    """Stacked bars of queue, denoise, decode wait and decode: mean seconds over seeds, one bar per policy.

    ``runs``: one row per run with profile, estimated, policy, load, skip_fraction, request_latency_mean_s and
    STAGE_mean_s for each stage. One row of panels per profile, one column per load, each with its own scale.
    """
    names = list(policy_styles(runs["policy"]))
    figure, rows = row_panels(runs, len(loads), 0.2 * max(4, len(names)) + 0.5, 1.0, sharey=True)
    for axes, label, group, estimated in rows:
        for axis, load in zip(axes, loads, strict=True):
            _bars(axis, group[group["load"] == load], names)
            text = f"{label}\nload {load:g}" if axis is axes[0] else f"load {load:g}"
            panel_title(axis, text, estimated)
    x_labels(rows[-1][0], "mean seconds a request")
    looks = ((stage.replace("_", " "), color, hatch) for stage, (color, hatch) in _STAGE_LOOKS.items())
    legend_above(
        figure, [Patch(facecolor=c, hatch=h, edgecolor="#555555", linewidth=0.4, label=name) for name, c, h in looks]
    )
    note = (
        "Means over runs of each request's last-finishing image; at each bar the mean latency and the share of guided "
        f"steps that were skipped. Scales differ between panels. {caption}"
    )
    return finish(figure, "Where the time goes", note)


def _bars(axis: Axes, runs: pd.DataFrame, names: Sequence[str]) -> None:
    axis.grid(visible=False, axis="y")
    for place, name in enumerate(names):
        group = runs[runs["policy"] == name]
        if group.empty:
            axis.text(0, place, " not run", va="center", fontsize=6.5, color="#888888")
            continue
        left = 0.0
        for stage in STAGES:
            color, hatch = _STAGE_LOOKS[stage]
            looks: Any = {"color": color, "hatch": hatch, "edgecolor": "#555555", "linewidth": 0.4, "height": 0.72}
            seconds = float(group[f"{stage}_mean_s"].mean())
            axis.barh(place, seconds, left=left, **looks)
            left += seconds
        skipped = float(group["skip_fraction"].mean())
        skip = f", {skipped:.0%} skipped" if skipped >= 0.005 else ""
        axis.text(left, place, f" {left:.3g} s{skip}", va="center", fontsize=6.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    # Room for the texts at the bars' ends.
    axis.set_xlim(0, axis.get_xlim()[1] * 1.85)
