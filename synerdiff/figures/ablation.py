"""What each part of SynerDiff adds: bars of paired ratios with intervals, switched on one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from synerdiff.figures.style import finish, new_figure, styled

_PANELS = {"saturation": "throughput at saturation", "mean": "mean latency", "p99": "P99 latency"}
_BLUE, _GREY = "#0072b2", "#8a8a8a"


@styled
def ablation_bars(found: pd.DataFrame, *, base: str, title: str, caption: str = "") -> Figure:
    """Per workload a row of panels (throughput, mean and P99 latency): change against ``base``, one bar per policy.

    ``found``: cell (text), policy, measure, change, low, high (0.1 = 10% more), skip_fraction and estimated; policies
    in the order in which parts are switched on.
    """
    cells = list(dict.fromkeys(found["cell"]))
    policies = list(dict.fromkeys(found["policy"]))
    figure = new_figure(11.5, (0.27 * len(policies) + 0.9) * len(cells) + 1.0)
    axes = figure.subplots(len(cells), len(_PANELS), squeeze=False, sharey=True, sharex="col")
    for row, cell in zip(axes, cells, strict=True):
        for axis, (measure, label) in zip(row, _PANELS.items(), strict=True):
            chosen = found[(found["cell"] == cell) & (found["measure"] == measure)].set_index("policy").loc[policies]
            change = 100 * chosen["change"].to_numpy(float)
            error = np.abs(100 * chosen[["low", "high"]].to_numpy(float).T - change)
            better = change >= 0 if measure == "saturation" else change <= 0
            colors = [_BLUE if good else _GREY for good in better]
            axis.barh(range(len(policies)), change, color=colors, height=0.62)
            axis.errorbar(
                change, range(len(policies)), xerr=error, fmt="none", ecolor="#222222", elinewidth=1, capsize=2
            )
            axis.axvline(0, color="#222222", linewidth=0.8)
            axis.set_yticks(range(len(policies)), policies)
            axis.set_ylim(len(policies) - 0.5, -0.5)
            axis.set_title(f"{cell}\n{label}" if axis is row[0] else label, loc="left")
            if measure == "saturation":
                for y, skip in enumerate(chosen["skip_fraction"]):
                    if skip >= 0.005:
                        end = max(0.0, float(error[1, y] + change[y]))
                        offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
                        axis.annotate(f"skips {skip:.0%}", (end, y), **offset)
    for axis in axes[-1]:
        axis.set_xlabel(f"change against {base} (%)")
    note = "Whiskers: 95% t intervals of paired ratios over seeds. Grey: worse than the base."
    return finish(figure, title, f"{note} {caption}", bool(found["estimated"].any()))
