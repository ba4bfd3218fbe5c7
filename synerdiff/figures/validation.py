"""Predicted against measured: errors per metric and case, requests one by one, and both timelines."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from synerdiff.figures.lane_chart import draw_lanes, lane_legend, lanes_of, largest_step
from synerdiff.figures.style import finish, new_figure, policy_legend, policy_styles, styled

FAR = 0.5
"""Interval ends beyond this, and beyond twice the largest error, are cut off at the edge."""
_WITHIN, _BEYOND = "#2a7f62", "#c1121f"


@styled
def prediction_errors(
    errors: pd.DataFrame, *, title: str = "How far the prediction was off", caption: str = ""
) -> Figure:
    """One panel per metric, one line per case: the median error with its interval, and the tolerance as a band.

    ``errors``: case, metric, error, low, high (shares; far or infinite bounds are drawn to the edge), limit (NaN: not
    judged).
    """
    metrics = list(dict.fromkeys(errors["metric"]))
    cases = list(dict.fromkeys(errors["case"]))
    figure = new_figure(12, 0.26 * len(cases) + 1.9)
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    places = {case: place for place, case in enumerate(cases)}
    for axis, metric in zip(axes, metrics, strict=True):
        of_metric = errors[errors["metric"] == metric]
        ends = np.abs(of_metric[["low", "high"]].to_numpy(float))
        limit = float(of_metric["limit"].max())
        farthest = max([0.01, *of_metric["error"].abs(), *([limit] if limit == limit else [])])
        # One disturbed repeat must not squeeze all the others into a point.
        reach = 1.15 * max(farthest, *np.minimum(ends[np.isfinite(ends)], max(FAR, 2 * farthest)), 0.01)
        if limit == limit:
            axis.axvspan(-100 * limit, 100 * limit, color="#e7f1ec", zorder=0)
        axis.axvline(0, color="#888888", linewidth=0.8)
        for row in of_metric.to_dict("records"):
            place, value = places[row["case"]], 100 * row["error"]
            low, high = (100 * float(np.clip(row[end], -reach, reach)) for end in ("low", "high"))
            judged = row["limit"] == row["limit"]
            color = "#555555" if not judged else _WITHIN if abs(row["error"]) <= row["limit"] else _BEYOND
            axis.plot([low, high], [place, place], color=color, linewidth=1.4)
            axis.plot(value, place, "o", color=color, markersize=4.5)
        axis.set_xlim(-100 * reach, 100 * reach)
        axis.set_title(metric, loc="left")
        axis.set_xlabel("measured / predicted - 1 (%)")
    axes[0].set_yticks(list(places.values()), list(places))
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    note = (
        "Points: medians over repeats; lines: their 95% intervals (order statistics). Band: tolerance. Green: within; "
        f"red: beyond; grey: not judged by itself. A line that reaches an edge goes on. {caption}"
    )
    return finish(figure, title, note, estimated=False)


@styled
def request_scatter(
    requests: pd.DataFrame, *, title: str = "Every request, predicted and measured", caption: str = ""
) -> Figure:
    """Measured over predicted latency, one panel per load, one point per request.

    ``requests``: load (text), policy, predicted_s, measured_s (medians over repeats).
    """
    loads = list(dict.fromkeys(requests["load"]))
    styles = policy_styles(requests["policy"])
    figure = new_figure(3.9 * len(loads) + 2.0, 4.6)
    axes = figure.subplots(1, len(loads), squeeze=False)[0]
    for axis, load in zip(axes, loads, strict=True):
        of_load = requests[requests["load"] == load]
        both = of_load[["predicted_s", "measured_s"]].to_numpy(float)
        ends = np.array([0.9 * both.min(), 1.1 * both.max()])
        axis.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#eeeeee", linewidth=0)
        axis.plot(ends, ends, color="#888888", linewidth=0.9)
        for name, style in styles.items():
            points = of_load[of_load["policy"] == name]
            axis.plot(
                points["predicted_s"], points["measured_s"], style.marker, color=style.color, markersize=4, alpha=0.75
            )
        axis.set_xlim(ends[0], ends[1])
        axis.set_ylim(ends[0], ends[1])
        axis.set_aspect("equal")
        axis.set_title(load, loc="left")
        axis.set_xlabel("predicted latency (s)")
        axis.set_ylabel("measured latency (s)")
    policy_legend(figure, styles)
    return finish(figure, title, f"Medians over repeats. Line: equal; grey: 10% off. {caption}", estimated=False)


@styled
def two_timelines(
    predicted: pd.DataFrame, measured: pd.DataFrame, start_s: float, end_s: float, *, title: str, caption: str = ""
) -> Figure:
    """The same seconds of a run as simulated and as measured, one above the other (``work.parquet`` columns)."""
    lines = max(len(lanes_of(predicted)), len(lanes_of(measured)))
    figure = new_figure(12, 2 * 0.62 * lines + 3.2)
    axes = figure.subplots(2, 1, sharex=True)
    most_rows = max(largest_step(predicted), largest_step(measured))
    shown = []
    for axis, work, label in zip(axes, (predicted, measured), ("predicted", "measured"), strict=True):
        shown.append(draw_lanes(axis, work, start_s, end_s, most_rows))
        axis.set_title(label, loc="left")
    axes[0].set_xlabel("")
    lane_legend(figure, pd.concat(shown), most_rows)
    note = f"Steps: rows; +p: padding; c and r: samples that skip guidance. Chunks: sample, chunk number. {caption}"
    return finish(figure, title, note, estimated=False)
