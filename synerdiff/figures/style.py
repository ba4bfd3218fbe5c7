"""One look for every figure: fonts, a fixed colour, marker and line per policy, captions, and the mark of estimates."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator

from synerdiff.files import atomic

_P = ParamSpec("_P")

ESTIMATED = "estimated profile, not measured"

_CAPTION_POINTS = 8
_LINE_SPACING = 1.3

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "synerdiff",
    "hatch.linewidth": 0.6,
}
"""A fixed hash salt makes the same data give the same SVG."""


@dataclass(frozen=True, slots=True)
class PolicyStyle:
    color: str
    marker: str
    linestyle: Any
    """A matplotlib line style: a name or a dash pattern."""


POLICY_STYLES = {
    "static": PolicyStyle("#8a8a8a", "s", ":"),
    "dynamic": PolicyStyle("#999933", "D", ":"),
    "continuous-serial": PolicyStyle("#000000", "o", "-"),
    "continuous-parallel": PolicyStyle("#56b4e9", "^", "-"),
    "chunked": PolicyStyle("#009e73", "v", "--"),
    "skip-cfg": PolicyStyle("#ddaa33", "<", "--"),
    "synerdiff": PolicyStyle("#d55e00", "P", "-"),
    "synerdiff-feedback": PolicyStyle("#882255", "X", "-"),
    "load-skip": PolicyStyle("#0072b2", "*", "-"),
    "edf": PolicyStyle("#cc79a7", "h", "-."),
    "auto": PolicyStyle("#332288", "d", "-."),
}
"""Colours that the common kinds of colour blindness keep apart; marker and line differ as well."""

_OTHERS = (
    PolicyStyle("#44aa99", ">", (0, (5, 1))),
    PolicyStyle("#aa4499", "p", "--"),
    PolicyStyle("#117733", "8", "-."),
    PolicyStyle("#cc6677", "H", ":"),
)


def policy_styles(names: Iterable[str]) -> dict[str, PolicyStyle]:
    """A style per name, known policies first in their fixed order, then others as they come."""
    given = list(dict.fromkeys(names))
    ordered = [name for name in POLICY_STYLES if name in given]
    spare = cycle(_OTHERS)
    styles = {name: POLICY_STYLES[name] for name in ordered}
    return styles | {name: next(spare) for name in given if name not in POLICY_STYLES}


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """A drawing function under this module's settings, without changing those of the caller."""

    @wraps(draw)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(width_in: float, height_in: float) -> Figure:
    return Figure(figsize=(width_in, height_in), layout="constrained")


def finish(figure: Figure, title: str, caption: str, estimated: bool) -> Figure:
    """Title on top, caption below, and a plain mark when any of the data came from an estimated profile."""
    width_in = figure.get_size_inches()[0]
    lines = textwrap.wrap(title, int(width_in * 10)) or [""]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
    notes = textwrap.wrap(caption, int(width_in * 15.5))
    if estimated:
        # The caption keeps its first line free for the mark, which has a colour of its own.
        notes.insert(0, " ")
    if notes:
        label = figure.supxlabel(
            "\n".join(notes), x=0.01, ha="left", fontsize=_CAPTION_POINTS, linespacing=_LINE_SPACING, color="#444444"
        )
        if estimated:
            mark = Annotation(
                f"[{ESTIMATED}]",
                (0, 1),
                xycoords=label,
                va="top",
                color="#b3001b",
                fontsize=_CAPTION_POINTS,
                fontweight="bold",
                annotation_clip=False,
            )
            mark.set_in_layout(False)
            figure.add_artist(mark)
    return figure


def policy_legend(figure: Figure, styles: dict[str, PolicyStyle], markers: bool = True) -> None:
    """One legend for all panels, beside them."""
    handles = [
        Line2D(
            [],
            [],
            color=style.color,
            marker=style.marker if markers else "",
            linestyle=style.linestyle,
            label=name,
        )
        for name, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside right upper")


def plain_log_ticks(axis: Axes) -> None:
    """Logarithmic y axis labelled with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png`` into the folder, each in one step; the paths written.

    The same figure gives the same bytes. InputError when the folder cannot be written.
    """
    written = []
    with matplotlib.rc_context(RC):
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            path = folder / f"{name}.{kind}"
            with atomic(path) as temporary:
                figure.savefig(temporary, format=kind, metadata=metadata)
            written.append(path)
    return written
