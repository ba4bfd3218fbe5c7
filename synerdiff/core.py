"""The vocabulary that every part shares: requests, samples, views, decisions and records.

Standard library only. Engines count integer nanoseconds (``_ns``); slowdowns are integers in parts per million
(``_ppm``, 1_000_000 = runs as fast as alone).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

NS_PER_S = 1_000_000_000
PPM = 1_000_000

SampleId = int
"""Dense number of a sample within a run: requests in trace order, then images."""


class InputError(ValueError):
    """Something a user gave is wrong. The message is one plain sentence; commands print it and exit with 2."""


class ContractError(RuntimeError):
    """A policy broke the policy contract. The message names policy, time and reason."""


class Mode(StrEnum):
    """How a sample takes a step."""

    GUIDED = "guided"
    CONDITIONAL = "conditional"
    REUSE = "reuse"


GUIDED, CONDITIONAL, REUSE = Mode.GUIDED, Mode.CONDITIONAL, Mode.REUSE
MODE_LETTER = {GUIDED: "g", CONDITIONAL: "c", REUSE: "r"}


class Phase(StrEnum):
    """Where a sample is on its way; the last three are ends."""

    UNBORN = "unborn"
    WAITING = "waiting"
    ACTIVE = "active"
    DECODING = "decoding"
    DONE = "done"
    REJECTED = "rejected"
    FAILED = "failed"


class LoraUse(NamedTuple):
    """A LoRA that a request asks for: its file (the name without ending), and the scale at which it is merged."""

    file: str
    scale: float = 1.0

    def __str__(self) -> str:
        """As a trace names it: ``FILE@SCALE``; a scale of 1 is left out."""
        return _scaled_text(self.file, self.scale)


class ControlNetUse(NamedTuple):
    """A ControlNet that a request asks for, its conditioning scale, and the file of its conditioning image.

    Without ``image`` the image is ``SEED.png`` of the request.
    """

    name: str
    scale: float = 1.0
    image: str = ""

    def __str__(self) -> str:
        """As a trace names it: ``NAME@SCALE=IMAGE``; a scale of 1 and an image that is not given are left out."""
        return _scaled_text(self.name, self.scale) + (f"={self.image}" if self.image else "")


def loras_from(texts: Iterable[str]) -> tuple[LoraUse, ...]:
    """One request's LoRAs from a trace's text (``x@1`` is ``x``).

    Raises InputError for an empty name, a scale that is no finite number, and a file that is named twice.
    """
    uses = tuple([LoraUse(*_name_and_scale(text, text, "LoRA")) for text in texts])
    _require_each_once([use.file for use in uses], "LoRA")
    return uses


def controlnets_from(texts: Iterable[str]) -> tuple[ControlNetUse, ...]:
    """One request's ControlNets from a trace's text; raises InputError as `loras_from`."""
    parts = [(text, *text.partition("=")) for text in texts]
    uses = tuple([ControlNetUse(*_name_and_scale(named, text, "ControlNet"), image) for text, named, _, image in parts])
    _require_each_once([use.name for use in uses], "ControlNet")
    return uses


def _name_and_scale(named: str, text: str, what: str) -> tuple[str, float]:
    name, separator, number = named.partition("@")
    if not name.strip():
        raise InputError(f"a request asks for the {what} {text!r}, which has no name")
    if not separator:
        return name, 1.0
    try:
        scale = float(number) if number.isascii() and "_" not in number else math.nan
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"a request asks for the {what} {text!r}; after the @ a number is needed")
    return name, scale


def _require_each_once(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"a request asks for the {what} {name!r} twice")


def _scaled_text(name: str, scale: float) -> str:
    if scale == 1:
        return name
    short = f"{scale:g}"
    return f"{name}@{short if float(short) == scale else repr(scale)}"


BatchKey = tuple[str, int | None, int | None, tuple[LoraUse, ...]]
"""(base model, height, width, merged adapters): only samples with equal keys share a step."""


@dataclass(frozen=True, slots=True)
class Request:
    """One arrival. ``steps`` counts denoiser steps per image; ``guidance_scale`` <= 1 means unguided."""

    request_id: int
    arrival_ns: int
    steps: int
    images: int = 1
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    base_model: str = ""
    loras: tuple[LoraUse, ...] = ()
    controlnets: tuple[ControlNetUse, ...] = ()
    slo_ns: int | None = None
    seed: int | None = None
    prompt: str = ""
    """Empty: the model's own for this seed. Only hardware looks at it."""
    negative_prompt: str = ""
    intended_ns: int | None = None
    """In a closed loop, once sent: the arrival that the trace has; ``arrival_ns`` is then the sending."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None when the trace leaves them to the profile."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    @property
    def batch_key(self) -> BatchKey:
        """What its samples must share with others to share a step."""
        return (self.base_model, self.height, self.width, self.loras)


@dataclass(frozen=True, slots=True)
class SkipBudget:
    """How many steps of a sample may run without guidance, and which.

    ``fraction_ppm`` of a sample's steps, rounded down, may be skipped; the first ``warmup_steps`` are always guided,
    at most ``longest_run`` skips follow each other, and ``mode`` is what a skipped step does instead. ``steps``
    (by step count, when a calibration names them) narrows eligibility to the listed step indices.
    """

    fraction_ppm: int = 0
    warmup_steps: int = 3
    longest_run: int = 1
    mode: Mode = REUSE
    eligible_steps: dict[int, frozenset[int]] | None = None

    def skips(self, steps: int) -> int:
        """Skips that a sample of ``steps`` steps may spend: floor(steps * fraction)."""
        return steps * self.fraction_ppm // PPM


NO_SKIPS = SkipBudget()


class Sample:
    """One image of a request. Engines write it, policies only read it."""

    __slots__ = (
        "admitted_ns",
        "batch_key",
        "budget",
        "chunks_done",
        "deadline_ns",
        "decode_started_ns",
        "default_mode",
        "denoised_ns",
        "entered_ns",
        "finished_ns",
        "full",
        "full_rows",
        "guided",
        "had_guided_step",
        "id",
        "image",
        "in_step",
        "launched",
        "phase",
        "request",
        "skip_run",
        "skipped_at",
        "skips_left",
        "skips_spent",
        "step_index",
        "steps",
    )

    def __init__(self, sample_id: SampleId, request: Request, image: int, entered_ns: int, budget: SkipBudget) -> None:
        self.id = sample_id
        self.request = request
        self.image = image
        self.steps = request.steps
        self.guided = request.guidance_scale > 1.0
        self.full_rows = 2 if self.guided else 1
        """Rows of a step with full guidance."""
        self.default_mode = GUIDED if self.guided else CONDITIONAL
        """Guided, or conditional when the sample is unguided (that is never a skip)."""
        self.full = (sample_id, self.default_mode)
        """Its entry in a step with full guidance."""
        self.batch_key = request.batch_key
        self.entered_ns = entered_ns
        """Arrival plus text encoding: when it joins ``waiting``."""
        self.deadline_ns = None if request.slo_ns is None else request.arrival_ns + request.slo_ns
        self.budget = budget
        self.phase = Phase.UNBORN
        self.step_index = 0
        """Steps done."""
        self.skips_spent = 0
        self.skips_left = budget.skips(request.steps) if self.guided else 0
        self.skip_run = 0
        """Steps without guidance since the last guided one."""
        self.had_guided_step = False
        self.in_step = False
        """Part of the running (or committed) step."""
        self.skipped_at: list[int] | None = None
        """Indices of the steps taken without guidance."""
        self.chunks_done = 0
        self.launched = False
        """A launch of this sample's decode holds a lane, or has it reserved."""
        self.admitted_ns = -1
        self.denoised_ns = -1
        self.decode_started_ns = -1
        self.finished_ns = -1

    def send(self, request: Request, entered_ns: int) -> None:
        """Its request is sent, at another instant than the trace says."""
        self.request = request
        self.entered_ns = entered_ns
        self.deadline_ns = None if request.slo_ns is None else request.arrival_ns + request.slo_ns

    @property
    def name(self) -> str:
        """``request.image``, as records and messages write it."""
        return f"{self.request.request_id}.{self.image}"

    @property
    def modes(self) -> str:
        """One letter per step taken: g, c or r."""
        letters = [MODE_LETTER[self.default_mode]] * self.step_index
        for index in self.skipped_at or ():
            letters[index] = MODE_LETTER[self.budget.mode]
        return "".join(letters)

    @property
    def steps_left(self) -> int:
        """Steps not done."""
        return self.steps - self.step_index

    def may_skip_at(self, step_index: int, skips_left: int, skip_run: int) -> bool:
        """Whether the budget allows a skip at ``step_index`` with that much of it left."""
        budget = self.budget
        if not self.guided or skips_left <= 0 or step_index < budget.warmup_steps or skip_run >= budget.longest_run:
            return False
        if budget.eligible_steps is None:
            return True
        return step_index in budget.eligible_steps.get(self.steps, frozenset())

    @property
    def skip_mode(self) -> Mode | None:
        """The mode in which the next step may be skipped, or None when it must be guided (or is unguided)."""
        if not self.may_skip_at(self.step_index, self.skips_left, self.skip_run):
            return None
        if self.budget.mode == REUSE and not self.had_guided_step:
            return None
        return self.budget.mode

    @property
    def allowed_modes(self) -> tuple[Mode, ...]:
        """Modes in which the next step may be taken, the full one first."""
        skip = self.skip_mode
        return (self.default_mode,) if skip is None else (GUIDED, skip)

    def __repr__(self) -> str:
        return f"Sample({self.name}, {self.phase}, step {self.step_index}/{self.steps})"


class ChunkLaunch(NamedTuple):
    """The next ``chunks`` chunks of a sample's decode, in order, on one decode lane.

    ``exclusive`` holds the denoise lane idle until the last of them ends; ``forced`` marks a launch that a starvation
    guard made (recorded; exempt from throughput credits).
    """

    sample: SampleId
    chunks: int
    lane: int = 0
    exclusive: bool = False
    forced: bool = False


class Decision(NamedTuple):
    """What to do now, applied in the order of the fields. (A named tuple: one is built for every step.)"""

    admit: tuple[SampleId, ...] = ()
    reject: tuple[SampleId, ...] = ()
    step: tuple[tuple[SampleId, Mode], ...] = ()
    pad_rows: int = 0
    chunks: tuple[ChunkLaunch, ...] = ()
    wake_at_ns: int | None = None


NOTHING = Decision()


class LaneView:
    """What one decode lane runs. Engines write it, policies only read it."""

    __slots__ = ("chunks_left", "exclusive", "forced", "gpu", "index", "sample", "started")

    def __init__(self, index: int, gpu: int) -> None:
        self.index = index
        self.gpu = gpu
        self.sample: Sample | None = None
        """The sample being decoded (or for which the lane is reserved), None when the lane is free."""
        self.chunks_left = 0
        """Chunks of this launch not finished, the running one included."""
        self.exclusive = False
        self.forced = False
        self.started = False
        """False while the launch is only reserved: it starts when the running step really ends."""

    @property
    def free(self) -> bool:
        return self.sample is None


class View:
    """What a policy sees: live and read-only, never a copy. Collections iterate in the order that their line states."""

    __slots__ = (
        "active",
        "arrived",
        "chunk_done",
        "closed",
        "decode_lanes",
        "decoding",
        "denoise_free",
        "gone",
        "max_rows",
        "now_ns",
        "running",
        "step_done",
        "waiting",
    )

    now_ns: int
    waiting: Collection[Sample]
    """By entry: trace order, then image."""
    active: Collection[Sample]
    """Admitted and not yet denoised, by admission."""
    decoding: Collection[Sample]
    """Denoised and not yet decoded, by end of denoising, ties in step order."""
    decode_lanes: Sequence[LaneView]
    running: Sequence[SampleId]
    """The step that runs now or is committed to start; empty when the denoise lane has none."""
    denoise_free: bool
    """A step (or an exclusive launch) may be decided now."""
    max_rows: int
    """Rows that a step may have, pads included; lowered after an out-of-memory error."""
    closed: bool
    """No sample can enter waiting any more."""
    arrived: Sequence[Sample]
    """Entered waiting since the last decision."""
    step_done: Sequence[Sample]
    """Samples of a step that ended since the last decision."""
    chunk_done: Sequence[Sample]
    """Samples of which a chunk ended since the last decision."""
    gone: Sequence[tuple[Sample, str]]
    """Samples that ended since the last decision, with the reason: done, rejected or failed."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a policy learns at reset: the GPU of the denoise lane and of each decode lane, and the largest step."""

    max_rows: int
    denoise_gpu: int = 0
    decode_gpus: tuple[int, ...] = (0,)
    sample_rows: int = 2
    """Rows that one sample of this run takes at most: 2, or 1 when the whole trace is unguided."""
    name: str = "worker0"


class WorkRecord(NamedTuple):
    """One piece of work on one lane; made by `step`, `decode_chunk` and `other`."""

    gpu: int
    lane: str
    kind: str
    start_ns: int
    end_ns: int
    rows: int
    pad_rows: int
    samples: tuple[SampleId, ...]
    modes: str
    chunk: int
    exclusive: bool
    forced: bool

    @classmethod
    def step(
        cls,
        gpu: int,
        start_ns: int,
        end_ns: int,
        samples: tuple[SampleId, ...],
        rows: int,
        modes: str = "",
        pad_rows: int = 0,
    ) -> WorkRecord:
        """A denoiser step; ``rows`` include ``pad_rows``, ``modes`` has one letter per sample."""
        # One call less than cls(...): a run makes one of these for every step.
        return tuple.__new__(
            cls, (gpu, "denoise", "step", start_ns, end_ns, rows, pad_rows, samples, modes, -1, False, False)
        )

    @classmethod
    def decode_chunk(
        cls,
        gpu: int,
        lane: int,
        start_ns: int,
        end_ns: int,
        sample: SampleId,
        chunk: int = 0,
        exclusive: bool = False,
        forced: bool = False,
    ) -> WorkRecord:
        """One chunk of a sample's decode on decode lane ``lane``."""
        lane_name = f"decode{lane}"
        return tuple.__new__(
            cls, (gpu, lane_name, "chunk", start_ns, end_ns, 0, 0, (sample,), "", chunk, exclusive, forced)
        )

    @classmethod
    def other(
        cls,
        gpu: int,
        lane: str,
        kind: str,
        start_ns: int,
        end_ns: int,
        samples: tuple[SampleId, ...] = (),
        rows: int = 0,
    ) -> WorkRecord:
        """What adapters and split guidance take: ``load``, ``merge``, ``restore``, ``controlnet``, ``half``."""
        return cls(gpu, lane, kind, start_ns, end_ns, rows, 0, samples, "", -1, False, False)


class RequestRecord(NamedTuple):
    """What became of one request; times are those of its last-finishing sample, -1 where it never got there."""

    request: Request
    admitted_ns: int = -1
    denoised_ns: int = -1
    decode_started_ns: int = -1
    finished_ns: int = -1
    status: str = "unfinished"
    skipped_steps: int = 0
    modes: tuple[str, ...] = ()
    """Per image: one letter per step taken."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What an engine hands back: records in a stable order, and the instant at which the run ended."""

    requests: list[RequestRecord]
    """In trace order."""
    work: list[WorkRecord]
    """By start, denoise first, lane, end."""
    sample_names: list[str]
    """``request.image`` by SampleId."""
    end_ns: int
    decisions: int
    """How often the policy was asked."""
    slowdowns_by_solo_time: int = 0
    """Look-ups of slowdowns for a pair of resolutions that was not measured: by the step's solo time."""
    slowdowns_clamped: int = 0
    """Those of them whose solo time lies beyond what was measured."""
