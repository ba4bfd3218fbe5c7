"""Where the time goes: mean latency by stage, per policy, at given loads."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from synerdiff.figures.load_curves import panel_rows
from synerdiff.figures.style import finish, new_figure, policy_styles, styled
from synerdiff.results.metrics import STAGES

STAGE_LOOKS = {
    "queue": ("#bdbdbd", ""),
    "denoise": ("#0072b2", ""),
    "decode_wait": ("#f0e442", "////"),
    "decode": ("#d55e00", ""),
}
STAGE_NAMES = {"queue": "queue", "denoise": "denoise", "decode_wait": "decode wait", "decode": "decode"}


@styled
def where_the_time_goes(
    runs: pd.DataFrame, loads: Sequence[float], *, title: str = "Where the time goes", caption: str = ""
) -> Figure:
    """Stacked bars of queue, denoise, decode wait and decode: mean seconds over seeds, one bar per policy.

    ``runs``: one row per run with profile, estimated, policy, load, skip_fraction, request_latency_mean_s and
    STAGE_mean_s for each stage. One row of panels per profile, one column per load, each with its own scale.
    """
    rows = list(panel_rows(runs))
    names = list(policy_styles(runs["policy"]))
    figure = new_figure(3.6 * len(loads) + 1.6, (0.32 * len(names) + 0.9) * len(rows) + 1.4)
    grid = figure.subplots(len(rows), len(loads), squeeze=False, sharey=True)
    for axes, (label, group) in zip(grid, rows, strict=True):
        for axis, load in zip(axes, loads, strict=True):
            _bars(axis, group[group["load"] == load], names)
            axis.set_title(f"{label}, load {load:g}" if load == loads[0] else f"load {load:g}", loc="left")
    for axis in grid[-1]:
        axis.set_xlabel("mean seconds a request")
    handles = [
        Patch(facecolor=color, hatch=hatch, edgecolor="#555555", linewidth=0.4, label=STAGE_NAMES[stage])
        for stage, (color, hatch) in STAGE_LOOKS.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    note = (
        "Means over runs of each request's last-finishing image; at each bar the mean latency and the share of guided "
        f"steps that were skipped. Scales differ between panels. {caption}"
    )
    return finish(figure, title, note, bool(runs["estimated"].any()))


def _bars(axis: Axes, runs: pd.DataFrame, names: Sequence[str]) -> None:
    axis.grid(visible=False, axis="y")
    for place, name in enumerate(names):
        group = runs[runs["policy"] == name]
        if group.empty:
            axis.text(0, place, " not run", va="center", fontsize=7.5, color="#888888")
            continue
        left = 0.0
        for stage in STAGES:
            color, hatch = STAGE_LOOKS[stage]
            seconds = float(group[f"{stage}_mean_s"].mean())
            axis.barh(
                place, seconds, left=left, color=color, hatch=hatch, edgecolor="#555555", linewidth=0.4, height=0.7
            )
            left += seconds
        skipped = float(group["skip_fraction"].mean())
        skip = f", {skipped:.0%} skipped" if skipped > 0 else ""
        axis.text(left, place, f" {left:.3g} s{skip}", va="center", fontsize=7.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    # Room for the texts at the bars' ends.
    axis.set_xlim(0, axis.get_xlim()[1] * 1.35)
