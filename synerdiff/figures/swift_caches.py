"""Loads per request by cache size: the trace model beside the published curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from synerdiff.figures.style import finish, new_figure, styled

_LOOKS = {"lru": ("#0072b2", "o"), "lfu": ("#d55e00", "s")}
_TITLES = {"lora": "LoRAs", "controlnet": "ControlNets"}


@styled
def cache_figure(points: Sequence[dict[str, Any]]) -> Figure:
    """One panel per service and kind of adapter; lines: the model, hollow marks: published.

    ``points``: service, kind, rule, size, loads_per_request, published (None where not at hand).
    """
    panels = list(dict.fromkeys((point["service"], point["kind"]) for point in points))
    figure = new_figure(10.5, 3.7)
    axes = figure.subplots(1, len(panels), sharex=True)
    published = False
    for axis, (service, kind) in zip(axes, panels, strict=True):
        for rule, (color, marker) in _LOOKS.items():
            chosen = [p for p in points if (p["service"], p["kind"], p["rule"]) == (service, kind, rule)]
            sizes = [p["size"] for p in chosen]
            axis.plot(sizes, [p["loads_per_request"] for p in chosen], color=color, label=f"{rule.upper()}, model")
            known = [p for p in chosen if p["published"] is not None]
            if known:
                published = True
                axis.plot(
                    [p["size"] for p in known],
                    [p["published"] for p in known],
                    color=color,
                    marker=marker,
                    markerfacecolor="none",
                    linestyle="",
                    label=f"{rule.upper()}, published",
                )
        axis.set_title(f"{_TITLES[kind]}, service {service}", loc="left")
        axis.set_xlabel("files in the cache")
        axis.set_ylim(bottom=0)
        axis.set_xticks(range(2, 11, 2))
    axes[0].set_ylabel("loads per request")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    caption = (
        "Model: popularity of Katz's production trace, and requests that repeat an earlier one, fitted to the LRU "
        "curve at 1, 2 and 4 files; all other points are predictions."
    )
    if published:
        caption += " Published: read off the plots of Katz's authors, about +-0.01."
    return finish(figure, "What a cache spares", caption, estimated=False)
