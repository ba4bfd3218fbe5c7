"""Latency, throughput and backlog under load.

Curves take one row per run: profile, estimated, policy, load, seed and the metrics of ``synerdiff.results.metrics``;
with a column ``workload`` of several values every (profile, workload) has its own row of panels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import log
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synerdiff.figures.comparison import LABELS, paired_ratios, ratio_axis
from synerdiff.figures.style import (
    SSIM_NOTE,
    UNITS_S,
    PolicyStyle,
    beside,
    finish,
    new_figure,
    panel_grid,
    panel_title,
    plain_log_ticks,
    policy_legend,
    policy_styles,
    ssim_axis,
    ssim_error,
    styled,
    x_labels,
)
from synerdiff.results.metrics import backlog

SHORTFALL = 0.95
"""A run that achieves less than this share of its offered rate is saturated."""
HOLLOW = (
    f"Hollow: load 1 or more, or under {SHORTFALL:.0%} of the offered rate achieved; latency there grows with the "
    "run's length."
)
FRONTIER_GAIN = 0.01
"""So much more throughput a point of the frontier brings than the one before it."""
_BINS_S = (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 86_400)
_MOST_BINS = 300
_LINEAR_TO = 10


def panel_rows(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(label, runs) per profile, or per profile and workload when there are several."""
    several = "workload" in runs and runs["workload"].nunique() > 1
    for key, group in runs.groupby(["profile", "workload"] if several else ["profile"], sort=False):
        yield ", ".join(str(part) for part in key), group


def saturated(runs: pd.DataFrame) -> pd.Series[bool]:
    """At or above saturation: load of at least 1, or less than 95% of the offered rate achieved."""
    return (runs["load"] >= 1) | (runs["request_throughput"] < SHORTFALL * runs["offered_request_rate"])


def row_panels(
    runs: pd.DataFrame, columns: int, row_in: float, more_in: float, **shared: Any
) -> tuple[Figure, list[tuple[Any, str, pd.DataFrame, bool]]]:
    """A figure with a row of panels for each of ``panel_rows``, and (axes, label, runs, estimated) of each."""
    rows = list(panel_rows(runs))
    figure = new_figure(row_in * len(rows) + more_in)
    grid = figure.subplots(len(rows), columns, squeeze=False, **shared)
    return figure, [(axes, *row, bool(row[1]["estimated"].any())) for axes, row in zip(grid, rows, strict=True)]


@styled
def latency_against_load(
    runs: pd.DataFrame, *, baseline: str, measure: str = "request_latency_mean_s", caption: str = ""
) -> Figure:
    """Per profile two panels: the latency of every policy over load (geometric means over seeds, logarithmic), and
    beside it the evidence, its paired ratio to ``baseline`` with the 95% interval."""
    styles = policy_styles(runs["policy"])
    others = [name for name in styles if name != baseline]
    ratios = paired_ratios(runs, baseline, measure)
    loads = sorted(set(runs["load"].tolist()))
    figure, rows = row_panels(runs, 2, 2.3, 1.1, width_ratios=[1, 1.35])
    for (level, change), label, group, estimated in rows:
        for policy, style in styles.items():
            _curve(level, group[group["policy"] == policy].assign(x=lambda own: own["load"]), measure, style)
        plain_log_ticks(level)
        level.set_ylabel(f"{LABELS[measure]} (s)")
        panel_title(level, label, estimated)
        own = ratios[(ratios["profile"] == group["profile"].iloc[0]) & ratios["policy"].isin(others)]
        if "workload" in own:
            own = own[own["workload"] == group["workload"].iloc[0]]
        for row in own.to_dict("records"):
            style = styles[row["policy"]]
            x = loads.index(row["load"]) + (others.index(row["policy"]) + 0.5) / len(others) * 0.8 - 0.4
            if row["high"] < np.inf:
                change.plot([x, x], [row["low"], row["high"]], color=style.color, linewidth=1)
            change.plot(x, row["ratio"], style.marker, color=style.color)
        for place in range(0, len(loads), 2):
            change.axvspan(place - 0.5, place + 0.5, color="#f4f4f4", zorder=0)
        change.set_xticks(range(len(loads)), [f"{load:g}" for load in loads])
        change.set_xlim(-0.5, len(loads) - 0.5)
        change.grid(visible=False, axis="x")
        ratio_axis(change, "y", own[["ratio", "low", "high"]].to_numpy(float).ravel().tolist(), "change", 8)
        change.axhline(1, color="#222222", linewidth=0.8, zorder=1)
        panel_title(change, f"against {baseline}, paired", estimated)
    x_labels(rows[-1][0], "offered load (1 = continuous-serial saturates)")
    policy_legend(figure, styles)
    name = LABELS[measure]
    note = f"Left: means over runs. Right: means of ratios of runs on the same arrivals, 95% t intervals. {HOLLOW}"
    return finish(figure, f"{name[0].upper()}{name[1:]} against load", f"{note}{_skips(runs)} {caption}")


@styled
def throughput_against_load(runs: pd.DataFrame, *, caption: str = "") -> Figure:
    """Requests and good requests per second over load; the thin grey line is the offered rate."""
    styles = policy_styles(runs["policy"])
    panels = (("request_throughput", "requests/s"), ("goodput", "requests/s within their SLO"))
    figure, rows = row_panels(runs, 2, 2.1, 1.0)
    for axes, label, group, estimated in rows:
        for axis, (column, name) in zip(axes, panels, strict=True):
            for policy, style in styles.items():
                _curve(axis, group[group["policy"] == policy].assign(x=lambda own: own["load"]), column, style)
            rates = group.groupby("load")["offered_request_rate"].mean()
            axis.plot(rates.index.to_numpy(float), rates.to_numpy(float), color="#b0b0b0", linewidth=0.8, zorder=1)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(name)
            panel_title(axis, label if axis is axes[0] else "", estimated)
    x_labels(rows[-1][0], "offered load (1 = continuous-serial saturates)")
    policy_legend(figure, styles)
    title = "Throughput and goodput against load"
    return finish(figure, title, f"Means over runs. Thin grey: offered. {HOLLOW}{_skips(runs)} {caption}")


@styled
def against_concurrency(runs: pd.DataFrame, *, caption: str = "") -> Figure:
    """Images per second and mean latency over the requests in the system (column ``max_concurrency``).

    Rows without one are runs at saturation: their ``saturation_throughput`` is drawn as each policy's limit.
    """
    styles = policy_styles(runs["policy"])
    panels = (("image_throughput", "images/s"), ("request_latency_mean_s", "mean latency (s)"))
    figure, rows = row_panels(runs, 2, 2.3, 1.0)
    for axes, label, group, estimated in rows:
        closed = group[group["max_concurrency"].notna()]
        limits = group[group["max_concurrency"].isna()]
        for axis, (column, name) in zip(axes, panels, strict=True):
            for policy, style in styles.items():
                own = closed[closed["policy"] == policy]
                points = own.assign(x=own["max_concurrency"])
                _curve(axis, points, column, style, by="max_concurrency")
                most = limits[limits["policy"] == policy]
                if axis is axes[0] and len(most):
                    limit = float(most["saturation_throughput"].mean())
                    axis.axhline(limit, color=style.color, linewidth=0.7, linestyle=":", zorder=1)
            axis.set_xscale("log", base=2)
            sizes = sorted(closed["max_concurrency"].unique())
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axis.minorticks_off()
            axis.set_ylabel(name)
            panel_title(axis, label if axis is axes[0] else "", estimated)
        axes[0].set_ylim(0, 1.06 * axes[0].get_ylim()[1])
        plain_log_ticks(axes[1])
    x_labels(rows[-1][0], "requests in the system")
    policy_legend(figure, styles)
    meaning = "Means over runs. The next request is sent when one has ended; latency counts from the sending."
    if runs["max_concurrency"].isna().any():
        meaning += " Dotted: the policy's limit, all requests waiting from the start."
    title = "A closed loop: what more requests at a time bring"
    return finish(figure, title, f"{meaning}{_skips(runs)} {caption}")


@styled
def latency_by_size(runs: pd.DataFrame, *, baseline: str, caption: str = "") -> Figure:
    """Per profile two panels over the resolutions of one load: mean latency, and its ratio to ``baseline``.

    ``runs``: profile, estimated, policy, seed, size, pixels, request_latency_mean_s, one row per run and resolution.
    """
    styles = policy_styles(runs["policy"])
    figure, rows = row_panels(runs, 2, 2.4, 1.0)
    for (level, change), label, group, estimated in rows:
        sizes = group.sort_values("pixels", kind="stable")["size"].drop_duplicates().tolist()
        value = group.set_index(["policy", "size", "seed"])["request_latency_mean_s"].astype(float).map(log)
        ratios: list[float] = [1.0]
        for place, (policy, style) in enumerate(styles.items()):
            own, base = value[policy], value[baseline]
            means = np.exp(own.groupby(level="size").mean()).reindex(sizes)
            looks: Any = {"color": style.color, "marker": style.marker, "linestyle": style.linestyle, "linewidth": 0.8}
            level.plot(range(len(sizes)), means.to_numpy(float), **looks)
            if policy != baseline:
                against = np.exp((own - base).groupby(level="size").mean()).reindex(sizes).to_numpy(float)
                ratios += against.tolist()
                x = np.arange(len(sizes)) + 0.12 * (place - (len(styles) - 1) / 2)
                change.plot(x, against, style.marker, color=style.color)
        plain_log_ticks(level)
        level.set_ylabel("mean latency (s)")
        panel_title(level, label, estimated)
        ratio_axis(change, "y", ratios, "change", 8)
        change.axhline(1, color="#222222", linewidth=0.8, zorder=1)
        panel_title(change, f"against {baseline}", estimated)
        for axis in (level, change):
            axis.set_xticks(range(len(sizes)), sizes)
            axis.grid(visible=False, axis="x")
    policy_legend(figure, styles)
    note = f"Geometric means over runs on the same arrivals, load {runs['load'].iloc[0]:g}."
    return finish(figure, "Who pays and who gains, by resolution", f"{note} {caption}")


@styled
def throughput_against_p99(runs: pd.DataFrame, *, caption: str = "") -> Figure:
    """The trade-off: achieved requests per second and P99, one point per load (means over seeds), in load order; the
    frontier is a broad grey line.

    With a column ``ssim`` (mean SSIM of the run's images against full guidance) a second panel shows P99 over fidelity.
    """
    rows = list(panel_rows(runs))
    styles = policy_styles(runs["policy"])
    figure, grid = panel_grid(len(rows) * (2 if "ssim" in runs else 1), 2, 2.5, 1.0)
    places = grid[:, 0] if "ssim" in runs else grid.flat
    for line, (axis, (label, group)) in enumerate(zip(places, rows, strict=False)):
        panels = [(axis, "request_throughput")] + ([(grid[line, 1], "error")] if "ssim" in runs else [])
        for panel, across in panels:
            drawn: list[tuple[float, float]] = []
            for name, style in styles.items():
                own = group[group["policy"] == name]
                if across == "error":
                    own = own.assign(error=own["ssim"].map(ssim_error))
                points = _curve(panel, own.assign(x=own[across]), "request_latency_p99_s", style)
                drawn += [(x, y) for _, x, y in points]
                if panel is axis and name == next(iter(styles)):
                    for load, x, y in points:
                        beside(panel, f"load {load:g}", x, y, (-4, 4), ha="right", va="bottom")
            if panel is axis:
                edge = frontier(drawn)
                panel.step(*zip(*edge, strict=True), where="pre", color="#d0d0d0", linewidth=4, zorder=0.5)
            panel.margins(x=0.2 if panel is axis else 0.05)
            plain_log_ticks(panel)
            panel_title(panel, label if panel is axis else "", bool(group["estimated"].any()))
        axis.set(xlabel="achieved requests/s", ylabel="P99 latency (s)")
        if "ssim" in runs:
            ssim_axis(grid[line, 1], "x")
    policy_legend(figure, styles)
    meaning = (
        "Points along a curve: loads, low to high. Down and to the right is better. Broad grey: the frontier, "
        "from where more throughput costs a higher P99."
    )
    meaning += f" {SSIM_NOTE}" if "ssim" in runs else ""
    return finish(figure, "Throughput against P99 latency", f"{meaning} {HOLLOW}{_skips(runs)} {caption}")


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (throughput, latency) those that serve at least 1% more than every point of a lower latency, in this order."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[1], -point[0])):
        if not best or x >= (1 + FRONTIER_GAIN) * best[-1][0]:
            best.append((x, y))
    return best


@styled
def backlog_over_time(
    requests: Mapping[str, pd.DataFrame],
    *,
    estimated: bool,
    time_scale: float = 1.0,
    title: str = "Requests in the system over the whole trace",
    caption: str = "",
) -> Figure:
    """Two panels over one time axis: arrivals per second, and requests that have arrived and not finished.

    ``requests``: policy -> its request table (columns of requests.parquet); all from the same trace, whose times were
    multiplied by ``time_scale`` to reach the load. The axis counts the trace's own time. The backlog is linear up to 10
    and logarithmic above.
    """
    styles = policy_styles(requests)
    own = {name: backlog(table) for name, table in requests.items()}
    arrivals_s = next(iter(requests.values()))["arrival_s"].to_numpy(float) / time_scale
    end_s = max([arrivals_s.max(), *(float(changes["time_s"].max()) / time_scale for changes in own.values())])
    _, unit_s, unit = next(entry for entry in UNITS_S if end_s >= entry[0])
    figure = new_figure(3.6)
    rate, level = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.2])
    bin_s = next((length for length in _BINS_S if end_s / length <= _MOST_BINS), _BINS_S[-1])
    edges = np.arange(int(end_s // bin_s) + 2) * float(bin_s)
    rate.stairs(np.histogram(arrivals_s, edges)[0] / bin_s, edges / unit_s, fill=True, color="#9a9a9a")
    rate.set(ylabel="arrivals/s")
    panel_title(rate, f"arrivals per second of the trace, in bins of {_duration(bin_s)}")
    for name, style in styles.items():
        x = own[name]["time_s"] / time_scale / unit_s
        looks: Any = {"color": style.color, "linestyle": style.linestyle, "linewidth": 0.9}
        level.plot(x, own[name]["in_system"], drawstyle="steps-post", **looks)
    panel_title(level, "requests in the system", estimated)
    level.set_yscale("symlog", linthresh=_LINEAR_TO)
    level.set_ylim(bottom=0)
    most = level.get_ylim()[1]
    ticks = [0, 5, *(factor * 10**power for power in range(1, 8) for factor in (1, 2, 5) if factor * 10**power < most)]
    level.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    level.minorticks_off()
    level.set_xlim(0, end_s / unit_s)
    level.set(xlabel=f"time of the trace ({unit})", ylabel="requests")
    policy_legend(figure, styles, markers=False)
    peaks = ", ".join(f"{name} {int(changes['in_system'].max())}" for name, changes in own.items())
    faster = f"{1 / time_scale:,.0f}" if 1 / time_scale >= 100 else f"{1 / time_scale:.3g}"
    speed = "" if time_scale == 1 else f" Replayed {faster} times as fast as the trace."
    return finish(figure, title, f"Linear up to {_LINEAR_TO}, logarithmic above.{speed} Peaks: {peaks}. {caption}")


def _curve(
    axis: Axes, runs: pd.DataFrame, column: str, style: PolicyStyle, by: str = "load"
) -> list[tuple[float, float, float]]:
    """One policy's points in the order of ``by``, joined; x: means of column ``x``, y: geometric means of latencies,
    means of others; hollow where a run is saturated. Returns (load, x, y)."""
    points = []
    for load, group in runs[runs[column].notna()].groupby(by):
        values = group[column].to_numpy(float)
        y = float(np.exp(np.log(values).mean()) if column.endswith("_s") else values.mean())
        full = by == "load" and bool(saturated(group).any())
        points.append((float(str(load)), float(group["x"].mean()), y, full))
    axis.plot(
        [p[1] for p in points], [p[2] for p in points], color=style.color, linestyle=style.linestyle, linewidth=0.8
    )
    for _, x, y, empty in points:
        axis.plot(x, y, style.marker, color=style.color, markerfacecolor="white" if empty else style.color)
    return [(load, x, y) for load, x, y, _ in points]


def _duration(seconds: int) -> str:
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds} s"


def _skips(runs: pd.DataFrame) -> str:
    """The guided steps that each skipping policy skipped, for the caption: a latency is not read without it."""
    shares = runs.groupby("policy")["skip_fraction"].agg(["min", "max"])
    ranges = {policy: (f"{row['min']:.0%}", f"{row['max']:.0%}") for policy, row in shares.iterrows()}
    skipping = [f"{policy} {'-'.join(dict.fromkeys(ends))}" for policy, ends in ranges.items() if ends[1] != "0%"]
    return f" Guidance skipped: {', '.join(skipping)}." if skipping else " Guidance is never skipped."
