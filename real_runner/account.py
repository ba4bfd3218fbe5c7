"""What a run tells besides its records: what went wrong, and how long lanes stood idle before a piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from synerdiff.core import NS_PER_S

OUT_OF_MEMORY, FAILED, HUNG, STOPPED = "out of memory", "failed", "hung lane", "stopped"
LOST = "lost lane"
SERVICE_LOST = "service lost"


class LaneHung(RuntimeError):
    """A lane never comes back, hung or lost; the message names it, and what it runs and for how long or why."""


class Fault(NamedTuple):
    """One thing that went wrong; the run goes on after all but a hung or lost lane."""

    time_ns: int
    kind: str
    """``out of memory`` (retried once), ``failed`` (samples that fail alone), ``service lost`` (a process beside the
    worker), ``hung lane``, ``lost lane`` or ``stopped``."""
    samples: tuple[str, ...]
    """``request.image`` of those concerned."""
    detail: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or (as a plain RuntimeError) on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, with its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class Dispatch:
    """Waits of pieces on their lanes, and how long the policy thought, in nanoseconds."""

    def __init__(self) -> None:
        self.step_ns: list[int] = []
        """From the end (or arrival) that a step was decided on to its start."""
        self.step_queued: list[bool] = []
        """Whether it had been committed to the lane's queue while another step ran."""
        self.chunk_ns: list[int] = []
        self.decide_ns: list[int] = []
        self.lag_ns: list[int] = []
        """From a request's intended arrival to when it was sent."""
        self.prepare_ns: list[int] = []
        """From when it was sent to its entry into waiting."""
        self.copy_ns: list[int] = []
        """From the end of a decode to its pixels on the host."""

    def summary(self) -> dict[str, Any]:
        """Per kind: count, mean, p50, p90, p99 and greatest, in seconds."""
        kinds = {
            "step_dispatch": self.step_ns,
            "chunk_dispatch": self.chunk_ns,
            "decide": self.decide_ns,
            "sender_lag": self.lag_ns,
            "text_encode": self.prepare_ns,
            "result_copy": self.copy_ns,
        }
        return {name: _spread(values) for name, values in kinds.items()}


def _spread(values_ns: Sequence[int]) -> dict[str, float | int | None]:
    ordered = sorted(values_ns)
    count = len(ordered)
    if not count:
        return {"count": 0, "mean_s": None, "p50_s": None, "p90_s": None, "p99_s": None, "max_s": None}
    ranks = {"p50_s": 50, "p90_s": 90, "p99_s": 99}
    spread: dict[str, float | int | None] = {"count": count, "mean_s": sum(ordered) / count / NS_PER_S}
    for name, percent in ranks.items():
        spread[name] = ordered[min(count - 1, count * percent // 100)] / NS_PER_S
    return spread | {"max_s": ordered[-1] / NS_PER_S}
