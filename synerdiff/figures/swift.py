"""SwiftDiffusion's strategies: where each pays over LoRA share, load and GPUs, and what each is worth alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any, Protocol

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synerdiff.figures.style import finish, new_figure, styled

_SATURATED = "all at\nonce"
_MOST = 3.0
"""log2 of the speed-up at which the colours end."""


class Case(Protocol):
    """One bar of the ablation."""

    @property
    def name(self) -> str: ...
    @property
    def gpus(self) -> int: ...
    @property
    def latency_s(self) -> float: ...
    @property
    def gpu_seconds(self) -> float: ...


@styled
def strategy_map(ratios: Sequence[dict[str, Any]], service: str, requests: int, seeds: int) -> Figure:
    """One row of maps per set of strategies, one column per number of GPUs: speed-up by load and LoRA share.

    ``ratios``: strategies, gpus, lora_share, load (0: everything arrives at once), speedup. The first set is the
    baseline and is left out.
    """
    names = list(dict.fromkeys(row["strategies"] for row in ratios))[1:]
    gpus = sorted({row["gpus"] for row in ratios})
    shares = sorted({row["lora_share"] for row in ratios}, reverse=True)
    loads = sorted({row["load"] for row in ratios} - {0.0})
    table = {(r["strategies"], r["gpus"], r["lora_share"], r["load"]): r["speedup"] for r in ratios}
    figure = new_figure(3.2 * len(gpus) + 1.6, 1.35 * len(names) + 1.9)
    grid = figure.subplots(len(names), len(gpus), squeeze=False, sharex=True, sharey=True)
    norm = TwoSlopeNorm(0.0, -_MOST, _MOST)
    image = None
    for axes, name in zip(grid, names, strict=True):
        for axis, count in zip(axes, gpus, strict=True):
            cells = np.array([[table[name, count, share, load] for load in (*loads, 0.0)] for share in shares])
            image = axis.imshow(np.log2(cells), cmap="RdBu", norm=norm, aspect="auto")
            axis.grid(visible=False)
            for (y, x), value in np.ndenumerate(cells):
                text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                dark = abs(log2(value)) > 0.65 * _MOST
                axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
            axis.axvline(len(loads) - 0.5, color="#444444", linewidth=1)
            axis.set_title(f"{name}, {count} GPUs", loc="left", fontsize=8.5)
            axis.set_xticks(range(len(loads) + 1), [*(f"{load:g}" for load in loads), _SATURATED])
            axis.set_yticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    for axis in grid[-1]:
        axis.set_xlabel("load")
    for axes in grid:
        axes[0].set_ylabel("with LoRAs")
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=0.5, aspect=30, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.set_label("times as fast as inline and synchronous")
    caption = (
        f"Mean latency of inline, synchronous serving / that of the set, on as many GPUs and the same arrivals; last "
        f"column: GPU-seconds per image at saturation, the same way. Load 1 is what the GPUs sustain inline and "
        f"synchronously. Compiled SDXL on H800, batch 1, shortest queue, {requests} requests x {seeds} seeds, "
        f"adapters as popular as in Katz's production service {service} (every request has ControlNets), 40 LoRAs "
        f"cached on each worker's host; GPUs divided between workers and services for the highest throughput."
    )
    return finish(figure, "Where each strategy pays", caption, estimated=True)


@styled
def strategy_steps(cases: Sequence[Case]) -> Figure:
    """Two panels of bars, one bar per case: latency of a request alone, and the GPU-seconds that it holds."""
    figure = new_figure(9.0, 0.36 * len(cases) + 1.9)
    latency, cost = figure.subplots(1, 2, sharey=True)
    places = range(len(cases))
    for axis, values, unit in (
        (latency, [case.latency_s for case in cases], "s"),
        (cost, [case.gpu_seconds for case in cases], "GPU-s"),
    ):
        colors = ["#8a8a8a", "#56b4e9", *["#0072b2"] * (len(cases) - 3), "#d55e00"]
        axis.barh(places, values, color=colors, height=0.7)
        for place, value, case in zip(places, values, cases, strict=True):
            note = f" {value:.2f} {unit}"
            note += (
                f", {case.gpus} GPU{'s' if case.gpus > 1 else ''}" if unit == "GPU-s" else f", {values[0] / value:.1f}x"
            )
            axis.text(value, place, note, va="center", fontsize=7.5)
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, max(values) * 1.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    latency.set_yticks(places, [case.name for case in cases])
    latency.invert_yaxis()
    latency.set_xlabel("latency")
    cost.set_xlabel("GPUs held x latency")
    caption = (
        "One request alone: SDXL 1024x1024 on H800, 50 guided steps, 3 ControlNets, 2 LoRAs; every ControlNet has a "
        "service GPU (two with guidance on two GPUs). From published component times and stated estimates."
    )
    return finish(figure, "What each strategy is worth to one request", caption, estimated=True)
