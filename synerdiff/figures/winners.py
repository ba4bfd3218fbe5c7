"""Who wins where: maps over cells of contention, decode share, step mix and decode lanes."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from synerdiff.figures.style import finish, new_figure, policy_styles, styled

SECOND_GPU = "decode on\n2nd GPU"
_TITLES = {
    "saturation": "throughput at saturation",
    "mean": "mean latency",
    "p99": "P99 latency",
    "goodput": "goodput",
}


@styled
def winner_map(
    found: pd.DataFrame, panels: Sequence[tuple[str, float | None]], *, focus: str | None, title: str, caption: str = ""
) -> Figure:
    """One panel per (measure, load): a cell's colour is its best policy (``focus`` left out), its numbers the gain over
    the best baseline and, in brackets, that of ``focus`` over this winner.

    ``found``: one row per cell and measure: profile, contention, decode_share, decode_gpus, workload, measure, load,
    policy, gain, focus_gain (ratios, above 1 is better) and estimated.
    """
    rows = [tuple(row) for row in found[["profile", "workload", "decode_share"]].drop_duplicates().to_numpy()]
    columns = _columns(found)
    styles = policy_styles(found["policy"])
    figure = new_figure(2.6 + len(panels) * (0.95 * len(columns) + 0.4), 0.42 * len(rows) + 2.0)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (measure, load) in zip(axes, panels, strict=True):
        chosen = found[
            (found["measure"] == measure) & (found["load"].isna() if load is None else found["load"] == load)
        ]
        image = np.ones((len(rows), len(columns), 3))
        for record in chosen.to_dict("records"):
            y = rows.index((record["profile"], record["workload"], record["decode_share"]))
            x = columns.index(_column(record))
            color = np.array(to_rgb(styles[record["policy"]].color))
            image[y, x] = 1 - 0.55 * (1 - color)
            axis.annotate(_cell_text(record), (x, y), ha="center", va="center", fontsize=6.6)
        axis.imshow(image, aspect="auto")
        _ticks(axis, [c if isinstance(c, str) else f"x{c:g}" for c in columns])
        axis.set_title(_TITLES[measure] + ("" if load is None else f", load {load:g}"), loc="left")
        axis.set_xlabel("contention (factor on slowdown - 1)")
    labels = [
        f"{profile}, {workload}" + (f", decode x{share:g}" if share != 1 else "") for profile, workload, share in rows
    ]
    axes[0].set_yticks(range(len(rows)), labels, fontsize=7.5)
    handles = [_patch(name, style.color) for name, style in styles.items()]
    figure.legend(
        handles=handles, loc="outside right upper", title="best policy" + (f"\n(but {focus})" if focus else "")
    )
    meaning = "Colour: the best policy of the cell. First number: its gain over the best baseline."
    meaning += f" In brackets: the gain of {focus} over it." if focus else ""
    return finish(figure, title, f"{meaning} {caption}", bool(found["estimated"].any()))


@styled
def gain_map(found: pd.DataFrame, *, policy: str, title: str, caption: str = "") -> Figure:
    """Contention across, load upwards: how much better ``policy`` is than the best baseline in mean latency, and in the
    top row in throughput at saturation. One panel per (profile, workload, decode share).

    ``found``: profile, workload, decode_share, contention, measure (mean or saturation), load, gain (ratio, above 1 is
    better), estimated.
    """
    groups = list(found.groupby(["workload", "profile", "decode_share"], sort=False))
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = new_figure(3.2 * across + 1.0, 2.5 * down + 1.2)
    axes = figure.subplots(down, across, squeeze=False)
    levels = sorted(set(found["contention"].tolist()))
    loads = sorted({load for load in found["load"].tolist() if load == load})
    scale = max(0.1, float(found["gain"].map(lambda ratio: abs(log(ratio))).max()))
    for axis, (key, group) in zip(axes.flat, groups, strict=False):
        workload, profile, share = key
        table = np.full((len(loads) + 1, len(levels)), np.nan)
        for record in group.to_dict("records"):
            y = len(loads) if record["measure"] == "saturation" else loads.index(record["load"])
            x = levels.index(record["contention"])
            table[y, x] = log(record["gain"])
            axis.annotate(_percent(record["gain"]), (x, y), ha="center", va="center", fontsize=7.5)
        axis.imshow(table, origin="lower", aspect="auto", cmap="RdBu", vmin=-scale, vmax=scale)
        _ticks(axis, [f"x{level:g}" for level in levels])
        axis.set_yticks(range(len(loads) + 1), [*(f"load {load:g}" for load in loads), "saturation\nthroughput"])
        axis.set_title(f"{workload}" + (f", decode x{share:g}" if share != 1 else "") + f"\n{profile}", loc="left")
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("contention")
    meaning = (
        f"Blue: {policy} beats the best baseline; red: it loses. Load rows: mean latency, baseline / {policy} - 1."
    )
    return finish(figure, title, f"{meaning} {caption}", bool(found["estimated"].any()))


def _columns(found: pd.DataFrame) -> list[Any]:
    shared = found[found["decode_gpus"].map(_shares_gpu)]
    columns: list[Any] = sorted(set(shared["contention"].tolist()))
    return columns + ([SECOND_GPU] if len(shared) < len(found) else [])


def _column(record: dict[Any, Any]) -> Any:
    return record["contention"] if _shares_gpu(record["decode_gpus"]) else SECOND_GPU


def _shares_gpu(decode_gpus: str) -> bool:
    return "0" in decode_gpus.split(",")


def _cell_text(record: dict[Any, Any]) -> str:
    focus = record["focus_gain"]
    return _percent(record["gain"]) + (f" ({_percent(focus)})" if focus == focus and focus is not None else "")


def _percent(ratio: float) -> str:
    percent = 100 * (ratio - 1)
    return f"{percent:+.0f}%" if abs(percent) >= 0.5 else "0%"


def _ticks(axis: Axes, labels: list[str]) -> None:
    axis.set_xticks(range(len(labels)), labels)
    axis.grid(False)
    axis.tick_params(length=0)


def _patch(name: str, color: str) -> Any:
    from matplotlib.patches import Patch

    red, green, blue = (1 - 0.55 * (1 - part) for part in to_rgb(color))
    return Patch(facecolor=(red, green, blue), label=name)
