"""The one progress bar and the one table that commands print."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import typer

_GAP = 2
_NUMERIC = re.compile(r"[-+]?[\d.,]+ ?(%|x|s|ms|d|h|min)?$|-$")


class Update(Protocol):
    """How far the work is: ``done`` of ``total``, and what runs now."""

    def __call__(self, done: float, total: float | None = None, text: str | None = None, /) -> None: ...


@contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Update]:
    """A bar with the remaining time on standard error while somebody watches it; without a terminal nothing is drawn.

    Yields what is told how far the work is. A total of 0 counts as unknown.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total=None, text=None, /: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # Drawing twice a second keeps the bar's own thread out of what is measured.
    with Progress(
        *columns, console=Console(stderr=True), refresh_per_second=2, speed_estimate_period=120, transient=True
    ) as bar:
        task = bar.add_task(label, total=total or None)
        shown_total = total

        def update(done: float, total: float | None = None, text: str | None = None, /) -> None:
            nonlocal shown_total
            shown_total = total if total is not None else shown_total
            bar.update(task, completed=done, total=shown_total or None, description=text)

        yield update


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; where the terminal is too narrow its columns go on below, beside the first one again.

    A cell is never wrapped. Columns of numbers stand to the right.
    """
    for line in table_lines(headers, rows, _width()):
        typer.echo(line)


def print_parts(parts: Sequence[str | tuple[Sequence[str], Sequence[Sequence[object]]]]) -> None:
    """Print lines and tables in their order."""
    for part in parts:
        if isinstance(part, str):
            typer.echo(part)
        else:
            print_table(*part)


def table_lines(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> list[str]:
    """The table's lines, at most ``width`` characters long where a column beside the first one fits into that."""
    table = [[str(cell) for cell in row] for row in (headers, *rows)]
    columns = list(zip(*table, strict=True))
    lengths = [max(map(len, column)) for column in columns]
    right = [len(column) > 1 and all(_NUMERIC.match(cell) for cell in column[1:]) for column in columns]
    lines: list[str] = []
    rest = list(range(1, len(columns)))
    while True:
        block, length = [0], lengths[0]
        while rest and (len(block) == 1 or width is None or length + _GAP + lengths[rest[0]] <= width):
            length += _GAP + lengths[rest[0]]
            block.append(rest.pop(0))
        lines += [""] if lines else []
        for row in table:
            cells = (row[i].rjust(lengths[i]) if right[i] else row[i].ljust(lengths[i]) for i in block)
            lines.append((" " * _GAP).join(cells).rstrip())
        if not rest:
            return lines


def _width() -> int | None:
    """Of the terminal, or what COLUMNS says; None for a file or a pipe, where nothing wraps."""
    if "COLUMNS" in os.environ or (sys.stdout is not None and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return None
