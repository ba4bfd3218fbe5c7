"""The metric of an SLO against the size of the fleet, or its rate: one line per profile and policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synerdiff.config.capacity import Target
from synerdiff.figures.style import (
    MARK,
    finish,
    panel_grid,
    panel_title,
    plain_log_ticks,
    policy_legend,
    policy_styles,
    styled,
)


@styled
def capacity_figure(
    points: Sequence[Mapping[str, Any]],
    target: Target,
    find: str,
    title: str,
    caption: str,
    filled: str = "kept with its whole 95% interval (bar)",
) -> Figure:
    """One panel per profile. Points: profile, estimated, policy, gpus, rate_per_s, value, low, high, keeps, answer.

    ``filled``: what ``keeps`` means, for the note.
    """
    profiles = list(dict.fromkeys(point["profile"] for point in points))
    styles = policy_styles(point["policy"] for point in points)
    column = "gpus" if find == "gpus" else "rate_per_s"
    figure, grid = panel_grid(len(profiles), 3, 2.4, 1.0, sharey=True)
    for axis, profile in zip(grid.flat, profiles, strict=False):
        own = [point for point in points if point["profile"] == profile and isfinite(point["value"])]
        for policy, style in styles.items():
            line = sorted((point for point in own if point["policy"] == policy), key=lambda point: point[column])
            looks: Any = {"color": style.color, "linestyle": style.linestyle, "linewidth": 0.9}
            axis.plot([point[column] for point in line], [point["value"] for point in line], **looks)
            place = list(styles).index(policy) - (len(styles) - 1) / 2
            for point in line:
                # Side by side, so that one bar does not hide another.
                x, y = point[column] + (0.07 * place if find == "gpus" else 0), point["value"]
                if point["low"] is not None and isfinite(point["high"]):
                    axis.plot([x, x], [point["low"], point["high"]], color=style.color, linewidth=0.8)
                fill, size = style.color if point["keeps"] else "white", 7 if point["answer"] else 4
                axis.plot(x, y, style.marker, color=style.color, markerfacecolor=fill, markersize=size)
        axis.axhline(target.bound, color=MARK, linewidth=0.9, zorder=1)
        axis.set_xlabel("GPUs" if find == "gpus" else "requests/s")
        axis.xaxis.set_major_locator(MaxNLocator(integer=find == "gpus", nbins=7))
        axis.margins(x=0.08)
        panel_title(axis, profile, any(point["estimated"] for point in own))
    values = [point["value"] for point in points if isfinite(point["value"])] + [target.bound]
    first = grid[0, 0]
    if target.quantile is not None:
        first.set_ylim(0.6 * min(values), 1.6 * max(values))
        for axis in grid[:, 0]:
            plain_log_ticks(axis)
            axis.set_ylabel(f"{target.name} latency (s)")
    else:
        room = max(0.02, 0.08 * float(np.ptp(values)))
        first.set_ylim(min(values) - room, min(1.0, max(values)) + room)
        for axis in grid[:, 0]:
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
            axis.set_ylabel("share of requests within their limit")
    policy_legend(figure, styles)
    goal = "at most" if target.quantile is not None else "at least"
    note = (
        f"Red: the SLO, {goal} {target.text(target.bound)}. Filled: {filled}. "
        "Large: the answer of each line. Only what the search tried is drawn."
    )
    return finish(figure, title, f"{note} {caption}")
