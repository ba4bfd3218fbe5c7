"""A profile: tables of integers -> nanoseconds, as measured or estimated on one device for one model.

Measured points come back verbatim; outside the measured range a lookup raises and names the range. The format is in
``docs/file-formats.md``. Interpolation is linear in integers, halves rounded up.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field, Strict

from synerdiff.core import PPM, InputError
from synerdiff.files import LEAST_SIDE, MOST_SIDE
from synerdiff.schema import Listed, Section

_T = TypeVar("_T")
Size = tuple[int, int]
"""(height, width) in pixels."""
CorunCells = Mapping[tuple[str, int], Mapping[int, "Corun"]]
"""(chunking, chunk) -> rows -> slowdowns."""

Weights = Literal["checkpoint", "trained", "random"]
Dtype = Literal["", "float32", "bfloat16", "float16"]
Side = Annotated[int, Field(ge=LEAST_SIDE, le=MOST_SIDE)]
OVERHEADS = ("step_dispatch", "chunk_dispatch", "decision_lead", "text_encode", "result_copy", "sample_host")
MOST_DEGREE = 8


class Spread(NamedTuple):
    """Median, 10th and 90th percentile (ns or ppm) of n samples."""

    median: int
    p10: int
    p90: int
    n: int

    @classmethod
    def exactly(cls, value: float, n: int = 0) -> Spread:
        """What is known as one number only; at least 1."""
        whole = max(1, round(value))
        return cls(whole, whole, whole, n)

    def each(self, change: Callable[[int], int]) -> Spread:
        """The same change to median, p10 and p90."""
        return Spread(change(self.median), change(self.p10), change(self.p90), self.n)

    def around(self, value: int) -> Spread:
        """With this in the median's place, where lookups look."""
        return Spread(value, min(self.p10, value), max(self.p90, value), self.n)


@dataclass(frozen=True, slots=True)
class Corun:
    """Slowdowns (ppm) of a step and of a chunk while they run together."""

    step: Spread
    chunk: Spread
    held_out: bool


def interpolate(low: int, high: int, position: int, span: int) -> int:
    """low + (high - low) * position / span, in integers, halves rounded up."""
    return low + (2 * (high - low) * position + span) // (2 * span)


def pixels_of(size: Size) -> str:
    """``HEIGHTxWIDTH``."""
    return f"{size[0]}x{size[1]}"


class Band(Section):
    """Multiples of the times between which the true ones lie."""

    low: Annotated[float, Field(gt=0, le=1)]
    high: Annotated[float, Field(ge=1, le=100)]
    meaning: str = ""
    card: str = ""
    """Estimated times: whether any of this card was published."""


class Head(Section):
    """Where a profile's times come from and what they hold for; empty is what is not known."""

    device: str = ""
    """Its title, for people."""
    gpu: str = ""
    """Its key in the project's tables: h100, h200, ..."""
    driver: str = ""
    clocks: dict[str, Any] = {}
    """Seen while measuring: lowest, median and highest, MHz, and why they were lowered."""
    model: str = ""
    """Name, checkpoint folder or hub name."""
    weights: Weights | None = None
    """Times do not depend on them, images do."""
    resolutions: Listed[Annotated[tuple[Side, Side], Strict(False)]] = Field(default=(), max_length=100)
    """(height, width) in pixels, the first one first."""
    dtype: Dtype = ""
    execution: str = ""
    """Measured: eager, graphs or compiled (older ones in other words); estimated: eager, compiled or engine."""
    levers: Listed[str] = Field(default=(), max_length=20)
    """Which kernels were replaced."""
    cuts: dict[str, Listed[Annotated[int, Field(ge=1)]]] = {}
    """Chunking -> where it cuts the decoder's atoms, rising."""
    commit: str = ""
    date: str = ""
    source: str = ""
    """Imported times: who published them, and where. Estimated ones: the command that makes them."""
    band: Band | None = None
    """How far the times may be off, where somebody knows."""
    notes: dict[str, Any] = {}
    """What only people read."""

    @property
    def size(self) -> Size | None:
        """(height, width) in pixels, None when the profile does not say."""
        return self.resolutions[0] if self.resolutions else None

    @property
    def pixels(self) -> str:
        """``HEIGHTxWIDTH``, for sentences."""
        return ", ".join(map(pixels_of, self.resolutions)) or "a resolution that it does not name"


@dataclass(slots=True)
class Profile:
    """Times of one model on one device.

    ``steps``: rows -> solo time of a denoiser step. ``chunks``: chunking -> solo time of each chunk of a decode.
    ``corun``: (chunking, chunk) -> rows -> slowdowns. ``overheads``: name -> time; a missing one is 0.
    ``step_launch``: rows -> what a step takes longer that is launched on an idle lane; missing rows are 0.
    ``row_buckets``: the rows for which a step is compiled, None for eager execution (then times interpolate).
    ``speed_ppm`` divides the times that methods give of steps and chunks, not the tables and not the overheads.
    """

    name: str
    provenance: str
    row_buckets: tuple[int, ...] | None
    steps: Mapping[int, Spread]
    chunks: Mapping[str, tuple[Spread, ...]]
    corun: Mapping[tuple[str, int], Mapping[int, Corun]]
    overheads: Mapping[str, Spread]
    held_out_steps: Mapping[int, Spread] = field(default_factory=dict)
    head: Head = field(default_factory=Head)
    content_hash: str = ""
    speed_ppm: int = PPM
    others: Mapping[Size, Profile] = field(default_factory=dict)
    """Further resolutions, each with tables of its own; those here are the first one's."""
    across: Mapping[tuple[Size, Size], CorunCells] = field(default_factory=dict)
    """(resolution of the step, of the chunk), where they differ -> slowdowns."""
    tokens: Mapping[int, int] = field(default_factory=dict)
    """Rows of a step -> its tokens, of transformers."""
    step_launch: Mapping[int, Spread] = field(default_factory=dict)
    degrees: Mapping[int, Mapping[int, Spread]] = field(default_factory=dict)
    """GPUs that take a step together -> rows -> its time."""
    _bucket_memo: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _step_memo: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _slowdown_memo: dict[tuple[int, str, int], tuple[int, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    _beside_memo: dict[tuple[Size, int, str, int, Size], tuple[int, int, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def lent(self) -> Profile:
        """A copy down to the last number, for a user's policy, which might write to it."""
        copy: Profile = pickle.loads(pickle.dumps(self))
        return copy

    def on_worker(self, speed_ppm: int, sample_host_ns: int | None = None) -> Profile:
        """The profile as one worker has it; without ``sample_host_ns`` the overhead stays."""
        if speed_ppm == self.speed_ppm and sample_host_ns in (None, self.overhead_ns("sample_host")):
            return self
        overheads = dict(self.overheads)
        if sample_host_ns is not None:
            overheads["sample_host"] = Spread(sample_host_ns, sample_host_ns, sample_host_ns, 0)
        return self.each(lambda own: replace(own, speed_ppm=speed_ppm, overheads=overheads))

    def on_gpus(self, degree: int) -> Profile:
        """The profile of a worker whose steps run on so many GPUs: decodes, and how steps and decodes slow each other,
        stay those of one GPU. InputError where a resolution has no steps of that degree."""
        return self if degree == 1 else self.each(lambda own: own._of_degree(degree))

    def _of_degree(self, degree: int) -> Profile:
        steps = self.degrees.get(degree)
        if steps is None:
            known = ", ".join(map(str, self.degrees)) or "none"
            raise InputError(
                f"profile '{self.name}' has no step times on {degree} GPUs at {self.head.pixels}; its degrees.csv has "
                f"{known} (synerdiff estimate --degrees, synerdiff profile import)."
            )
        buckets = None if self.row_buckets is None else tuple(sorted(steps))
        return replace(self, steps=steps, row_buckets=buckets, held_out_steps={})

    def sped(self, work_ns: int) -> int:
        """Solo work at the profile's speed: ceil(w * 10^6 / speed_ppm)."""
        return work_ns if self.speed_ppm == PPM else -(-work_ns * PPM // self.speed_ppm)

    # --- several resolutions (contract: resolutions, slowdowns across them) -------------------------------------------

    def at(self, size: Size | None) -> Profile:
        """The tables of one resolution; without a size, or where there is one resolution, these."""
        return self if size is None or not self.others else self.others.get(size, self)

    @property
    def sizes(self) -> dict[Size, Profile]:
        """Resolution -> its tables, the first one's first; empty where there is one resolution."""
        return {self.head.resolutions[0]: self, **self.others} if self.others else {}

    def only(self, size: Size | None) -> Profile:
        """The profile as it is where everything has one resolution."""
        if size is None or not self.others:
            return self
        if size in self.others:
            return self.others[size]
        return replace(self, others={}, across={}, head=self.head.model_copy(update={"resolutions": (size,)}))

    @property
    def most_rows(self) -> int:
        """Rows of the largest step at any resolution."""
        return max([self.max_rows, *(other.max_rows for other in self.others.values())])

    def each(self, change: Callable[[Profile], Profile]) -> Profile:
        """The profile with a change at every resolution."""
        changed = change(self)
        return replace(changed, others={size: change(other) for size, other in self.others.items()})

    def slowdowns_beside(
        self, step_size: Size | None, rows: int, chunking: str, chunk: int, chunk_size: Size | None
    ) -> tuple[int, int, int]:
        """(step, chunk) slowdowns of a pair of resolutions, and how they were found: 0 as measured, 1 by solo time,
        2 by solo time and clamped.

        Where this pair was not measured around the step's bucket: those of the chunk beside a step of its own
        resolution that takes as long alone, linear in solo time between the measured rows, clamped to their range.
        """
        if not self.others or step_size is None or chunk_size is None:
            return *self.slowdown_ppm(rows, chunking, chunk), 0
        key = (step_size, rows, chunking, chunk, chunk_size)
        known = self._beside_memo.get(key)
        if known is None:
            known = self._beside_memo[key] = self._find_beside(*key)
        return known

    def _find_beside(
        self, step_size: Size, rows: int, chunking: str, chunk: int, chunk_size: Size
    ) -> tuple[int, int, int]:
        step, own = self.at(step_size), self.at(chunk_size)
        pair = own.corun if step_size == chunk_size else self.across.get((step_size, chunk_size), {})
        measured = looked_up(pair, chunking, chunk)
        bucket = step.bucket(rows)
        if measured and min(measured) <= bucket <= max(measured):
            return *_slowdowns_at(bucket, measured), 0
        cells = looked_up(own.corun, chunking, chunk)
        if not cells:
            raise InputError(
                f"profile '{self.name}' has no co-run slowdowns of chunk {chunk} of '{chunking}' at "
                f"{chunk_size[0]}x{chunk_size[1]}, which a step of another resolution needs."
            )
        by_time: dict[int, Corun] = {}
        for r, cell in sorted(cells.items()):
            by_time.setdefault(_at(r, own.steps, lambda spread: spread.median), cell)
        solo_ns = _at(bucket, step.steps, lambda spread: spread.median)
        at_ns = min(max(solo_ns, min(by_time)), max(by_time))
        return *_slowdowns_at(at_ns, by_time), 1 if at_ns == solo_ns else 2

    @property
    def estimated(self) -> bool:
        """Whether its times come from data sheets."""
        return self.provenance == "estimated"

    @property
    def label(self) -> str:
        """The name as figures show it: an estimated profile says so, and so does one with estimated slowdowns."""
        if self.estimated:
            return f"{self.name} (estimated)"
        guessed = self.provenance == "imported" and self.corun
        return f"{self.name} (slowdowns estimated)" if guessed else self.name

    @property
    def max_rows(self) -> int:
        """Rows of the largest step."""
        return max(self.row_buckets if self.row_buckets is not None else self.steps)

    @property
    def chunkings(self) -> tuple[str, ...]:
        """Names of the ways in which a decode is cut."""
        return tuple(self.chunks)

    def overhead_ns(self, name: str) -> int:
        """Median of an overhead; 0 where there is none."""
        spread = self.overheads.get(name)
        return 0 if spread is None else spread.median

    def bucket(self, rows: int) -> int:
        """The smallest bucket of at least ``rows`` rows; ``rows`` itself on an eager profile."""
        bucket = self._bucket_memo.get(rows)
        if bucket is None:
            eager, points = self.row_buckets is None, self.row_buckets or tuple(sorted(self.steps))
            low, high = points[0] if eager else 1, points[-1]
            if not low <= rows <= high:
                raise InputError(f"profile '{self.name}' knows steps of {low} to {high} rows; {rows} were asked for.")
            bucket = self._bucket_memo[rows] = rows if eager else points[bisect_left(points, rows)]
        return bucket

    def step_ns(self, rows: int) -> int:
        """T(rows): solo time of a step, at the bucket of ``rows``; interpolated only on eager profiles."""
        step_ns = self._step_memo.get(rows)
        if step_ns is None:
            step_ns = _at(self.bucket(rows), self.steps, lambda spread: spread.median)
            step_ns = self._step_memo[rows] = self.sped(step_ns)
        return step_ns

    def launch_ns(self, rows: int) -> int:
        """What a step of ``rows`` rows takes longer on an idle lane: at its bucket, on eager profiles interpolated; 0
        where nothing was measured. No speed scales it."""
        if not self.step_launch:
            return 0
        bucket = self.bucket(rows)
        between = self.row_buckets is None and min(self.step_launch) <= bucket <= max(self.step_launch)
        known = bucket in self.step_launch or between
        return _at(bucket, self.step_launch, lambda spread: spread.median) if known else 0

    def step_spread(self, rows: int) -> Spread:
        """Median, p10 and p90 of a step at the bucket of ``rows``, at speed 1."""
        bucket = self.bucket(rows)
        return Spread._make([*(_at(bucket, self.steps, itemgetter(place)) for place in range(3)), 0])

    def chunk_count(self, chunking: str) -> int:
        """Chunks of one decode; InputError lists the known chunkings."""
        return len(self._chunks_of(chunking))

    def chunk_ns(self, chunking: str, chunk: int) -> int:
        """Solo time of a chunk."""
        return self.sped(self._chunks_of(chunking)[chunk].median)

    def decode_ns(self, chunking: str = "whole") -> int:
        """Solo time of all chunks of one decode."""
        return sum(self.sped(spread.median) for spread in self._chunks_of(chunking))

    def _chunks_of(self, chunking: str) -> tuple[Spread, ...]:
        if chunking not in self.chunks:
            known = ", ".join(self.chunks)
            raise InputError(f"profile '{self.name}' has no chunking '{chunking}'; it has {known}.")
        return self.chunks[chunking]

    def slowdown_ppm(self, rows: int, chunking: str, chunk: int) -> tuple[int, int]:
        """(step, chunk) slowdowns while a step of ``rows`` rows and that chunk run together.

        Taken at the bucket of ``rows``, linear between the measured rows.
        """
        key = (rows, chunking, chunk)
        slowdown = self._slowdown_memo.get(key)
        if slowdown is None:
            slowdown = self._slowdown_memo[key] = self._find_slowdown(rows, chunking, chunk)
        return slowdown

    def require_corun(self) -> None:
        """InputError when the profile has no slowdowns at all, as an imported one."""
        if not self.corun:
            raise InputError(
                f"profile '{self.name}' has no co-run slowdowns, which are needed where decodes run beside steps; "
                "with it use static, dynamic or continuous-serial."
            )

    def _find_slowdown(self, rows: int, chunking: str, chunk: int) -> tuple[int, int]:
        self._chunks_of(chunking)
        measured = looked_up(self.corun, chunking, chunk)
        bucket = self.bucket(rows)
        self.require_corun()
        if not measured or not min(measured) <= bucket <= max(measured):
            span = f"{min(measured)} to {max(measured)}" if measured else "no"
            raise InputError(
                f"profile '{self.name}' has co-run slowdowns of chunk {chunk} of '{chunking}' for {span} rows; "
                f"{bucket} were asked for."
            )
        return _slowdowns_at(bucket, measured)


def looked_up(corun: CorunCells, chunking: str, chunk: int) -> dict[int, Corun]:
    """Rows -> the cells of a chunk that lookups use: those that are not held out."""
    return {rows: cell for rows, cell in corun.get((chunking, chunk), {}).items() if not cell.held_out}


def _slowdowns_at(x: int, cells: Mapping[int, Corun]) -> tuple[int, int]:
    return _at(x, cells, lambda cell: cell.step.median), _at(x, cells, lambda cell: cell.chunk.median)


def _at(x: int, points: Mapping[int, _T], value: Callable[[_T], int]) -> int:
    """The value at x, verbatim where measured, else linear between its neighbours."""
    if x in points:
        return value(points[x])
    keys = sorted(points)
    place = bisect_left(keys, x)
    low, high = keys[place - 1], keys[place]
    return interpolate(value(points[low]), value(points[high]), x - low, high - low)
