"""Who is better, by how much and where: paired ratios against a named baseline with 95% intervals, and maps of them.

Runs are one row each: profile, estimated, workload, policy, load, seed and the metrics of
``synerdiff.results.metrics``; ratios are geometric means over seeds of runs on the same requests
(``intervals.paired_log_ratio``).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import inf, isfinite, log2
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullFormatter

from synerdiff.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    beside,
    finish,
    legend_above,
    new_figure,
    panel_grid,
    panel_title,
    percent,
    policy_styles,
    styled,
    x_labels,
)
from synerdiff.results.intervals import paired_log_ratio

MOST_NUMBERS = 60
"""More numbers than this in one picture are not read: then colours speak alone."""
ALIKE = 1.005
"""Ratios within this are alike, however small their interval is."""
LARGER_IS_BETTER = ("request_throughput", "image_throughput", "goodput", "good_fraction")
LABELS = {
    "request_latency_mean_s": "mean latency",
    "request_latency_p99_s": "P99 latency",
    "request_throughput": "requests/s",
    "image_throughput": "images/s",
    "goodput": "goodput",
}
SECOND_GPU = "2nd\nGPU"
_TIE = "#d9d9d9"


def paired_ratios(runs: pd.DataFrame, baseline: str, column: str) -> pd.DataFrame:
    """One row per profile, workload, load and policy but the baseline: ratio to it, low, high, n, skip_fraction,
    estimated. Only seeds that both ran with a positive value are paired; one pair has infinite bounds."""
    places = [name for name in ("profile", "workload", "load") if name in runs]
    records: list[dict[str, Any]] = []
    for key, group in runs.groupby(places, sort=False, dropna=False):
        values = {
            policy: {
                seed: float(x) for seed, x in zip(own["seed"], own[column], strict=True) if x is not None and x > 0
            }
            for policy, own in group.groupby("policy", sort=False)
        }
        for policy, mine in values.items():
            theirs = values.get(baseline, {})
            both = sorted(mine.keys() & theirs.keys())
            if policy == baseline or not both:
                continue
            pair = paired_log_ratio({seed: mine[seed] for seed in both}, {seed: theirs[seed] for seed in both})
            own = group[group["policy"] == policy]
            place = dict(zip(places, key, strict=True)) | {"policy": policy, "measure": column}
            marks = {"skip_fraction": float(own["skip_fraction"].mean()), "estimated": bool(own["estimated"].any())}
            records.append({**place, "ratio": pair.ratio, "low": pair.low, "high": pair.high, "n": pair.seeds, **marks})
    columns = [*places, "policy", "measure", "ratio", "low", "high", "n", "skip_fraction", "estimated"]
    return pd.DataFrame(records, columns=columns)  # also where there is nothing to compare with


def ratio_axis(axis: Axes, side: str, values: Sequence[float], label: str, most: int) -> None:
    """A logarithmic axis of ratios, labelled as changes at ``most`` at so many ticks, that holds the values and at
    least +-6% around 1."""
    known = [value for value in values if isfinite(value) and value > 0]
    low, high = min([1 / 1.06, *known]) / 1.03, max([1.06, *known]) * 1.03
    choices = [[1 + i * step for i in range(-int(0.999 / step), 100)] for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
    choices += [[factor * 10.0**power for power in range(-4, 5) for factor in factors] for factors in ((1, 2, 5), (1,))]
    choices.append([100.0**power for power in range(-2, 3)])
    inside = [[tick for tick in ticks if low < tick < high] for ticks in choices]
    ticks = next((ticks for ticks in inside if len(ticks) <= most), inside[-1])
    along = axis.xaxis if side == "x" else axis.yaxis
    (axis.set_xscale if side == "x" else axis.set_yscale)("log")
    (axis.set_xlim if side == "x" else axis.set_ylim)(low, high)
    along.set_ticks(ticks, [percent(tick) for tick in ticks])
    along.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    along.set_label_text(label)


def verdict(ratio: float, low: float, high: float, larger: bool) -> str:
    """Colour of a ratio: blue better, orange worse, grey where the interval holds 1 or lies within 0.5% of it."""
    if low <= 1 <= high or (low >= 1 / ALIKE and high <= ALIKE):
        return GREY
    return BLUE if (ratio > 1) is larger else ORANGE


@styled
def paired_comparison(ratios: pd.DataFrame, *, baseline: str, title: str, caption: str) -> Figure:
    """One row of panels per cell, one column per measure, one point with its 95% interval per policy.

    ``ratios``: cell (text), measure (column or label), policy, ratio (policy / baseline), low, high, skip_fraction,
    estimated; a boolean column ``larger`` says where more is better (by default it follows from the measure).
    """
    cells, measures, policies = (list(dict.fromkeys(ratios[name])) for name in ("cell", "measure", "policy"))
    numbers = len(cells) * len(measures) * len(policies) <= MOST_NUMBERS
    figure = new_figure((0.2 * max(4, len(policies)) + 0.55) * len(cells) + 1.1)
    grid = figure.subplots(len(cells), len(measures), squeeze=False, sharey="row", sharex="col")
    for axes, cell in zip(grid, cells, strict=True):
        of_cell = ratios[ratios["cell"] == cell]
        for axis, measure in zip(axes, measures, strict=True):
            own = of_cell[of_cell["measure"] == measure]
            for row in own.to_dict("records"):
                larger = bool(row.get("larger", measure in LARGER_IS_BETTER))
                place, color = policies.index(row["policy"]), verdict(row["ratio"], row["low"], row["high"], larger)
                if row["high"] < inf:
                    axis.plot([row["low"], row["high"]], [place, place], color=color)
                axis.plot(row["ratio"], place, "o", color=color)
                if numbers:
                    beside(axis, percent(row["ratio"]), row["ratio"], place, (0, 4.2), ha="center", fontsize=6)
            name = LABELS.get(measure, measure)
            axis.axvline(1, color="#222222", linewidth=0.8, zorder=1)
            panel_title(axis, f"{cell}\n{name}" if axis is axes[0] else name, bool(own["estimated"].any()))
            axis.grid(visible=False, axis="y")
        skips = of_cell.groupby("policy")["skip_fraction"].mean()
        names = [f"{name} ({skips[name]:.0%} skipped)" if skips.get(name, 0) >= 0.005 else name for name in policies]
        axes[0].set_yticks(range(len(policies)), names)
        axes[0].set_ylim(len(policies) - 0.4, -0.8)
    for axis, measure in zip(grid[-1], measures, strict=True):
        own = ratios[ratios["measure"] == measure]
        ratio_axis(axis, "x", own[["ratio", "low", "high"]].to_numpy(float).ravel().tolist(), f"against {baseline}", 4)
    looks = ((BLUE, "better"), (GREY, "tie: holds 0% or within 0.5%"), (ORANGE, "worse"))
    legend_above(figure, [Line2D([], [], color=c, marker="o", label=label) for c, label in looks])
    note = "Geometric means over seeds of paired ratios, lines: 95% t intervals."
    return finish(figure, title, f"{note} {caption}")


def compare_at(runs: pd.DataFrame, *, baseline: str, load: float = 0.8, caption: str = "") -> Figure:
    """``paired_comparison`` of the runs at the load nearest to this one: mean latency, P99 and goodput, one row of
    panels per profile (and workload)."""
    nearest = min(runs["load"].unique(), key=lambda known: abs(known - load))
    runs = runs[runs["load"] == nearest]
    measures = ("request_latency_mean_s", "request_latency_p99_s", "goodput")
    ratios = pd.concat([paired_ratios(runs, baseline, measure) for measure in measures])
    several = "workload" in ratios and ratios["workload"].nunique() > 1
    cells = ratios["profile"] + ", " + ratios["workload"] if several else ratios["profile"]
    title = f"Against {baseline} at load {nearest:g}"
    return paired_comparison(ratios.assign(cell=cells), baseline=baseline, title=title, caption=caption)


def draw_map(
    axis: Axes,
    values: Any,
    *,
    limit: float,
    tied: Any = None,
    numbers: bool = True,
    colors: str = "RdBu",
    lower: int = -1,
) -> ScalarMappable:
    """Ratios (rows, columns; NaN: none) on a logarithmic colour scale, centred on 1, from 1/limit to limit.

    Cells that are ``tied`` are grey and hatched. ``lower`` 0 starts the colours at 1. Returns what a colour bar needs.
    """
    norm = Normalize(lower * log2(limit), log2(limit))
    shades = ScalarMappable(norm, colors)
    axis.imshow(np.log2(values), cmap=colors, norm=norm, aspect="auto", origin="lower")
    axis.set_facecolor("white")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for (y, x), value in np.ndenumerate(values):
        tie = tied is not None and bool(tied[y, x])
        if tie:
            hatched: Any = {"facecolor": _TIE, "edgecolor": "#8a8a8a", "hatch": "////", "linewidth": 0}
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **hatched))
        if numbers and value == value:
            red, green, blue, _ = shades.to_rgba(np.array([log2(value)]))[0]
            dark = not tie and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            ground: Any = {"facecolor": _TIE, "edgecolor": "none", "pad": 0.6} if tie else None
            text = percent(value) if value < 3 else f"{value:.0f}x" if value >= 10 else f"{value:.1f}x"
            axis.text(
                x, y, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "#222222", bbox=ground
            )
    return shades


def map_bar(figure: Figure, shades: ScalarMappable, axes: Any, limit: float, label: str) -> None:
    """The colour bar of ``draw_map``: values beyond its ends have the colours of the ends."""
    flat = figure.bbox.height < 2.6 * figure.dpi
    most = [step for step in ((2, 4, 8) if limit >= 4 else (1.2, 1.5, 2)) if step <= limit][-1 if flat else 0 :]
    ticks = [1.0, *most] if shades.norm.vmin == 0 else [*(1 / step for step in reversed(most)), 1.0, *most]
    shrink = 1.0 if flat else 0.6
    bar = figure.colorbar(
        shades, ax=axes, shrink=shrink, aspect=30 * shrink, extend="both", ticks=[log2(tick) for tick in ticks]
    )
    bar.ax.set_yticklabels([f"1/{1 / tick:g}" if tick < 1 else f"{tick:g}" for tick in ticks])
    bar.outline.set_visible(False)
    bar.set_label("\n".join(textwrap.wrap(label, 20)) if flat else label)


@styled
def gain_map(gains: pd.DataFrame, *, policy: str, title: str, caption: str = "", limit: float = 1.5) -> Figure:
    """Contention across, load upwards: how much better ``policy`` is than the best baseline in mean latency, and in the
    top row in throughput at saturation. One panel per (workload, profile, decode share).

    ``gains``: profile, workload, decode_share, contention, measure (mean or saturation), load, gain (ratio, above 1 is
    better), low, high, estimated. Cells whose interval holds 1 are ties. Colours end at ``limit`` and 1/limit.
    """
    groups = list(gains.groupby(["workload", "profile", "decode_share"], sort=False))
    levels = sorted(set(gains["contention"].tolist()))
    loads = sorted({load for load in gains["load"].tolist() if load == load})
    numbers = len(gains) <= MOST_NUMBERS
    figure, grid = panel_grid(len(groups), 3, 0.2 * len(loads) + 0.85, 0.9, sharex=True, sharey=True)
    shades = None
    for axis, (_, group) in zip(grid.flat, groups, strict=False):
        table, tied = np.full((len(loads) + 1, len(levels)), np.nan), np.zeros((len(loads) + 1, len(levels)), bool)
        for row in group.to_dict("records"):
            y = len(loads) if row["measure"] == "saturation" else loads.index(row["load"])
            x = levels.index(row["contention"])
            table[y, x], tied[y, x] = row["gain"], row["low"] <= 1 <= row["high"]
        shades = draw_map(axis, table, limit=limit, tied=tied, numbers=numbers)
        range_text = "" if numbers else f"\n{percent(np.nanmin(table))} to {percent(np.nanmax(table))}"
        panel_title(
            axis,
            _cell_label(*group[["workload", "profile", "decode_share"]].iloc[0]) + range_text,
            bool(group["estimated"].any()),
        )
        axis.set_xticks(range(len(levels)), [f"x{level:g}" for level in levels])
        axis.set_yticks(range(len(loads) + 1), [*(f"load {load:g}" for load in loads), "saturation"])
    x_labels(grid[-1], "contention")
    assert shades is not None
    map_bar(figure, shades, grid, limit, "times as good as the best baseline")
    note = f"Load rows: mean latency of the best baseline / that of {policy}. Hatched: a tie, the interval holds 1."
    return finish(figure, title, f"{note} {caption}")


@styled
def best_policy_map(
    best: pd.DataFrame, panels: Sequence[tuple[str, float | None]], *, title: str, caption: str = ""
) -> Figure:
    """One panel per (measure, load): a cell's colour is its best policy; hatched where the best baseline ties with it.

    ``best``: one row per cell and measure: profile, contention, decode_share, decode_gpus, workload, measure, load,
    policy, gain over the best baseline (ratio), low, high, estimated.
    """
    rows = [tuple(row) for row in best[["workload", "profile", "decode_share"]].drop_duplicates().to_numpy()]
    shared = best["decode_gpus"].map(lambda gpus: "0" in str(gpus).split(","))
    columns: list[Any] = sorted(set(best.loc[shared, "contention"])) + ([] if shared.all() else [SECOND_GPU])
    best = best.assign(column=best["contention"].astype(object).where(shared, SECOND_GPU))
    styles = policy_styles(best["policy"])
    chosen = [
        best[(best["measure"] == m) & (best["load"].isna() if x is None else best["load"] == x)] for m, x in panels
    ]
    numbers = sum(map(len, chosen)) <= MOST_NUMBERS
    figure = new_figure(0.2 * len(rows) + 1.6)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, of_panel, (measure, load) in zip(axes, chosen, panels, strict=True):
        for row in of_panel.to_dict("records"):
            y, x = rows.index((row["workload"], row["profile"], row["decode_share"])), columns.index(row["column"])
            tie = row["low"] <= 1 <= row["high"]
            look: Any = {
                "facecolor": _pale(styles[row["policy"]].color),
                "hatch": "////" if tie else "",
                "linewidth": 0,
            }
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, edgecolor="#8a8a8a", **look))
            if numbers:
                axis.text(x, y, percent(row["gain"]), ha="center", va="center", fontsize=6.5)
        axis.set_xlim(-0.5, len(columns) - 0.5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xticks(range(len(columns)), [c if isinstance(c, str) else f"x{c:g}" for c in columns])
        axis.grid(visible=False)
        axis.tick_params(length=0)
        name = {"saturation": "throughput at saturation", "mean": "mean latency", "p99": "P99 latency"}
        at = "" if load is None else f", load {load:g}"
        panel_title(axis, name.get(measure, measure) + at, bool(of_panel["estimated"].any()))
        axis.set_xlabel("contention")
    axes[0].set_yticks(range(len(rows)), [_cell_label(*row).replace("\n", ", ") for row in rows])
    handles = [Patch(facecolor=_pale(style.color), label=name) for name, style in styles.items()]
    legend_above(figure, [*handles, Patch(facecolor="white", edgecolor="#8a8a8a", hatch="////", label="a tie")])
    note = "Colour: the best policy. Hatched: its interval against the best baseline holds 1."
    return finish(figure, title, f"{note} {caption}")


def _cell_label(workload: str, profile: str, share: float) -> str:
    return f"{workload}{f', decode x{share:g}' if share != 1 else ''}\n{profile}"


def _pale(color: str) -> tuple[float, float, float]:
    red, green, blue = (1 - 0.55 * (1 - part) for part in to_rgb(color))
    return red, green, blue
