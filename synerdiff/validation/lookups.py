"""Which cells of a profile a prediction looks up: each of them must have been measured in the same session."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from synerdiff.profile.tables import Profile, Spread, looked_up
from synerdiff.validation.calibration import CellTimes

Lookup = tuple[str | int, ...]
"""("step", rows), ("chunk", chunking, chunk) or ("corun", chunking, chunk, rows), at measured rows."""


@dataclass(slots=True)
class WatchedProfile(Profile):
    """A profile that remembers its cells that were looked up; where a lookup interpolates, both neighbours."""

    lookups: set[Lookup] = field(default_factory=set)

    def lent(self) -> WatchedProfile:
        """What is looked up in the copy is remembered here."""
        copy = watched(Profile.lent(self))
        copy.lookups = self.lookups
        return copy

    def step_ns(self, rows: int) -> int:
        self._note_step(rows)
        return Profile.step_ns(self, rows)

    def step_spread(self, rows: int) -> Spread:
        self._note_step(rows)
        return Profile.step_spread(self, rows)

    def chunk_ns(self, chunking: str, chunk: int) -> int:
        self.lookups.add(("chunk", chunking, chunk))
        return Profile.chunk_ns(self, chunking, chunk)

    def decode_ns(self, chunking: str = "whole") -> int:
        self.note_decode(chunking)
        return Profile.decode_ns(self, chunking)

    def slowdown_ppm(self, rows: int, chunking: str, chunk: int) -> tuple[int, int]:
        known = looked_up(self.corun, chunking, chunk)
        self.lookups.update(("corun", chunking, chunk, r) for r in neighbours(self.bucket(rows), known))
        return Profile.slowdown_ppm(self, rows, chunking, chunk)

    def note_decode(self, chunking: str) -> None:
        """An engine reads the chunks of its policy's chunking from the table."""
        self.lookups.update(("chunk", chunking, chunk) for chunk in range(len(self.chunks.get(chunking, ()))))

    def _note_step(self, rows: int) -> None:
        self.lookups.update(("step", r) for r in neighbours(self.bucket(rows), self.steps))


def watched(profile: Profile) -> WatchedProfile:
    """The same profile, watched from now on."""
    return WatchedProfile(**{one.name: getattr(profile, one.name) for one in fields(Profile) if one.init})


def neighbours(rows: int, known: Iterable[int]) -> tuple[int, ...]:
    """``rows`` itself where it is measured, else the measured ones on both sides of it."""
    ordered = sorted(known)
    place = bisect_left(ordered, rows)
    if place < len(ordered) and ordered[place] == rows:
        return (rows,)
    return tuple(ordered[max(0, place - 1) : place + 1])


def measured_cells(passes: Iterable[CellTimes]) -> set[Lookup]:
    """What passes over the cells have measured; a pair only where both sides really ran beside each other."""
    found: set[Lookup] = set()
    for one in passes:
        found |= {("step", rows) for rows, times in one.steps.items() if times}
        found |= {
            ("chunk", name, i) for name, columns in one.chunks.items() for i, times in enumerate(columns) if times
        }
        found |= {("corun", *key) for key, both in one.beside.items() if all(side.pieces for side in both)}
    return found


def sentence(missing: Iterable[Lookup]) -> str:
    """The cells for a person, sorted."""
    texts = []
    for kind, *place in sorted(missing, key=lambda one: tuple(map(str, one))):
        if kind == "step":
            texts.append(f"a step of {place[0]} rows")
        else:
            beside = f" beside {place[2]} rows" if kind == "corun" else ""
            texts.append(f"chunk {place[1]} of {place[0]}{beside}")
    return ", ".join(texts)
