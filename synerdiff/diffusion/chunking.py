"""Where a decode is cut: names, cuts between atoms, and the choice of cuts from measured times. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from synerdiff.core import InputError


@dataclass(frozen=True, slots=True)
class Chunking:
    """A decode cut into `len(cuts) + 1` chunks; a cut is the index of the atom that starts the next chunk.

    Raises InputError when the cuts do not rise strictly from at least 1.
    """

    name: str
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounds = (0, *self.cuts)
        if any(left >= right for left, right in pairwise(bounds)):
            raise InputError(f"The cuts of chunking {self.name} must rise strictly from at least 1, not {self.cuts}.")

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def ranges(self, atoms: int) -> tuple[range, ...]:
        """The atoms of each chunk of a decoder with `atoms` atoms. Raises InputError when a cut lies beyond them."""
        if self.cuts and self.cuts[-1] >= atoms:
            raise InputError(f"Chunking {self.name} cuts at atom {self.cuts[-1]}, but the decoder has only {atoms}.")
        bounds = (0, *self.cuts, atoms)
        return tuple(range(left, right) for left, right in pairwise(bounds))


WHOLE = Chunking("whole")


def choose_cuts(atom_times_ns: Sequence[int], chunks: int) -> Chunking:
    """Cut into `chunks` chunks so that the largest takes as little time as any cutting allows (exact).

    The classical linear partition by dynamic programming: best[k][i] = min over j of max(best[k-1][j], time of
    atoms j..i-1). Ties take the earliest cut. The result is named `whole` for one chunk, else `c4`, `c8`, ...
    Raises InputError when `chunks` is not between 1 and the number of atoms.
    """
    atoms = len(atom_times_ns)
    if not 1 <= chunks <= atoms:
        raise InputError(f"A decoder of {atoms} atoms can be cut into 1 to {atoms} chunks, not {chunks}.")
    if chunks == 1:
        return WHOLE
    before = [0]
    for time_ns in atom_times_ns:
        before.append(before[-1] + time_ns)
    best = list(before)
    start_of: list[list[int]] = []
    for k in range(2, chunks + 1):
        longest, starts = [0] * (atoms + 1), [0] * (atoms + 1)
        for end in range(k, atoms + 1):
            longest[end], starts[end] = min(
                (max(best[start], before[end] - before[start]), start) for start in range(k - 1, end)
            )
        best = longest
        start_of.append(starts)
    cuts, end = [], atoms
    for starts in reversed(start_of):
        end = starts[end]
        cuts.append(end)
    return Chunking(f"c{chunks}", tuple(reversed(cuts)))
