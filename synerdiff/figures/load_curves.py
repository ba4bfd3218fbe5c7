"""Curves over a sweep: latency and throughput against load, and throughput against P99.

Each takes one row per run: profile, estimated, policy, load, seed and the metrics of ``synerdiff.results.metrics``;
with a column ``workload`` of several values every (profile, workload) has its own row of panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp, inf, log

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synerdiff.figures.fidelity_axis import SSIM_NOTE, ssim_error, ssim_on_x
from synerdiff.figures.style import (
    PolicyStyle,
    finish,
    new_figure,
    plain_log_ticks,
    policy_legend,
    policy_styles,
    styled,
)
from synerdiff.results.intervals import Interval, t_interval

SHORTFALL = 0.95
"""A run that achieves less than this share of its offered rate is saturated."""

BANDS = "Lines: means over runs (seeds, or windows of a trace); bands: 95% t intervals over runs."
HOLLOW = (
    f"Hollow: load 1 or more (continuous-serial is saturated), or under {SHORTFALL:.0%} of the offered rate achieved; "
    "latency there depends on the run's length."
)


def panel_rows(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(label, runs) per profile, or per profile and workload when there are several; estimated profiles say so."""
    several = "workload" in runs and runs["workload"].nunique() > 1
    keys = ["profile", "workload"] if several else ["profile"]
    for key, group in runs.groupby(keys, sort=False):
        label = ", ".join(str(part) for part in key)
        yield f"{label} (estimated)" if group["estimated"].any() and "estimated" not in label else label, group


def saturated(runs: pd.DataFrame) -> pd.Series[bool]:
    """At or above saturation: load of at least 1, or less than 95% of the offered rate achieved."""
    return (runs["load"] >= 1) | (runs["request_throughput"] < SHORTFALL * runs["offered_request_rate"])


@styled
def latency_against_load(runs: pd.DataFrame, *, title: str = "Latency against load", caption: str = "") -> Figure:
    """Mean and P99 request latency over load, logarithmic; one row of panels per profile, one curve per policy.

    Geometric means and intervals of logarithms, so that bands stay above zero.
    """
    panels = (("request_latency_mean_s", "mean latency (s)"), ("request_latency_p99_s", "P99 latency (s)"))
    note = f"{BANDS} {HOLLOW}{_skips(runs)} {caption}"
    return _grid(runs, panels, title, note, logarithmic=True)


@styled
def throughput_against_load(
    runs: pd.DataFrame, *, title: str = "Throughput and goodput against load", caption: str = ""
) -> Figure:
    """Requests, images and good requests per second over load; the thin line is the offered rate."""
    panels = (
        ("request_throughput", "requests/s"),
        ("image_throughput", "images/s"),
        ("goodput", "goodput (requests/s within SLO)"),
    )
    return _grid(runs, panels, title, f"{BANDS} Thin grey: offered.{_skips(runs)} {caption}", logarithmic=False)


@styled
def throughput_against_p99(
    runs: pd.DataFrame, *, title: str = "Throughput against P99 latency", caption: str = ""
) -> Figure:
    """The trade-off: achieved requests per second and P99, one point per load (means over seeds), in load order.

    With a column ``ssim`` (mean SSIM of the run's images against full guidance) a second panel shows P99 over fidelity.
    """
    rows = list(panel_rows(runs))
    styles = policy_styles(runs["policy"])
    columns = 2 if "ssim" in runs else 1
    figure = new_figure(8.4 if columns == 1 else 10.4, 3.4 * len(rows) + 1.2)
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    for axes, (label, group) in zip(grid, rows, strict=True):
        for name, style in styles.items():
            own = group[group["policy"] == name]
            _trade_off(axes[0], own, "request_throughput", style, named=name == next(iter(styles)))
            if columns == 2:
                _trade_off(axes[1], own.assign(error=own["ssim"].map(ssim_error)), "error", style, named=False)
        plain_log_ticks(axes[0])
        axes[0].set_title(label, loc="left")
        axes[0].set(xlabel="achieved requests/s", ylabel="P99 latency (s)")
        if columns == 2:
            ssim_on_x(axes[1])
    policy_legend(figure, styles)
    meaning = "Small numbers: load, the same along every curve. Down and to the right is better."
    if columns == 2:
        meaning += f" {SSIM_NOTE}"
    note = f"{meaning} {HOLLOW}{_skips(runs)} {caption}"
    return finish(figure, title, note, bool(runs["estimated"].any()))


def _trade_off(axis: Axes, runs: pd.DataFrame, across: str, style: PolicyStyle, named: bool) -> None:
    points = [
        (
            load,
            _mean(group[across]).value,
            _log_mean(group["request_latency_p99_s"]).value,
            bool(saturated(group).any()),
        )
        for load, group in _by_load(runs)
    ]
    _draw_points(axis, [p[1] for p in points], [p[2] for p in points], [p[3] for p in points], style)
    if named:
        for load, x, y, _ in points:
            axis.annotate(f"{load:g}", (x, y), xytext=(-3, 5), textcoords="offset points", fontsize=7, ha="right")


def _grid(
    runs: pd.DataFrame, panels: tuple[tuple[str, str], ...], title: str, caption: str, logarithmic: bool
) -> Figure:
    rows = list(panel_rows(runs))
    styles = policy_styles(runs["policy"])
    figure = new_figure(4.0 * len(panels) + 2.2, 3.0 * len(rows) + 1.2)
    grid = figure.subplots(len(rows), len(panels), squeeze=False, sharex=True)
    # Many overlapping bands would hide each other.
    shade = min(0.16, 0.6 / len(styles))
    for axes, (label, group) in zip(grid, rows, strict=True):
        for axis, (column, name) in zip(axes, panels, strict=True):
            for policy, style in styles.items():
                of_policy = group[group["policy"] == policy]
                _curve(axis, of_policy, column, style, _log_mean if logarithmic else _mean, shade)
            if logarithmic:
                plain_log_ticks(axis)
            else:
                _offered(axis, group, column)
                axis.set_ylim(bottom=0)
            if group["load"].max() >= 1:
                axis.axvline(1, color="#666666", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            axis.set_ylabel(name)
        axes[0].set_title(label, loc="left")
    for axis in grid[-1]:
        axis.set_xlabel("offered load (1 = continuous-serial saturates)")
    policy_legend(figure, styles)
    return finish(figure, title, caption, bool(runs["estimated"].any()))


def _curve(
    axis: Axes,
    runs: pd.DataFrame,
    column: str,
    style: PolicyStyle,
    mean: Callable[[pd.Series[float]], Interval],
    shade: float,
) -> None:
    loads, intervals, flags = [], [], []
    for load, group in _by_load(runs):
        loads.append(load)
        intervals.append(mean(group[column]))
        flags.append(bool(saturated(group).any()))
    values = [interval.value for interval in intervals]
    _draw_points(axis, loads, values, flags, style)
    bounded = np.array([interval.high < inf for interval in intervals], dtype=bool)
    if bounded.any():
        low = [interval.low if interval.high < inf else interval.value for interval in intervals]
        high = [interval.high if interval.high < inf else interval.value for interval in intervals]
        axis.fill_between(loads, low, high, where=bounded.tolist(), color=style.color, alpha=shade, linewidth=0)


def _by_load(runs: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    return [(load, runs[runs["load"] == load]) for load in sorted(set(runs["load"].tolist()))]


def _draw_points(axis: Axes, x: list[float], y: list[float], hollow: list[bool], style: PolicyStyle) -> None:
    axis.plot(x, y, color=style.color, linestyle=style.linestyle)
    for a, b, empty in zip(x, y, hollow, strict=True):
        axis.plot(a, b, style.marker, color=style.color, markerfacecolor="white" if empty else style.color)


def _offered(axis: Axes, runs: pd.DataFrame, column: str) -> None:
    offered = "offered_image_rate" if column == "image_throughput" else "offered_request_rate"
    rates = runs.groupby("load")[offered].mean()
    axis.plot(rates.index.to_numpy(float), rates.to_numpy(float), color="#b0b0b0", linewidth=0.9, zorder=1)


def _mean(values: pd.Series[float]) -> Interval:
    return t_interval(values.dropna().tolist()) if values.notna().any() else Interval(float("nan"), -inf, inf, 0)


def _log_mean(values: pd.Series[float]) -> Interval:
    found = _mean(values.map(log, na_action="ignore"))
    return Interval(exp(found.value), exp(found.low), exp(found.high) if found.high < inf else inf, found.n)


def _skips(runs: pd.DataFrame) -> str:
    """The guided steps that each skipping policy skipped, for the caption: a latency is not read without it."""
    shares = runs.groupby("policy")["skip_fraction"].agg(["min", "max"])
    skipping = [
        f"{policy} {row['min']:.0%}-{row['max']:.0%}" for policy, row in shares.iterrows() if float(row["max"]) > 0
    ]
    return f" Guidance skipped: {', '.join(skipping)}." if skipping else " Guidance is never skipped."
