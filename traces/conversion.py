"""What became of a foreign trace: the requests, and a count of everything that was left out or changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from synerdiff.core import InputError, Request

CHECKPOINTS = ("one", "keep")
ADAPTERS = ("keep", "drop")


@dataclass(frozen=True, slots=True)
class Conversion:
    """``rows`` read = requests + dropped; ``noted`` counts what was kept and is worth knowing, or was changed."""

    requests: list[Request]
    rows: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    noted: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.rows == len(self.requests) + sum(self.dropped.values())


def check_options(checkpoints: str, adapters: str) -> None:
    """``one`` counts all checkpoints as one model; ``drop`` leaves LoRAs and ControlNets out."""
    for name, value, allowed in (("checkpoints", checkpoints, CHECKPOINTS), ("adapters", adapters, ADAPTERS)):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; allowed are {' and '.join(allowed)}.")
