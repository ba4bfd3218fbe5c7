"""What went wrong during a run, and the errors that the runner raises about it."""

from __future__ import annotations

from typing import NamedTuple

import torch

OUT_OF_MEMORY, FAILED, HUNG, STOPPED = "out of memory", "failed", "hung lane", "stopped"
SERVICE_LOST = "service lost"


class LaneHung(RuntimeError):
    """A lane never came back; the message names it, what it runs and for how long."""


class Fault(NamedTuple):
    """One thing that went wrong; the run goes on after all but a hung lane."""

    time_ns: int
    kind: str
    """``out of memory`` (retried once), ``failed`` (samples that fail alone), ``service lost`` (a process beside the
    worker), ``hung lane`` or ``stopped``."""
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
