"""The fidelity table: what each way of skipping guidance costs in images, as ``synerdiff fidelity`` measured it.

Two files in one folder, described in ``docs/fidelity.md``: ``fidelity.yaml`` says which model, resolution, measure and
versions; ``fidelity.csv`` has one row per solver, step count, guidance scale and rule. Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from synerdiff.core import GUIDED, InputError, Mode
from synerdiff.diffusion import MODELS
from synerdiff.files import Row, read_rows, read_yaml, shown, write_rows, write_yaml
from synerdiff.results.intervals import Interval

SCHEMA_VERSION = 1
MOST_STEPS = 100_000
HEAD, ROWS, COMPARISONS = "fidelity.yaml", "fidelity.csv", "comparisons.csv"
VARIES = "varies"
"""Stands for the skipped steps of a rule that decides by image: a study measures it, a budget cannot name it."""


def significant(value: float) -> float:
    """To the six digits that a study keeps; what is read from a table is written as it stood."""
    return float(f"{value:.6g}")


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
        """From a setting (solver, steps, guidance scale) and a difference with its interval."""
        values = map(significant, (difference.value, difference.low, difference.high))
        return cls(*setting, rule, against, images, difference.n, *values)

    @property
    def setting(self) -> tuple[str, int, float]:
        """Solver, steps and guidance scale."""
        return (self.solver, self.steps, self.guidance_scale)


@dataclass(frozen=True, slots=True)
class FidelityTable:
    """The rows, and what they were measured with (``model``, ``resolution``, ``solver``: the model's own, ...)."""

    path: Path
    head: Mapping[str, Any]
    rows: tuple[Score, ...]

    @property
    def model(self) -> str:
        """As it was named to the study."""
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
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(
            f"{head_path}: schema_version is {version!r}; this version of synerdiff reads {SCHEMA_VERSION}."
        )
    for field in ("model", "solver"):
        if not isinstance(head.get(field), str):
            raise InputError(f"{head_path}: {field} is {head.get(field)!r}; a name is needed.")
    sides = head.get("resolution")
    pixels = sides if isinstance(sides, list) and len(sides) == 2 else [sides]
    if not all(type(side) is int and side > 0 for side in pixels):
        raise InputError(f"{head_path}: resolution is {sides!r}; a number of pixels or [height, width] is needed.")
    rows: dict[tuple[object, ...], Score] = {}
    same_images: dict[tuple[object, ...], Score] = {}
    for row in read_rows(rows_path, Score._fields, "fidelity table"):
        score = _score(row)
        if rows.setdefault(score[:4], score) is not score:
            raise row.error(
                "rule",
                f"is '{shown(score.rule)}', which stands above already for {score.solver}, {score.steps} steps and "
                f"guidance scale {score.guidance_scale:g}",
            )
        images = (*score[:3], score.run_steps, score.mode, score.skipped_steps, score.n, score.held_out)
        other = same_images.setdefault(images, score)
        if score.skipped_steps is not None and other.ssim != score.ssim:
            raise row.error(
                "ssim", f"is {score.ssim:g}; '{shown(other.rule)}' above skips the same steps and has {other.ssim:g}"
            )
    if not rows:
        raise InputError(f"{rows_path}: the fidelity table has no rows.")
    return FidelityTable(folder, head, tuple(rows.values()))


def write_fidelity(folder: Path, head: Mapping[str, Any], rows: Iterable[Score]) -> None:
    """Write both files, the head last; rows in the order of their solver, steps, guidance, cost and rule."""
    ordered = sorted(rows, key=lambda row: (row.solver, row.steps, row.guidance_scale, -row.rows, row.rule))
    write_rows(folder / ROWS, Score._fields, map(_cells, ordered))
    write_yaml(folder / HEAD, {"schema_version": SCHEMA_VERSION, **head})


def read_comparisons(folder: Path) -> list[PairedScore]:
    """The comparisons of a study's folder, empty when it has none. InputError for a file that is none of ours."""
    path = folder / COMPARISONS
    if not path.is_file():
        return []
    return [
        PairedScore(
            solver=row.name("solver"),
            steps=row.integer("steps", 1),
            guidance_scale=row.number("guidance_scale"),
            rule=row.name("rule"),
            against=row.name("against"),
            images=row.name("images"),
            n=row.integer("n", 2),
            difference=row.number("difference", -2, 2),
            low=row.number("low"),
            high=row.number("high"),
        )
        for row in read_rows(path, PairedScore._fields, "table of comparisons")
    ]


def write_comparisons(folder: Path, comparisons: Iterable[PairedScore]) -> None:
    """Write ``comparisons.csv``, in the order of its columns."""
    write_rows(folder / COMPARISONS, PairedScore._fields, map(_cells, sorted(comparisons)))


def _cells(row: Score | PairedScore) -> list[str]:
    return [_cell(name, value) for name, value in row._asdict().items()]


def _cell(name: str, value: Any) -> str:
    if name == "skipped_steps":
        return VARIES if value is None else ";".join(map(str, value))
    if name == "held_out":
        return str(int(value))
    if value is None:
        return ""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _score(row: Row) -> Score:
    """One line, checked by itself."""
    steps = row.integer("steps", 1, MOST_STEPS)
    run_steps = row.integer("run_steps", 1, steps)
    if row.text("mode") not in list(Mode):
        raise row.error("mode", f"is '{shown(row.text('mode'))}'; allowed are {', '.join(Mode)}")
    mode = Mode(row.text("mode"))
    skipped = _skipped(row, run_steps)
    if (mode == GUIDED) != (skipped == ()):
        raise row.error("mode", f"is {mode}, which contradicts its skipped_steps")
    rows = row.number("rows", run_steps, 2 * run_steps)
    if skipped is not None and rows != 2 * run_steps - len(skipped):
        raise row.error("rows", f"is {rows:g}, which contradicts its skipped_steps: {2 * run_steps - len(skipped)}")
    ssim = [row.number(name, -1, 1) for name in ("ssim", "ssim_low", "ssim_high")]
    psnr = [row.number(name, 0) for name in ("psnr_db", "psnr_low_db", "psnr_high_db")]
    for name, (middle, low, high) in (("ssim", ssim), ("psnr_db", psnr)):
        if not low <= middle <= high:
            raise row.error(name, f"is {middle:g}, outside its own interval {low:g} to {high:g}")
    setting = (row.name("solver"), steps, row.number("guidance_scale", 1), row.name("rule"), run_steps, mode)
    rule = (row.name("schedule"), row.integer("warmup_steps", 0, run_steps), skipped, rows, row.integer("n", 2))
    recognised = row.number("recognised", 0, 1) if row.text("recognised") else None
    return Score._make((*setting, *rule, *ssim, *psnr, recognised, row.flag("held_out")))


def _skipped(row: Row, steps: int) -> tuple[int, ...] | None:
    text = row.text("skipped_steps").strip()
    if text == VARIES:
        return None
    parts = text.split(";") if text else []
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
        raise row.error("skipped_steps", f"is {shown(repr(text))}; step indices separated by ; or {VARIES} are needed")
    indices = tuple(int(part) for part in parts)
    if list(indices) != sorted(set(indices)) or (indices and indices[-1] >= steps):
        raise row.error("skipped_steps", f"must rise without repeats and lie below {steps}")
    return indices
