"""The policy contract, parameters with bounds, and the moves that most policies share.

The contract in full: ``docs/contract.md``. A policy imports only ``synerdiff.core`` and ``synerdiff.profile.tables``:
it has no clock, no random generator and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from synerdiff.core import ChunkLaunch, Decision, InputError, Mode, Sample, SampleId, View, WorkerInfo
from synerdiff.profile.capacity import DEFAULT_BATCH, default_batch, most_samples
from synerdiff.profile.tables import Profile


class Policy(Protocol):
    """One decision rule. ``decide`` is asked after a step, a chunk, the wake, and arrivals on an idle lane."""

    chunking: str

    def reset(self, worker: WorkerInfo, profile: Profile) -> None: ...

    def decide(self, view: View) -> Decision: ...


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a policy: its type, default (None: derived at reset), bounds (inclusive), unit and meaning."""

    name: str
    kind: type
    default: Any
    low: float | None = None
    high: float | None = None
    unit: str = ""
    help: str = ""
    choices: tuple[str, ...] = ()
    tuned: bool = True
    """Whether a search for better values has something to find."""

    def check(self, owner: str, value: Any) -> Any:
        """The value in its type; InputError names policy, parameter, what was found and what is allowed."""
        if value is None and self.default is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {
            int: number and not isinstance(value, float),
            float: number,
            bool: isinstance(value, bool),
            str: isinstance(value, str),
        }[self.kind]
        if not fits:
            raise self._refusal(owner, value)
        if number and not (
            value == value and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        ):
            raise self._refusal(owner, value)
        if self.choices and value not in self.choices:
            raise self._refusal(owner, value)
        return self.kind(value)

    def _refusal(self, owner: str, value: Any) -> InputError:
        text = repr(value)
        text = text if len(text) <= 60 else f"{text[:57]}..."
        return InputError(f"policy '{owner}': {self.name} is {text}; allowed is {self.allowed}.")

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}[self.kind]
        if self.low is not None and self.high is not None:
            return f"{words} from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{words} of at least {self.low:g}"
        return words


BATCH = Parameter(
    "batch",
    int,
    None,
    1,
    4096,
    "samples",
    f"most samples in a step (default {DEFAULT_BATCH}, less when the profile's rows are fewer)",
)


Limits = Mapping[tuple[int, int], tuple[int, int]]
"""Resolution -> most samples and most rows of a step; empty where there is one resolution."""
NO_LIMITS: Limits = {}


class BatchedPolicy:
    """Parameters by keyword, and the batch limit that every batching policy has, with several resolutions at each."""

    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (BATCH,)
    NAME: ClassVar[str] = ""
    chunking = "whole"

    def __init__(self, **parameters: Any) -> None:
        self.parameters = checked_parameters(self.NAME or type(self).__name__, self.PARAMETERS, parameters)
        self.batch = 0
        self.limits: Limits = NO_LIMITS

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        wished = self.parameters.get("batch")
        self.batch = batch_limit(self.NAME or type(self).__name__, wished, worker)
        self.limits = {
            size: (min(wished or DEFAULT_BATCH, most_samples(one, worker.sample_rows)), one.max_rows)
            for size, one in profile.sizes.items()
        }


def checked_parameters(owner: str, known: tuple[Parameter, ...], given: dict[str, Any]) -> dict[str, Any]:
    """All parameters with their values; an unknown one is an InputError that lists the known ones."""
    names = [parameter.name for parameter in known]
    for name in given:
        if name not in names:
            listing = ", ".join(names) if names else "none"
            raise InputError(f"policy '{owner}' has no parameter '{name}'; it has {listing}.")
    return {p.name: p.check(owner, given[p.name]) if p.name in given else p.default for p in known}


def batch_limit(owner: str, batch: int | None, worker: WorkerInfo) -> int:
    """Most samples in a step. Left open, the default shrinks to the rows there are; a larger wish is an error."""
    most = most_samples(worker, worker.sample_rows)
    if batch is None:
        return default_batch(worker, worker.sample_rows)
    if batch > most:
        raise InputError(
            f"policy '{owner}': batch is {batch}, but the profile's steps have at most {worker.max_rows} rows, "
            f"which is {most} samples of {worker.sample_rows} rows."
        )
    return batch


def limits_at(sample: Sample, batch: int, max_rows: int, limits: Limits) -> tuple[int, int]:
    """Most samples and most rows of a step of the sample's batch key."""
    if not limits or sample.request.size is None:
        return batch, max_rows
    most, rows = limits[sample.request.size]
    return most, min(rows, max_rows)


def fifo_admissions(view: View, active: int, rows: int, batch: int, limits: Limits = NO_LIMITS) -> list[Sample]:
    """Waiting samples to admit, first in first out, without overtaking across batch keys.

    ``active`` samples with ``rows`` rows at full guidance are in the coming step already; samples are taken while
    there are fewer than ``batch`` and their rows fit.
    """
    taken: list[Sample] = []
    if not view.waiting or (active >= batch and not limits):
        return taken
    first = next(iter(view.active if active else view.waiting))
    batch, max_rows = limits_at(first, batch, view.max_rows, limits)
    if active >= batch:
        return taken
    key = first.batch_key
    for sample in view.waiting:
        rows += sample.full_rows
        if active + len(taken) >= batch or rows > max_rows or sample.batch_key != key:
            break
        taken.append(sample)
    return taken


def decode_alone(view: View) -> Decision:
    """The next chunk of the first decode, while the denoise lane is held."""
    return Decision(chunks=(ChunkLaunch(next(iter(view.decoding)).id, 1, exclusive=True),))


def fitting(samples: Iterable[Sample], max_rows: int) -> list[Sample]:
    """The first samples whose rows at full guidance fit; all of them unless ``max_rows`` was lowered."""
    taken: list[Sample] = []
    rows = 0
    for sample in samples:
        rows += sample.full_rows
        if rows > max_rows:
            break
        taken.append(sample)
    return taken


def full_step(samples: Iterable[Sample]) -> tuple[tuple[SampleId, Mode], ...]:
    """A step of these samples with full guidance."""
    return tuple([sample.full for sample in samples])
