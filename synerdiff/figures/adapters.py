"""SwiftDiffusion's strategies: where each pays, what each is worth alone, what caches spare, what late LoRAs cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synerdiff.figures.comparison import MOST_NUMBERS, draw_map, map_bar
from synerdiff.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    finish,
    legend_above,
    new_figure,
    panel_title,
    styled,
    x_labels,
)

_LIMIT = 8.0
_LOOKS = {"lru": (BLUE, "o"), "lfu": (ORANGE, "s")}
_TITLES = {"lora": "LoRAs", "controlnet": "ControlNets"}
_LINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), ("#882255", "D"))
_PANELS = (("ssim", "SSIM against K = 0"), ("effect", "share of the LoRA's effect"), ("recognised", "recognised"))


@styled
def strategy_map(ratios: Sequence[dict[str, Any]], baseline: str, caption: str, estimated: bool = True) -> Figure:
    """One row of maps per set of strategies, one column per number of GPUs: speed-up by load and LoRA share.

    ``ratios``: strategies, gpus, lora_share, load (0: everything arrives at once), speedup. The baseline is left out;
    what was not run is blank.
    """
    names = list(dict.fromkeys(row["strategies"] for row in ratios if row["strategies"] != baseline))
    gpus = sorted({row["gpus"] for row in ratios})
    shares = sorted({row["lora_share"] for row in ratios})
    loads = sorted({row["load"] for row in ratios}, key=lambda load: load or inf)
    table = {(r["strategies"], r["gpus"], r["lora_share"], r["load"]): r["speedup"] for r in ratios}
    numbers = len(names) * len(gpus) * len(shares) * len(loads) <= MOST_NUMBERS
    figure = new_figure((0.17 * len(shares) + 0.6) * len(names) + 1.3)
    grid = figure.subplots(len(names), len(gpus), squeeze=False, sharex=True, sharey=True)
    shades = None
    for axes, name in zip(grid, names, strict=True):
        for axis, count in zip(axes, gpus, strict=True):
            cells = np.array([[table.get((name, count, share, load), nan) for load in loads] for share in shares])
            shades = draw_map(axis, cells, limit=_LIMIT, numbers=numbers)
            if not loads[-1]:
                axis.axvline(len(loads) - 1.5, color="#444444", linewidth=1)
            span = "" if numbers or np.isnan(cells).all() else f": {np.nanmin(cells):.2g} to {np.nanmax(cells):.2g}"
            panel_title(axis, f"{name}\n{count} GPUs{span}" if axis is axes[0] else f"{count} GPUs{span}", estimated)
            axis.set_xticks(range(len(loads)), [f"{load:g}" if load else "all\nat once" for load in loads])
            axis.set_yticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        axes[0].set_ylabel("with LoRAs")
    x_labels(grid[-1], "load")
    assert shades is not None
    map_bar(figure, shades, grid, _LIMIT, f"times as fast as {baseline}")
    last = " Last column: GPU-seconds per image at saturation, the same way." if not loads[-1] else ""
    note = f"Mean latency of {baseline} / that of the set, on as many GPUs and the same arrivals.{last} {caption}"
    return finish(figure, "Where each strategy pays", note)


@styled
def strategy_steps(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """Two panels of bars, one bar per case: latency of a request alone, and the GPU-seconds that it holds.

    ``cases``: name, gpus, latency_s, gpu_seconds.
    """
    figure = new_figure(0.2 * len(cases) + 1.3)
    axes = figure.subplots(1, 2, sharey=True)
    places = range(len(cases))
    colors = [GREY, "#56b4e9", *[BLUE] * (len(cases) - 3), ORANGE]
    alone = [case["latency_s"] for case in cases]
    costs = [case["gpu_seconds"] for case in cases]
    held = [f"{case['gpus']} GPU{'s' if case['gpus'] > 1 else ''}" for case in cases]
    notes = ([f" {s:.2f} s, {alone[0] / s:.1f}x" for s in alone],
             [f" {cost:.2f} GPU-s, {gpus}" for cost, gpus in zip(costs, held, strict=True)])  # fmt: skip
    for axis, values, texts, name in zip(
        axes, (alone, costs), notes, ("latency (s)", "GPUs held x latency (GPU-s)"), strict=True
    ):
        axis.barh(places, values, color=colors, height=0.7)
        for place, value, text in zip(places, values, texts, strict=True):
            axis.text(value, place, text, va="center", fontsize=6.5)
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, max(values) * 1.6)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        panel_title(axis, name, True)
    axes[0].set_yticks(places, [case["name"] for case in cases])
    axes[0].invert_yaxis()
    caption = (
        "One request alone: SDXL 1024x1024 on H800, 50 guided steps, 3 ControlNets, 2 LoRAs; every ControlNet has a "
        "service GPU (two with guidance on two GPUs). From published component times and stated estimates."
    )
    return finish(figure, "What each strategy is worth to one request", caption)


@styled
def cache_figure(points: Sequence[dict[str, Any]]) -> Figure:
    """One panel per service and kind of adapter; lines: the model, hollow marks: published.

    ``points``: service, kind, rule, size, loads_per_request, published (None where not at hand).
    """
    panels = list(dict.fromkeys((point["service"], point["kind"]) for point in points))
    figure = new_figure(2.7)
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axis, (service, kind) in zip(axes, panels, strict=True):
        for rule, (color, marker) in _LOOKS.items():
            chosen = [p for p in points if (p["service"], p["kind"], p["rule"]) == (service, kind, rule)]
            sizes, loads = [p["size"] for p in chosen], [p["loads_per_request"] for p in chosen]
            axis.plot(sizes, loads, color=color, label=f"{rule.upper()}, model")
            known = [(p["size"], p["published"]) for p in chosen if p["published"] is not None]
            if known:
                hollow: Any = {"marker": marker, "markerfacecolor": "none", "linestyle": "", "clip_on": False}
                axis.plot(*zip(*known, strict=True), label=f"{rule.upper()}, published", color=color, **hollow)
        panel_title(axis, f"{_TITLES[kind]}, service {service}")
        axis.set(xlabel="files in the cache", xticks=range(2, 11, 2))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("loads per request")
    legend_above(figure, axes[0].get_legend_handles_labels()[0], 4)
    caption = (
        "Model: popularity of Katz's production trace, and requests that repeat an earlier one, fitted to the LRU "
        "curve at 1, 2 and 4 files; all other points are predictions."
    )
    if any(point["published"] is not None for point in points):
        caption += " Published: read off the plots of Katz's authors, about +-0.01."
    return finish(figure, "What a cache spares", caption)


@styled
def bound_curves(loras: Mapping[str, Sequence[Mapping[str, Any]]], *, caption: str) -> Figure:
    """Three panels over the steps that ran without the LoRA; ``loras``: label -> rows of a bound study, as mappings."""
    panels = [panel for panel in _PANELS if any(row[panel[0]] is not None for rows in loras.values() for row in rows)]
    figure = new_figure(2.7)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, label) in zip(axes, panels, strict=True):
        for place, (lora, rows) in enumerate(loras.items()):
            color, marker = _LINES[place % len(_LINES)]
            around = None
            if f"{name}_low" in rows[0]:
                low = [max(0.0, row[name] - row[f"{name}_low"]) for row in rows]
                around = [low, [max(0.0, row[f"{name}_high"] - row[name]) for row in rows]]
            looks: Any = {"color": color, "marker": marker, "capsize": 2, "elinewidth": 0.8, "label": lora}
            axis.errorbar([row["bound_steps"] for row in rows], [row[name] for row in rows], yerr=around, **looks)
        panel_title(axis, label)
        axis.set_xlabel("K: steps without the LoRA")
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]), top=max(1.03, axis.get_ylim()[1]))
    legend_above(figure, axes[0].get_legend_handles_labels()[0])
    note = "Means over images, bars: 95% t intervals. The last point of a line never has the LoRA."
    return finish(figure, "What the bound K costs in images", f"{note} {caption}")
