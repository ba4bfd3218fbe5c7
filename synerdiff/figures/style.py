"""One look for every figure: width, fonts, a look per policy, axes of SSIM, captions, and the mark of estimates."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from synerdiff.files import atomic

_P = ParamSpec("_P")

PAGE_IN = 7.0
"""Width of every figure in inches: both columns of a page, so that text is printed in the size it has here."""
ESTIMATED = "estimated"
BLUE, ORANGE, GREEN, GREY, MARK = "#0072b2", "#d55e00", "#009e73", "#8a8a8a", "#b3001b"
UNITS_S = ((2 * 86_400.0, 86_400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (300.0, 60.0, "min"), (0.0, 1.0, "s"))
"""From how many seconds on a time axis counts in which unit."""

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True, slots=True)
class PolicyStyle:
    """How a policy is drawn, the same in every figure."""

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
    """A style per name, known policies first in their fixed order, then others as they come; beyond four these take the
    styles of policies that are not shown."""
    given = list(dict.fromkeys(names))
    spare = cycle([*_OTHERS, *(style for name, style in POLICY_STYLES.items() if name not in given)])
    styles = {name: style for name, style in POLICY_STYLES.items() if name in given}
    return styles | {name: next(spare) for name in given if name not in POLICY_STYLES}


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """A drawing function under this module's settings, without changing those of the caller."""

    @wraps(draw)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(height_in: float, width_in: float = PAGE_IN) -> Figure:
    """An empty figure, inches; by default as wide as both columns of a page."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def panel_grid(count: int, across: int, row_in: float, more_in: float, **shared: Any) -> tuple[Figure, Any]:
    """So many panels, at most ``across`` beside each other (array of axes; what is spare is blank), in rows of
    ``row_in`` inches and ``more_in`` for the rest."""
    columns = min(across, count)
    rows = -(-count // columns)
    figure = new_figure(row_in * rows + more_in)
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for spare in grid.flat[count:]:
        spare.set_axis_off()
    return figure, grid


def x_labels(axes: Any, text: str) -> None:
    """The same under each of the lowest panels."""
    for axis in axes:
        axis.set_xlabel(text)


def panel_title(axis: Axes, text: str, estimated: bool = False) -> None:
    """Title at the left of a panel; a panel that rests on an estimated profile bears the mark at its right edge."""
    axis.set_title(text, loc="left")
    if estimated:
        place: Any = {"transform": axis.transAxes, "rotation": 90, "ha": "left", "va": "top"}
        axis.text(1.01, 1.0, ESTIMATED, color=MARK, fontsize=7, fontweight="bold", **place)


def marked_panels(figure: Figure) -> int:
    """How many panels bear the mark of an estimate."""
    return sum(text.get_text() == ESTIMATED for axis in figure.axes for text in axis.texts)


def finish(figure: Figure, title: str, caption: str) -> Figure:
    """Title on top and caption below; where a panel is marked the caption says what the mark means."""
    width_in = figure.get_size_inches()[0]
    lines = "\n".join(textwrap.wrap(title, int(width_in * 12)))
    if figure.legends:
        # The layout would lay a title of the figure over a legend above the panels.
        figure.legends[0].set_title(lines, prop=FontProperties(size=9, weight="bold"))
        figure.legends[0].set_alignment("left")
    else:
        figure.suptitle(lines, x=0.01, ha="left", fontsize=9, fontweight="bold")
    if marked_panels(figure):
        caption = f"{caption.strip()} Panels marked '{ESTIMATED}' rest on an estimated profile, not on a measured one."
    notes = textwrap.wrap(caption, int(width_in * 18.5))
    if notes:
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=6.5, linespacing=1.3, color="#444444")
    return figure


def legend_above(figure: Figure, handles: Sequence[Artist], columns: int = 0) -> None:
    """One legend for all panels, between title and panels, where it covers nothing; as many columns as fit."""
    labels = [str(handle.get_label()) for handle in handles]
    fitting = int(figure.get_size_inches()[0] * 15.5 / (max(map(len, labels), default=1) + 6))
    columns = columns or max(1, min(len(handles), fitting))
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns)


def policy_legend(figure: Figure, styles: dict[str, PolicyStyle], markers: bool = True) -> None:
    """``legend_above`` of policies."""
    looks = ((name, style, style.marker if markers else "") for name, style in styles.items())
    legend_above(
        figure,
        [Line2D([], [], color=s.color, marker=mark, linestyle=s.linestyle, label=name) for name, s, mark in looks],
    )


def plain_log_ticks(axis: Axes) -> None:
    """Logarithmic y axis labelled with plain numbers; call it once the data are drawn."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 12 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")


def beside(axis: Axes, text: str, x: float, y: float, offset: tuple[float, float], **looks: Any) -> None:
    """A small word beside a point, on a white ground so that no line or tick runs through it."""
    ground: Any = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8}
    axis.annotate(text, (x, y), xytext=offset, textcoords="offset points", bbox=ground, **{"fontsize": 6.5} | looks)


def percent(ratio: float) -> str:
    """A ratio as a change: 1.05 is +5%, 1.004 is +0.4%."""
    change = 100 * (ratio - 1)
    return f"{change:+.0f}%" if abs(change) >= 0.95 else f"{change:+.1f}%" if abs(change) >= 0.05 else "0%"


LEAST_ERROR = 1e-4
SSIM_NOTE = f"SSIM against full guidance, same seeds; 1 is drawn at {1 - LEAST_ERROR:g}."
_SSIM_TICKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def ssim_error(ssim: float) -> float:
    """Where an SSIM stands on the axis: its distance from 1, at least ``LEAST_ERROR``."""
    return max(1 - ssim, LEAST_ERROR)


def ssim_axis(axis: Axes, side: str) -> None:
    """Make side ``x`` or ``y`` logarithmic in 1 - SSIM and reversed; call it once the data are drawn.

    At least a factor of 2 is shown.
    """
    near, far = sorted(axis.get_xlim() if side == "x" else axis.get_ylim())
    near = max(near, 0.7 * LEAST_ERROR)
    far = max(far, 1.4 * near, 1.4 * LEAST_ERROR)
    ticks = [tick for tick in _SSIM_TICKS if near <= tick <= far]
    labels = [f"{1 - tick:.4g}" for tick in ticks]
    if side == "x":
        axis.set_xscale("log")
        # Labels of neighbouring ticks would run into each other.
        axis.set_xticks(ticks, labels, rotation=60)
        axis.set_xlim(1.15 * far, near / 1.15)
        axis.set_xlabel("SSIM against full guidance")
    else:
        axis.set_yscale("log")
        axis.set_yticks(ticks, labels)
        axis.set_ylim(far, near)
    axis.minorticks_off()


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png", "pdf", "svg")) -> list[Path]:
    """Write ``name.png``, ``name.pdf`` and ``name.svg`` (or other ``kinds``) into the folder, each in one step; the
    paths written.

    The same figure gives the same bytes. An SVG has its title and its caption as metadata, for a page that sets them as
    text. InputError when the folder cannot be written.
    """
    written = []
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        for kind in kinds:
            path = folder / f"{name}.{kind}"
            with atomic(path) as temporary:
                if kind == "svg":
                    temporary.write_text(_svg(figure), encoding="utf-8")
                else:
                    metadata = {"Software": None} if kind == "png" else {"CreationDate": None}
                    figure.savefig(temporary, format=kind, metadata=metadata)
            written.append(path)
    return written


def _svg(figure: Figure) -> str:
    """The figure without the texts that ``finish`` wrote around it, which become its metadata; lengths to 0.01 pt."""
    title, caption = figure.get_suptitle(), figure.get_supxlabel()
    if figure.legends:  # which bears the title where it stands above the panels
        title = title or figure.legends[0].get_title().get_text()
        figure.legends[0].set_title("")
    words = {name: " ".join(text.split()) for name, text in (("Title", title), ("Description", caption)) if text}
    figure.suptitle("").set_in_layout(False)
    figure.supxlabel("").set_in_layout(False)
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, **words})
    text = re.sub(r'<g id="[^"]*">', "<g>", re.sub(r'\s*<g id="[^"]*"/>', "", stream.getvalue()))
    # Only inside of tags: what a figure says stays as it is.
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), text)
