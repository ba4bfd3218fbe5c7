"""Paired comparisons of a study: each rule against the rival of equal cost, calibrated schedules against plain ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from synerdiff.core import InputError
from synerdiff.files import atomic, read_text
from synerdiff.results.intervals import Interval

FILE = "comparisons.csv"


class Comparison(NamedTuple):
    """Mean SSIM of a rule minus that of another on the same images, with its 95% interval."""

    solver: str
    steps: int
    guidance_scale: float
    rule: str
    against: str
    images: str
    """``all``, ``held out`` (prompts and seeds that chose nothing) or ``tuned prompts``."""
    n: int
    difference: float
    low: float
    high: float

    @property
    def setting(self) -> tuple[str, int, float]:
        return (self.solver, self.steps, self.guidance_scale)


def comparison(
    setting: tuple[str, int, float], rule: str, against: str, images: str, difference: Interval
) -> Comparison:
    return Comparison(*setting, rule, against, images, difference.n, difference.value, difference.low, difference.high)


def read_comparisons(folder: Path) -> list[Comparison]:
    """The comparisons of a study's folder, empty when it has none. InputError for a file that is none of ours."""
    path = folder / FILE
    if not path.is_file():
        return []
    reader = csv.reader(io.StringIO(read_text(path, "table of comparisons")))
    if tuple(next(reader, ())) != Comparison._fields:
        raise InputError(f"{path}: the columns are not {', '.join(Comparison._fields)}.")
    found = []
    for cells in reader:
        try:
            solver, steps, scale, rule, against, images, n, difference, low, high = cells
            numbers = float(difference), float(low), float(high)
            found.append(Comparison(solver, int(steps), float(scale), rule, against, images, int(n), *numbers))
        except ValueError:
            raise InputError(f"{path}, line {reader.line_num}: this is no comparison of two rules.") from None
    return found


def write_comparisons(folder: Path, comparisons: Iterable[Comparison]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Comparison._fields)
    for line in sorted(comparisons):
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in line])
    with atomic(folder / FILE) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
