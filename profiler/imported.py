"""Profiles from what others measured: a machine's throughput, or a table of times. Provenance ``imported``.

Nobody has published slowdowns of steps and decodes that run together, so an imported profile has none: policies that
decode beside steps are refused with a sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from profiler.estimate import estimate_profile
from synerdiff.core import NS_PER_S, InputError
from synerdiff.files import Row, finite, read_rows, shown, sides_of
from synerdiff.profile.tables import MOST_DEGREE, Head, Profile, Spread

NS_PER_MS = 1_000_000
LEAST_MS, MOST_MS = 1e-6, 1_000_000_000
"""Of a time; a profile holds 1 ns to 10^15 ns."""
MOST_BATCH = 4096
KINDS = ("step", "decode", "encode")
SHAPE_GPU = "h100"
"""Whose estimated steps give the shape of T(rows) when no other card is named."""


LEAST = 1e-6
"""Images per second below which no machine serves; times stay numbers."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a whole machine serves at full batches, one image after the other."""

    images_per_s: float
    gpus: int
    batch: int
    steps: int
    guided: bool = True
    model: str = "sdxl"
    decode_ms: float = 0.0
    """0: all of the time is taken to be in the steps."""
    gpu: str = SHAPE_GPU
    estimate: str | None = None
    """Card whose estimated decode is taken where none is given; the steps take the rest of the time."""

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("images-per-s", self.images_per_s, LEAST, 1e6), ("gpus", self.gpus, 1, 10**6),
            ("batch", self.batch, 1, MOST_BATCH), ("steps", self.steps, 1, 10_000),
        ):  # fmt: skip
            if not finite(value, lambda number, low=least, high=most: low <= number <= high):  # type: ignore[misc]
                raise InputError(f"--{name} is {value:.9g}; allowed is a number from {least:g} to {most:.9g}.")
        if not finite(self.decode_ms, lambda ms: ms == 0 or LEAST_MS <= ms <= MOST_MS):
            raise InputError(
                f"--decode-ms is {self.decode_ms:g}; allowed is 0, or a number from {LEAST_MS:g} to {MOST_MS:,}."
            )

    @property
    def batch_ns(self) -> int:
        """One GPU's time for a full batch."""
        return round(self.batch * self.gpus / self.images_per_s * NS_PER_S)


def throughput_profile(of: Throughput, name: str, source: str) -> Profile:
    """The profile of one GPU: a full batch of ``steps`` steps and its decodes takes batch * gpus / images_per_s.

    Fewer rows take what the estimator says they take of a full batch's step, linear between its rows.
    """
    decode_ns = max(1, round(of.decode_ms * NS_PER_MS))
    decode = "given" if of.decode_ms else "not known apart: its time is in the steps"
    if of.estimate is not None and not of.decode_ms:
        decode_ns = estimate_profile(of.estimate, of.model).decode_ns()
        decode = f"estimated for {of.estimate} and {of.model}; the steps take the rest of the throughput's time"
    step_ns = (of.batch_ns - of.batch * decode_ns) / of.steps
    if step_ns < 1:
        too = "--decode-ms is too large" if of.decode_ms else "--images-per-s is too large"
        raise InputError(
            f"a batch of {of.batch} takes {of.batch_ns / NS_PER_S:.4g} s in all, and its decodes alone "
            f"{of.batch * decode_ns / NS_PER_S:.4g} s, so {of.steps} steps have no time; {too}."
        )
    full = of.batch * (2 if of.guided else 1)
    estimated = replace(estimate_profile(of.gpu, of.model), row_buckets=None)
    known = max(estimated.steps)
    shape = {rows: float(spread.median) for rows, spread in estimated.steps.items() if rows < full}
    # Beyond the estimator's largest step time grows with the rows.
    shape[full] = float(estimated.step_ns(full)) if full <= known else estimated.step_ns(known) * full / known
    notes = {
        "imported_from": f"{of.images_per_s:g} images/s on {of.gpus} GPUs at batch {of.batch}, {of.steps} steps",
        "shape": f"T of fewer rows as estimated for {of.gpu} and {of.model}, scaled to a step of {full} rows",
        "decode": decode,
    }
    # The model and the resolution of the estimate; nothing of its assumptions.
    head = Head(model=estimated.head.model, resolutions=estimated.head.resolutions, source=source, notes=notes)
    steps = {rows: Spread.exactly(step_ns * time_ns / shape[full]) for rows, time_ns in sorted(shape.items())}
    return imported_profile(name, steps, Spread.exactly(decode_ns), {}, head)


def table_profile(path: Path, name: str, source: str, model: str, resolution: str | None, guided: bool) -> Profile:
    """The profile in a table of times: columns kind (step, decode, encode), milliseconds, resolution (``HxW``), rows or
    batch, and degree (GPUs that take a step together, 1 where it is empty).

    A batch of steps has two rows an image when ``guided``. A decode or encode of several images counts per image; of
    several sizes the smallest counts. InputError names the line, and the resolutions where one must be chosen.
    """
    rows = [_Time.of(row, guided) for row in read_rows(path, ("kind", "milliseconds"), "table of times",
                                                      ("rows", "batch", "resolution", "degree"))]  # fmt: skip
    if resolution is not None and sides_of(resolution) is None:
        raise InputError(f"--resolution is {shown(repr(resolution))}; HEIGHTxWIDTH in pixels is needed.")
    sizes = list(dict.fromkeys(time.resolution for time in rows if time.resolution))
    chosen = resolution or (sizes[0] if len(sizes) == 1 else "")
    if sizes and chosen not in sizes:
        what = f"resolution {resolution} is not among them" if resolution else "choose one with --resolution"
        raise InputError(f"{path}: it has times at {', '.join(sizes)}; {what}.")
    rows = [time for time in rows if time.resolution in ("", chosen)]
    degrees: dict[int, dict[int, Spread]] = {1: {}}
    for time in (time for time in rows if time.kind == "step"):
        own = degrees.setdefault(time.degree, {})
        if time.count in own:
            raise InputError(f"{time.place}: a step of {time.count} rows is given twice.")
        own[time.count] = Spread.exactly(time.ns)
    steps = degrees.pop(1)
    if not steps:
        raise InputError(f"{path}: it has no step{' on one GPU' if degrees else ''}.")
    images = Counter((time.kind, time.count) for time in rows if time.kind != "step")
    for time in rows:
        if images[time.kind, time.count] > 1:
            raise InputError(f"{time.place}: the {time.kind} of {time.count} images is given twice.")
    decode_ns, encode_ns = (
        min(((t.count, t.ns / t.count) for t in rows if t.kind == kind), default=(0, 0.0))[1]
        for kind in ("decode", "encode")
    )
    notes = {"imported_from": path.name} | ({} if decode_ns else {"decode": "not in the table: taken to cost nothing"})
    height, _, width = chosen.partition("x")
    head = Head(model=model, resolutions=((int(height), int(width)),) if chosen else (), source=source, notes=notes)
    overheads = {"text_encode": Spread.exactly(encode_ns)} if encode_ns else {}
    profile = imported_profile(name, dict(sorted(steps.items())), Spread.exactly(decode_ns), overheads, head)
    return replace(profile, degrees=dict(sorted(degrees.items())))


@dataclass(frozen=True, slots=True)
class _Time:
    """One line of a table."""

    place: str
    kind: str
    resolution: str
    count: int
    """Rows of a step, images of anything else."""
    ns: float
    degree: int = 1

    @classmethod
    def of(cls, row: Row, guided: bool) -> _Time:
        kind, resolution = row.text("kind"), row.text("resolution")
        if kind not in KINDS:
            raise row.error("kind", f"is {kind!r}; allowed are {', '.join(KINDS)}")
        if resolution and sides_of(resolution) is None:
            raise row.error("resolution", f"is {shown(repr(resolution))}; HEIGHTxWIDTH in pixels is needed")
        if kind != "step" and row.text("degree") not in ("", "1"):
            raise row.error("degree", f"is {shown(repr(row.text('degree')))} of a {kind}, which one GPU does")
        rows, batch = row.text("rows"), row.text("batch")
        count = degree = 1
        if bool(rows) == bool(batch):
            if kind == "step" or rows:
                raise row.error("rows", "or batch is needed, and not both")
        else:
            count = row.integer("rows" if rows else "batch", 1, 100_000)
            if kind == "step":
                count *= 2 if batch and guided else 1
                degree = row.integer("degree", 1, MOST_DEGREE) if row.text("degree") else 1
        time_ns = row.number("milliseconds", LEAST_MS, MOST_MS) * NS_PER_MS
        return cls(row.place, kind, resolution, count, time_ns, degree)


def imported_profile(
    name: str, steps: Mapping[int, Spread], decode: Spread, overheads: Mapping[str, Spread], head: Head
) -> Profile:
    """A profile without slowdowns, whose decode is known as a whole only."""
    return Profile(name, "imported", None, steps, {"whole": (decode,)}, {}, overheads, head=head)
