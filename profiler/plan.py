"""Which points are measured, in which order. It follows from the settings and the measured atoms alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from profiler.corun import VISITS
from profiler.settings import Settings
from synerdiff.diffusion.decoder import WHOLE, Chunking, choose_cuts


class Cell(NamedTuple):
    """One co-run: a chunk beside steps of so many rows."""

    chunking: str
    chunk: int
    rows: int

    @property
    def key(self) -> str:
        return f"{self.chunking} {self.chunk} {self.rows}"


class Plan:
    """``chunkings``: whole, then the cuts that make the longest chunk as short as the measured atoms allow, for each
    wanted number of chunks that the decoder has atoms for. ``cells``: the co-runs, rows changing fastest, so that the
    time left is easy to guess. ``longest``: the longest chunk of each chunking, by the atoms.
    """

    def __init__(self, settings: Settings, atoms_ns: Sequence[int]) -> None:
        self.settings = settings
        counts = [count for count in settings.chunk_counts if count <= len(atoms_ns)]
        self.chunkings = (WHOLE, *(choose_cuts(atoms_ns, count) for count in counts))
        self.longest = {cut.name: _longest(cut, atoms_ns) for cut in self.chunkings}
        self.cells = tuple(
            Cell(cut.name, chunk, rows)
            for cut in self.chunkings
            for chunk in range(len(cut))
            for rows in settings.rows
            if rows in settings.corun_rows or chunk == self.longest[cut.name]
        )

    def held_out(self, cell: Cell) -> bool:
        """Whether lookups do without this cell: it shows how well they interpolate."""
        return cell.rows not in self.settings.corun_rows

    def round_due(self, visits_done: int, rounds: int) -> int:
        """How many of ``rounds`` solo rounds belong before the next visit of a pair, spread evenly over all of them."""
        return min(rounds, 1 + visits_done * rounds // (VISITS * len(self.cells)))


def _longest(cut: Chunking, atoms_ns: Sequence[int]) -> int:
    times_ns = [sum(atoms_ns[i] for i in atoms) for atoms in cut.ranges(len(atoms_ns))]
    return times_ns.index(max(times_ns))
