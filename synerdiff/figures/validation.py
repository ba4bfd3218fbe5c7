"""Predicted against measured: errors per metric and case, and requests one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from synerdiff.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    finish,
    legend_above,
    new_figure,
    panel_grid,
    panel_title,
    policy_legend,
    policy_styles,
    styled,
)

EDGE = 0.8
"""Where the axis of estimates ends."""
FAR = 0.5
"""Interval ends beyond this, and beyond twice the largest error, are cut off at the edge."""


@styled
def prediction_errors(errors: pd.DataFrame, *, caption: str) -> Figure:
    """One panel per metric, one line per case: the median error with its interval, and the tolerance as a band.

    ``errors``: case, metric, error, low, high (shares; far or infinite bounds are drawn to the edge), limit (NaN: not
    judged).
    """
    metrics = list(dict.fromkeys(errors["metric"]))
    cases = list(dict.fromkeys(errors["case"]))
    figure = new_figure(0.16 * len(cases) + 1.3)
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
            axis.axvspan(-100 * limit, 100 * limit, color="#e6f0f7", zorder=0)
        axis.axvline(0, color="#888888", linewidth=0.8)
        for row in of_metric.to_dict("records"):
            place, value = places[row["case"]], 100 * row["error"]
            low, high = (100 * float(np.clip(row[end], -reach, reach)) for end in ("low", "high"))
            judged = row["limit"] == row["limit"]
            inside = -row["limit"] <= row["low"] and row["high"] <= row["limit"]
            outside = row["low"] > row["limit"] or row["high"] < -row["limit"]
            color = "#555555" if not judged else BLUE if inside else ORANGE if outside else "#999999"
            axis.plot([low, high], [place, place], color=color, linewidth=1)
            axis.plot(value, place, "o", color=color, markersize=3)
        axis.set_xlim(-100 * reach, 100 * reach)
        panel_title(axis, metric)
        axis.set_xlabel("off by (%)")
    axes[0].set_yticks(list(places.values()), list(places))
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    note = (
        "Off by: measured / predicted - 1. Points: medians over repeats; lines: 95% intervals (order statistics). "
        "Band: tolerance. Blue: all of the interval within; "
        f"orange: all of it beyond; grey: unclear, or not judged. A line that reaches an edge goes on. {caption}"
    )
    return finish(figure, "How far the prediction was off", note)


@styled
def request_scatter(requests: pd.DataFrame, *, caption: str = "") -> Figure:
    """Measured over predicted latency, one panel per load, one point per request.

    ``requests``: load (text), policy, predicted_s, measured_s (medians over repeats).
    """
    loads = list(dict.fromkeys(requests["load"]))
    styles = policy_styles(requests["policy"])
    figure = new_figure(7.0 / len(loads) + 1.0 if len(loads) > 1 else 4.2)
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
                points["predicted_s"], points["measured_s"], style.marker, color=style.color, markersize=3, alpha=0.75
            )
        axis.set_xlim(ends[0], ends[1])
        axis.set_ylim(ends[0], ends[1])
        axis.set_aspect("equal")
        panel_title(axis, load)
        axis.set_xlabel("predicted latency (s)")
    axes[0].set_ylabel("measured latency (s)")
    policy_legend(figure, styles)
    title = "Every request, predicted and measured"
    return finish(figure, title, f"Medians over repeats. Line: equal; grey: 10% off. {caption}")


EXECUTION_LOOKS = {"eager": ("o", BLUE), "compiled": ("s", GREEN), "engine": ("^", ORANGE)}


@styled
def estimate_errors(times: pd.DataFrame, *, caption: str) -> Figure:
    """One panel before and one after, one line per card, one point per published time: how far the estimate is off.

    ``times``: card, execution, before and after (estimate / published - 1; NaN: nothing was said).
    """
    counts = times["card"].value_counts()
    cards = list(counts.index)
    figure = new_figure(0.17 * len(cards) + 1.5)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column in zip(axes, ("before", "after"), strict=True):
        for limit, color in ((25, "#eef4f9"), (10, "#d9e8f3")):
            axis.axvspan(-limit, limit, color=color, zorder=0)
        axis.axvline(0, color="#888888", linewidth=0.8)
        for execution, (marker, color) in EXECUTION_LOOKS.items():
            points = times[(times["execution"] == execution) & times[column].notna()]
            errors = 100 * points[column].clip(-EDGE, EDGE)
            axis.plot(errors, points["card"].map(cards.index), marker, color=color, markersize=3, alpha=0.7)
        axis.set_xlim(-105 * EDGE, 105 * EDGE)
        sizes = times[column].abs().dropna()
        panel_title(axis, f"{column}: {len(sizes)} times, median {100 * sizes.median():.1f}% off")
        axis.set_xlabel("estimate / published - 1 (%)")
    axes[0].set_yticks(range(len(cards)), [f"{card} ({counts[card]})" for card in cards])
    axes[0].set_ylim(len(cards) - 0.4, -0.6)
    looks = EXECUTION_LOOKS.items()
    legend_above(
        figure, [Line2D([], [], color=c, marker=m, linestyle="", label=execution) for execution, (m, c) in looks]
    )
    note = f"Bands: 10% and 25%. Points beyond {100 * EDGE:.0f}% are drawn at the edge. {caption}"
    return finish(figure, "Estimates beside published times", note)


@styled
def latency_percentiles(latencies: pd.DataFrame) -> Figure:
    """One panel per run: latency by percentile, as predicted (line) and as published (points), and both means.

    ``latencies``: run, measure (min, p50, ..., max, mean), published, predicted (seconds), judged (0 or 1), host_s.
    """
    runs = list(dict.fromkeys(latencies["run"]))
    figure, grid = panel_grid(len(runs), 3, 2.3, 0.9)
    for axis, run in zip(grid.flat, runs, strict=False):
        of_run = latencies[latencies["run"] == run].set_index("measure")
        order = [name for name in ("min", "p50", "p90", "p95", "p97", "p99", "max") if name in of_run.index]
        places = np.arange(len(order))
        axis.plot(places, of_run.loc[order, "predicted"], color=BLUE, linewidth=1.4)
        judged = (of_run.loc[order, "judged"] == 1).to_numpy()
        published = of_run.loc[order, "published"].to_numpy(float)
        axis.plot(places[judged], published[judged], "o", color=ORANGE, markersize=4)
        axis.plot(places[~judged], published[~judged], "o", color=ORANGE, markersize=4, fillstyle="none")
        if "mean" in of_run.index:
            axis.axhline(of_run.loc["mean", "predicted"], color=BLUE, linewidth=0.9, linestyle="--")
            axis.axhline(of_run.loc["mean", "published"], color=ORANGE, linewidth=0.9, linestyle=":")
        axis.set_xticks(places, order)
        axis.set_ylim(bottom=0)
        panel_title(axis, run)
    for row in grid:
        row[0].set_ylabel("latency (s)")
    legend_above(
        figure,
        [
            Line2D([], [], color=BLUE, label="predicted"),
            Line2D([], [], color=BLUE, linestyle="--", linewidth=0.9, label="predicted mean"),
            Line2D([], [], color=ORANGE, marker="o", linestyle="", label="published"),
            Line2D([], [], color=ORANGE, linestyle=":", linewidth=0.9, label="published mean"),
        ],
    )
    title = "MLPerf's SDXL server runs, predicted and published"
    return finish(figure, title, "Hollow: shown, not judged (the ends of a run).")
