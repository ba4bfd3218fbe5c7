"""The estimator held against times that others published: one row each, fitted and judged apart.

``published_times.csv`` holds single numbers with their sources. ``use`` was set before any fit: within each source and
card the rows alternate, the first is fitted, the second judged, and so on; text encoders, and rows found after
the fit, are judged only. ``before_ms`` is what the estimator said that this one replaced, where it said anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

from profiler.datasheets import GPUS, MODELS
from profiler.durations import FITTED, Constants, ForwardMode, forward
from profiler.operations import EXECUTIONS, decoder, text_encoders, unet
from synerdiff.files import Row, read_rows, shown, sides_of

PUBLISHED = Path(__file__).with_name("published_times.csv")
COLUMNS = (
    "gpu", "model", "part", "rows", "images", "steps", "resolution", "precision", "execution", "decode_bits",
    "decode_execution", "ms", "before_ms", "source", "use", "why",
)  # fmt: skip
PARTS = ("step", "decode", "text", "image")
STEP_GAP_S = 200e-6
PICTURE_S_PER_PIXEL = 20e-9
"""Turning pixels into a picture on the host, in pipelines that are not engines."""


@dataclass(frozen=True, slots=True)
class Published:
    """One published time in ms: a step of ``rows`` rows, a decode, a text encoding, or an image of a whole pipeline.

    A pipeline makes ``images`` images at once in ``steps`` steps; its time is per image.
    """

    gpu: str
    model: str
    part: str
    rows: int
    images: int
    steps: int
    height: int
    width: int
    precision: str
    execution: str
    decode_bits: int
    decode_execution: str
    ms: float
    before_ms: float | None
    source: str
    use: str


class Unusable(NamedTuple):
    """A row that cannot be judged, and why."""

    gpu: str
    model: str
    part: str
    source: str
    why: str


def read_published(path: Path = PUBLISHED) -> tuple[list[Published], list[Unusable]]:
    """Usable rows, and the others with their reasons. InputError names file and line."""
    rows = read_rows(path, COLUMNS, "table of published times")
    usable = [_published(row) for row in rows if row.text("use") != "unusable"]
    others = [Unusable._make(map(row.name, Unusable._fields)) for row in rows if row.text("use") == "unusable"]
    return usable, others


def _published(row: Row) -> Published:
    def one_of(column: str, allowed: Iterable[str]) -> str:
        if row.text(column) not in allowed:
            raise row.error(column, f"is '{row.text(column)}'; allowed are {', '.join(allowed)}")
        return row.text(column)

    def count(column: str, empty: int = 1) -> int:
        return row.integer(column, 1, 10_000) if row.text(column) else empty

    part = one_of("part", PARTS)
    sides = sides_of(row.text("resolution"))
    if sides is None:
        raise row.error("resolution", f"is '{shown(row.text('resolution'))}'; HEIGHTxWIDTH is needed")
    return Published(
        gpu=one_of("gpu", GPUS),
        model=one_of("model", MODELS),
        part=part,
        rows=count("rows"),
        images=count("images"),
        steps=count("steps"),
        height=sides[0],
        width=sides[1],
        precision=row.text("precision") or "fp16",
        execution=one_of("execution", EXECUTIONS),
        decode_bits=count("decode_bits", 16),
        decode_execution=one_of("decode_execution", EXECUTIONS) if part in ("decode", "image") else "",
        ms=row.number("ms", 1e-3, 1e9),
        before_ms=row.number("before_ms", 1e-3, 1e9) if row.text("before_ms") else None,
        source=row.name("source"),
        use=one_of("use", ("fit", "judge")),
    )


@lru_cache(maxsize=4096)
def _seconds(
    part: str, row: tuple[str, int, int], rows: int, gpu: str, mode: ForwardMode, constants: Constants
) -> float:
    """A UNet step, a decode or a text encoding alone; many rows share one."""
    model, height, width = row
    device = GPUS[gpu]
    if part == "step":
        return forward(unet(model, height, width, mode.execution), rows, device, mode, constants).seconds
    if part == "text":
        encoders = text_encoders(MODELS[model].text_encoders, mode.execution)
        return forward(encoders, rows, device, mode, constants).seconds
    atoms = decoder(model, height, width, mode.execution)
    return sum(forward(operations, rows, device, mode, constants).seconds for _, operations in atoms)


def estimate_ms(row: Published, constants: Constants = FITTED) -> float:
    """What the estimator says for a row, by the same functions as an estimated profile."""
    place = (row.model, row.height, row.width)
    engine = row.execution == "engine"
    seconds = 0.0
    if row.part in ("step", "image"):
        step = _seconds("step", place, row.rows, row.gpu, ForwardMode(row.execution, row.precision), constants)
        seconds += step if row.part == "step" else row.steps * (step + STEP_GAP_S)
    if row.part in ("text", "image"):
        prompts = 2 if row.part == "image" and row.rows > 1 else 1
        mode = ForwardMode("engine" if engine else "eager", "fp16")
        seconds += _seconds("text", place, prompts, row.gpu, mode, constants)
    if row.part in ("decode", "image"):
        mode = ForwardMode(row.decode_execution, "fp16", single=row.decode_bits == 32)
        decode = _seconds("decode", place, 1, row.gpu, mode, constants)
        picture = 0.0 if engine or row.part == "decode" else PICTURE_S_PER_PIXEL * row.height * row.width
        seconds += row.images * (decode + picture)
    return seconds * 1e3 / (row.images if row.part == "image" else 1)


@dataclass(frozen=True, slots=True)
class Compared:
    """A published time beside what is said of it, all in ms."""

    row: Published
    estimate_ms: float
    left_out_ms: float
    """By constants fitted without this card's rows."""
    roofline_ms: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Of several estimates: the median size of estimate / published - 1, shares within 10% and 25%, the median."""

    n: int
    size: float
    within_10: float
    within_25: float
    bias: float


def errors_of(pairs: Iterable[tuple[float, float]]) -> Errors:
    """Of (estimate, published) pairs, at least one."""
    off = [estimate / published - 1 for estimate, published in pairs]
    sizes = [abs(error) for error in off]
    within = [sum(size <= limit for size in sizes) / len(sizes) for limit in (0.10, 0.25)]
    return Errors(len(off), median(sizes), within[0], within[1], median(off))


def ratio_errors(judged: Iterable[Compared]) -> list[tuple[Published, Published, float]]:
    """(decode, step, error of the ratio decode / step) for every decode and every step of 1 or 2 rows of the same card,
    model, resolution and execution."""
    listed = list(judged)
    steps = [case for case in listed if case.row.part == "step" and case.row.rows <= 2]

    def same(row: Published) -> tuple[str, str, int, int, str]:
        return row.gpu, row.model, row.height, row.width, row.execution

    return [
        (decode.row, step.row, decode.estimate_ms / step.estimate_ms / (decode.row.ms / step.row.ms) - 1)
        for decode in listed
        if decode.row.part == "decode"
        for step in steps
        if same(step.row) == same(decode.row)
    ]


def summary(judged: Sequence[Compared]) -> list[tuple[str, Errors]]:
    """(what, errors): before and after on the rows that could be estimated before, then by use, with the card left out,
    by part, by execution, by card left out, and the roofline."""

    def off(said: str, cases: Iterable[Compared]) -> Errors:
        return errors_of((getattr(case, said), case.row.ms) for case in cases)

    old = [(case.row.before_ms, case) for case in judged if case.row.before_ms is not None]
    fitted, others = ([case for case in judged if case.row.use == use] for use in ("fit", "judge"))
    listed = [
        ("before: old estimator, rows it knew", errors_of((before_ms, case.row.ms) for before_ms, case in old)),
        ("after: the same rows", off("estimate_ms", (case for _, case in old))),
        ("after: rows of the fit", off("estimate_ms", fitted)),
        ("after: rows judged", off("estimate_ms", others)),
        ("after: every row, its card left out of the fit", off("left_out_ms", judged)),
        ("roofline of two constants: rows of the fit", off("roofline_ms", fitted)),
        ("roofline of two constants: rows judged", off("roofline_ms", others)),
    ]
    for field in ("part", "execution", "precision", "gpu"):
        for value in dict.fromkeys(getattr(case.row, field) for case in judged):
            cases = [case for case in judged if getattr(case.row, field) == value]
            listed.append((f"{field} {value}, card left out", off("left_out_ms", cases)))
    return listed


def case_name(row: Published) -> str:
    """What was timed, in a few words."""
    size = f"{row.height}x{row.width}"
    if row.part == "decode":
        return f"{row.model} decode, {size}, {row.decode_bits} bit"
    if row.part == "text":
        return f"{row.model} text encoders"
    step = f"{row.rows} row{'s' * (row.rows > 1)}, {size}, {row.precision}"
    if row.part == "step":
        return f"{row.model} step, {step}"
    return f"{row.model} image, {row.steps} steps, {step}, {row.decode_bits}-bit decode"


def _off(estimate_ms: float | None, row: Published) -> str:
    return "" if estimate_ms is None else f"{estimate_ms / row.ms - 1:+.1%}"


def table(judged: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): a line per published time, its estimates and their errors."""
    headers = [
        "card", "what", "execution", "published ms", "estimate ms", "error", "card left out", "before", "roofline",
        "use", "source",
    ]  # fmt: skip
    rows = [
        [
            *(case.row.gpu, case_name(case.row), case.row.execution, f"{case.row.ms:.2f}", f"{case.estimate_ms:.2f}"),
            *(_off(ms, case.row) for ms in (case.estimate_ms, case.left_out_ms, case.row.before_ms, case.roofline_ms)),
            *(case.row.use, case.row.source),
        ]
        for case in sorted(judged, key=lambda case: (case.row.gpu, case.row.model, case.row.part, case.row.execution))
    ]
    return headers, rows


def summary_table(judged: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of ``summary``, the bias of the ratio decode / step at its end, and cards without a time."""
    headers = ["estimates", "times", "median error", "within 10%", "within 25%", "bias"]
    ratios = errors_of((1 + error, 1.0) for _, _, error in ratio_errors(judged))
    listed = [*summary(judged), ("ratio decode / step", ratios)]
    rows = [
        [what, str(e.n), f"{e.size:.1%}", f"{e.within_10:.0%}", f"{e.within_25:.0%}", f"{e.bias:+.1%}"]
        for what, e in listed
    ]
    timed = {case.row.gpu for case in judged}
    rows += [[f"gpu {gpu}: unchecked", "0", "", "", "", ""] for gpu in GPUS if gpu not in timed]
    return headers, rows
