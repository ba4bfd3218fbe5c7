"""The fidelity table: what each way of skipping guidance costs in images, as ``synerdiff fidelity`` measured it.

Two files in one folder, described in ``docs/fidelity.md``: ``fidelity.yaml`` says which model, resolution, measure and
versions; ``fidelity.csv`` has one row per solver, step count, guidance scale and rule. Nothing here loads torch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from synerdiff.core import GUIDED, InputError, Mode
from synerdiff.diffusion import MODELS
from synerdiff.files import atomic, read_text, read_yaml, write_yaml
from synerdiff.results.intervals import Interval

_T = TypeVar("_T", int, float)

SCHEMA_VERSION = 1
HEAD, ROWS, COMPARISONS = "fidelity.yaml", "fidelity.csv", "comparisons.csv"
VARIES = "varies"
"""Stands for the skipped steps of a rule that decides by image: a study measures it, a budget cannot name it."""


class Score(NamedTuple):
    """One row: a rule under one solver, step count and guidance scale, against full guidance from the same seeds."""

    solver: str
    steps: int
    """Steps of the images compared with."""
    guidance_scale: float
    rule: str
    run_steps: int
    """Steps taken: fewer than ``steps`` for the equal-cost baseline, which skips nothing."""
    mode: Mode
    """What a skipped step does; guided when nothing is skipped."""
    schedule: str
    warmup_steps: int
    skipped_steps: tuple[int, ...] | None
    """Indices of the steps without guidance, rising; None when they vary by image."""
    rows: float
    """Denoiser rows per image (a mean where they vary); full guidance takes 2 * steps."""
    n: int
    """Images."""
    ssim: float
    ssim_low: float
    ssim_high: float
    """Bounds of the 95% t interval of the mean over images; so below."""
    psnr_db: float
    psnr_low_db: float
    psnr_high_db: float
    recognised: float | None
    """Share of images that a classifier assigns to their class: a gate for gross failure, no measure of quality."""
    held_out: bool
    """Judged only on seeds and prompts that the rule was not chosen on."""

    @property
    def rows_share(self) -> float:
        """Rows as a share of full guidance."""
        return self.rows / (2 * self.steps)


class PairedScore(NamedTuple):
    """Mean SSIM of a rule minus that of another on the same images, with its 95% t interval."""

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

    @classmethod
    def of(
        cls, setting: tuple[str, int, float], rule: str, against: str, images: str, difference: Interval
    ) -> PairedScore:
        return cls(*setting, rule, against, images, difference.n, difference.value, difference.low, difference.high)

    @property
    def setting(self) -> tuple[str, int, float]:
        return (self.solver, self.steps, self.guidance_scale)


@dataclass(frozen=True, slots=True)
class FidelityTable:
    """The rows, and what they were measured with (``model``, ``resolution``, ``solver``: the model's own, ...)."""

    path: Path
    head: Mapping[str, Any]
    rows: tuple[Score, ...]

    @property
    def model(self) -> str:
        return str(self.head["model"])

    @property
    def resolution(self) -> int | list[int]:
        """Side in pixels, or [height, width]."""
        return self.head["resolution"]  # type: ignore[no-any-return]

    @property
    def solver(self) -> str:
        """The model's own scheduler, by class name: what engines run unless told otherwise."""
        return str(self.head["solver"])


def find_fidelity(given: Path | None, profile_folder: Path, model: str) -> Path:
    """The folder of the table: as given, else beside the profile, else what ships with the model.

    Raises InputError when there is none.
    """
    candidates = [given] if given is not None else [profile_folder]
    if given is None and Path(model).name == model:
        candidates.append(MODELS / model)
    for folder in candidates:
        if (folder / HEAD).is_file():
            return folder
    if given is not None:
        raise InputError(f"{given}: this folder holds no {HEAD}, so it is not a fidelity table.")
    raise InputError(
        f"there is no fidelity table beside the profile {profile_folder} and none ships for model '{model}'; "
        f"measure one with: synerdiff fidelity --model {model} --out DIR"
    )


def read_fidelity(folder: Path) -> FidelityTable:
    """Read and check a table; InputError names file, line and column of what is wrong."""
    head_path, rows_path = folder / HEAD, folder / ROWS
    head = read_yaml(head_path, "fidelity table")
    version = head.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{head_path}: schema_version is {version!r}; this version of synerdiff reads {SCHEMA_VERSION}."
        )
    for field in ("model", "solver"):
        if not isinstance(head.get(field), str):
            raise InputError(f"{head_path}: {field} is {head.get(field)!r}; a name is needed.")
    sides = head.get("resolution")
    if not isinstance(sides, int) and not (isinstance(sides, list) and all(isinstance(side, int) for side in sides)):
        raise InputError(f"{head_path}: resolution is {sides!r}; a number of pixels or [height, width] is needed.")
    reader = csv.reader(io.StringIO(read_text(rows_path, "fidelity table")))
    header = next(reader, [])
    missing = [column for column in Score._fields if column not in header]
    if missing:
        raise InputError(
            f"{rows_path}: the column {missing[0]} is missing; a fidelity table has {', '.join(Score._fields)}."
        )
    rows = []
    for cells in reader:
        if len(cells) != len(header):
            raise InputError(
                f"{rows_path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}."
            )
        rows.append(_Line(f"{rows_path}, line {reader.line_num}", dict(zip(header, cells, strict=True))).score())
    if not rows:
        raise InputError(f"{rows_path}: the fidelity table has no rows.")
    return FidelityTable(folder, head, tuple(rows))


def write_fidelity(folder: Path, head: Mapping[str, Any], rows: Iterable[Score]) -> None:
    """Write both files, the head last; rows in the order of their solver, steps, guidance, cost and rule."""
    ordered = sorted(rows, key=lambda row: (row.solver, row.steps, row.guidance_scale, -row.rows, row.rule))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Score._fields)
    for row in ordered:
        writer.writerow([_cell(name, value) for name, value in zip(Score._fields, row, strict=True)])
    with atomic(folder / ROWS) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    write_yaml(folder / HEAD, {"schema_version": SCHEMA_VERSION, **head})


def read_comparisons(folder: Path) -> list[PairedScore]:
    """The comparisons of a study's folder, empty when it has none. InputError for a file that is none of ours."""
    path = folder / COMPARISONS
    if not path.is_file():
        return []
    reader = csv.reader(io.StringIO(read_text(path, "table of comparisons")))
    if tuple(next(reader, ())) != PairedScore._fields:
        raise InputError(f"{path}: the columns are not {', '.join(PairedScore._fields)}.")
    found = []
    for cells in reader:
        try:
            solver, steps, scale, rule, against, images, n, difference, low, high = cells
            numbers = float(difference), float(low), float(high)
            found.append(PairedScore(solver, int(steps), float(scale), rule, against, images, int(n), *numbers))
        except ValueError:
            raise InputError(f"{path}, line {reader.line_num}: this is no comparison of two rules.") from None
    return found


def write_comparisons(folder: Path, comparisons: Iterable[PairedScore]) -> None:
    """Write ``comparisons.csv``, in the order of its columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(PairedScore._fields)
    for line in sorted(comparisons):
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in line])
    with atomic(folder / COMPARISONS) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _cell(name: str, value: Any) -> str:
    if name == "skipped_steps":
        return VARIES if value is None else ";".join(map(str, value))
    if name == "held_out":
        return str(int(value))
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class _Line:
    """One CSV line with the place it came from."""

    def __init__(self, place: str, cells: Mapping[str, str]) -> None:
        self.place, self.cells = place, cells

    def score(self) -> Score:
        steps = self._number("steps", int, 1)
        mode = self.cells["mode"]
        if mode not in list(Mode):
            raise InputError(f"{self.place}: mode is '{mode}'; allowed are {', '.join(Mode)}.")
        skipped = self._skipped(steps)
        if (mode == GUIDED) != (skipped == ()):
            raise InputError(f"{self.place}: mode is {mode}, which contradicts its skipped_steps.")
        ssim = [self._number(name, float, -1.0, 1.0) for name in ("ssim_low", "ssim", "ssim_high")]
        psnr = [self._number(name, float, 0.0) for name in ("psnr_low_db", "psnr_db", "psnr_high_db")]
        for name, (low, middle, high) in (("ssim", ssim), ("psnr_db", psnr)):
            if not low <= middle <= high:
                raise InputError(f"{self.place}: {name} is {middle}, outside its own interval {low} to {high}.")
        return Score(
            solver=self.cells["solver"],
            steps=steps,
            guidance_scale=self._number("guidance_scale", float, 1.0),
            rule=self.cells["rule"],
            run_steps=self._number("run_steps", int, 1),
            mode=Mode(mode),
            schedule=self.cells["schedule"],
            warmup_steps=self._number("warmup_steps", int, 0),
            skipped_steps=skipped,
            rows=self._number("rows", float, 1.0),
            n=self._number("n", int, 2),
            ssim=ssim[1],
            ssim_low=ssim[0],
            ssim_high=ssim[2],
            psnr_db=psnr[1],
            psnr_low_db=psnr[0],
            psnr_high_db=psnr[2],
            recognised=self._number("recognised", float, 0.0, 1.0) if self.cells["recognised"] else None,
            held_out=self._number("held_out", int, 0, 1) == 1,
        )

    def _number(self, column: str, kind: type[_T], low: _T, high: _T | None = None) -> _T:
        text = self.cells[column].strip()
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise InputError(f"{self.place}: {column} is {text!r}; a {what} is needed.") from None
        if not isfinite(value) or value < low or (high is not None and value > high):
            allowed = f"at least {low} is needed" if high is None else f"{low} to {high} is allowed"
            raise InputError(f"{self.place}: {column} is {text}; {allowed}.")
        return value

    def _skipped(self, steps: int) -> tuple[int, ...] | None:
        text = self.cells["skipped_steps"].strip()
        if text == VARIES:
            return None
        parts: Sequence[str] = text.split(";") if text else ()
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise InputError(
                f"{self.place}: skipped_steps is {text!r}; step indices separated by ; or {VARIES} are needed."
            )
        found = tuple(int(part) for part in parts)
        if list(found) != sorted(set(found)) or (found and found[-1] >= steps):
            raise InputError(f"{self.place}: skipped_steps must rise without repeats and lie below {steps}.")
        return found
