"""What the chunks of a decode cost the denoise lane, beside steps and alone: integers from the profile.

c_i is the solo time of chunk i with its dispatch, T(R) that of a step of R rows with its dispatch, s_u(R,i) and
s_v(R,i) the slowdowns (ppm) of step and chunk while they run together. Beside a step of R rows chunk i

- runs for wall = ceil(c_i * s_v / 10^6),
- lets the step progress by floor(wall * 10^6 / s_u),
- and so costs the denoise lane lost = wall - progress, which is c_i * s_v * (1 - 1/s_u) rounded up.

Run exclusively it costs c_i. A lost time below 0 (the profile says that the step runs faster in company) counts as 0,
so that no plan counts on it. Whether overlap pays is decided without any rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from policies.base import Parameter
from synerdiff.core import PPM, Sample
from synerdiff.profile.tables import Profile, Size

CHUNKING = Parameter(
    "chunking",
    str,
    None,
    help="how a decode is cut: a chunking of the profile (default c4 where the profile has it, else whole)",
)


def chosen_chunking(wished: str | None, profile: Profile) -> str:
    """The wished chunking, c4 by default; InputError when the profile lacks it."""
    if wished is None:
        return "c4" if "c4" in profile.chunkings else "whole"
    profile.chunk_count(wished)
    return wished


class Beside(NamedTuple):
    """Per chunk, beside steps of one row count, in ns."""

    wall: tuple[int, ...]
    progress: tuple[int, ...]
    lost: tuple[int, ...]


class DecodeCosts:
    """The costs of one chunking on one profile; every answer is kept.

    ``sizes``: with several resolutions, that of the steps and that of the decodes.
    """

    def __init__(self, profile: Profile, chunking: str, sizes: tuple[Size, Size] | None = None) -> None:
        profile.require_corun()
        self._whole, self._sizes = profile, sizes
        self._profile = profile if sizes is None else profile.at(sizes[0])
        if sizes is not None:
            profile = profile.at(sizes[1])
        self._chunking = chunking
        self._step_dispatch_ns = profile.overhead_ns("step_dispatch")
        self.count = profile.chunk_count(chunking)
        dispatch_ns = profile.overhead_ns("chunk_dispatch")
        self.solo = tuple([profile.chunk_ns(chunking, i) + dispatch_ns for i in range(self.count)])
        self._step: dict[int, int] = {}
        self._beside: dict[int, Beside] = {}
        self._pays: dict[tuple[int, int], bool] = {}

    @classmethod
    def by_size(cls, profile: Profile, chunking: str) -> Callable[[Sample | None, Sample], DecodeCosts]:
        """(a member of the step, None: as the decode; the sample to decode) -> costs at their resolutions."""
        known: dict[tuple[Size, Size] | None, DecodeCosts] = {None: cls(profile, chunking)}

        def costs_of(member: Sample | None, decoded: Sample) -> DecodeCosts:
            size, step = decoded.request.size, (member or decoded).request.size
            pair = (step, size) if profile.others and step is not None and size is not None else None
            if pair not in known:
                known[pair] = cls(profile, chunking, pair)
            return known[pair]

        return costs_of

    def step_ns(self, rows: int) -> int:
        """T(rows) with its dispatch."""
        step_ns = self._step.get(rows)
        if step_ns is None:
            step_ns = self._step[rows] = self._profile.step_ns(rows) + self._step_dispatch_ns
        return step_ns

    def beside(self, rows: int) -> Beside:
        beside = self._beside.get(rows)
        if beside is None:
            beside = self._beside[rows] = self._find_beside(rows)
        return beside

    def _slowdowns(self, rows: int, chunk: int) -> tuple[int, int]:
        if self._sizes is None:
            return self._profile.slowdown_ppm(rows, self._chunking, chunk)
        return self._whole.slowdowns_beside(self._sizes[0], rows, self._chunking, chunk, self._sizes[1])[:2]

    def _find_beside(self, rows: int) -> Beside:
        wall, progress, lost = [], [], []
        for chunk, solo_ns in enumerate(self.solo):
            s_u, s_v = self._slowdowns(rows, chunk)
            wall_ns = -(-solo_ns * s_v // PPM)
            done_ns = min(wall_ns, wall_ns * PPM // s_u)
            wall.append(wall_ns)
            progress.append(done_ns)
            lost.append(wall_ns - done_ns)
        return Beside(tuple(wall), tuple(progress), tuple(lost))

    def overlap_pays(self, rows: int, first: int) -> bool:
        """Whether sum(delta) <= sum(c) over the chunks from ``first`` on, beside steps of that many rows; exact."""
        key = (rows, first)
        pays = self._pays.get(key)
        if pays is None:
            pays = self._pays[key] = self._find_pays(rows, first)
        return pays

    def _find_pays(self, rows: int, first: int) -> bool:
        lost = Fraction(0)
        for chunk in range(first, self.count):
            s_u, s_v = self._slowdowns(rows, chunk)
            lost += Fraction(self.solo[chunk] * s_v * (s_u - PPM), PPM * s_u)
        return lost <= sum(self.solo[first:])
