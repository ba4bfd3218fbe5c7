"""What asynchronous LoRA loading costs in images: similarity, what is left of the LoRA's effect, and recognition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from synerdiff.figures.style import finish, new_figure, styled

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#882255")
_MARKERS = ("o", "s", "^", "D")
_PANELS = (("ssim", "SSIM against K = 0"), ("effect", "share of the LoRA's effect"), ("recognised", "recognised"))


@styled
def bound_curves(
    loras: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "What the bound K costs in images", caption: str
) -> Figure:
    """Three panels over the steps that ran without the LoRA; ``loras``: label -> rows of a bound study, as mappings."""
    panels = [panel for panel in _PANELS if any(row[panel[0]] is not None for rows in loras.values() for row in rows)]
    figure = new_figure(3.5 * len(panels) + 1.0, 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, label) in zip(axes, panels, strict=True):
        for (lora, rows), color, marker in zip(loras.items(), cycle(_COLORS), cycle(_MARKERS), strict=False):
            x, y = [row["bound_steps"] for row in rows], [row[name] for row in rows]
            around = None
            if f"{name}_low" in rows[0]:
                low = [row[name] - row[f"{name}_low"] for row in rows]
                high = [row[f"{name}_high"] - row[name] for row in rows]
                around = [[max(0.0, value) for value in side] for side in (low, high)]
            axis.errorbar(
                x, y, yerr=around, color=color, marker=marker, markersize=4.5, capsize=2, elinewidth=0.8, label=lora
            )
        axis.set_title(label, loc="left")
        axis.set_xlabel("K: steps without the LoRA")
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]), top=max(1.03, axis.get_ylim()[1]))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    note = "Means over images, bars: 95% t intervals. The last point of a line never has the LoRA."
    return finish(figure, title, f"{note} {caption}", False)
