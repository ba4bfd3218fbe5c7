"""Measures a profile's cells again, on the very lanes on which a run follows: machines drift between two sittings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from synerdiff.core import PPM
from synerdiff.profile import Corun, Profile, Spread

if TYPE_CHECKING:
    from profiler.sampling import Rule
    from real_runner.hardware import Hardware

ROUNDS = 3
"""Rounds of a few samples of every cell in one pass over what runs alone."""

Samples = Sequence[int]
CorunKey = tuple[str, int, int]
"""(chunking, chunk, rows)"""


@dataclass(frozen=True, slots=True)
class Cells:
    """What a study's runs can meet: step rows, chunkings, and the rows at which steps run beside chunks."""

    rows: tuple[int, ...]
    chunkings: tuple[str, ...]
    corun_rows: tuple[int, ...]
    """Empty when nothing ever runs beside a step."""


@dataclass(frozen=True, slots=True)
class Solo:
    """Samples (ns) of one pass over the pieces that run alone."""

    steps: Mapping[int, Samples]
    chunks: Mapping[str, Sequence[Samples]]
    overheads: Mapping[str, Samples]


Coruns = Mapping[CorunKey, tuple[Samples, Samples]]
"""Samples of one pass over the co-runs: slowdowns (ppm) of step and chunk. Ratios to solo times measured beside them,
so they drift far less than times do."""


def cells_for(profile: Profile, most_rows: int, chunkings: Sequence[str]) -> Cells:
    """The profile's cells up to the bucket of ``most_rows``, for the chunkings that the policies use."""
    largest = profile.bucket(min(most_rows, profile.max_rows))
    points = profile.row_buckets or tuple(profile.steps)
    rows = tuple(r for r in points if r <= largest)
    names = tuple(dict.fromkeys(chunkings))
    beside = {
        r
        for name in names
        for chunk in range(profile.chunk_count(name))
        for r, cell in profile.corun.get((name, chunk), {}).items()
        if not cell.held_out
    }
    wanted = tuple(sorted(beside))
    # Lookups interpolate, so one measured point at or above the largest bucket is needed.
    above = [r for r in wanted if r >= largest][:1]
    return Cells(rows, names, tuple(r for r in wanted if r < largest) + tuple(above))


class Refresh:
    """Takes passes over the cells, with the profiler's own functions on the hardware's own lanes."""

    def __init__(self, hardware: Hardware, profile: Profile, cells: Cells, rule: Rule) -> None:
        from profiler.bench import Bench
        from profiler.pieces import StepPiece
        from profiler.solo import chunks_sampler, overhead_samplers, step_samplers
        from real_runner.hardware import chunking_of

        self._cells = cells
        self._bench = bench = Bench(hardware.model, hardware.device, hardware.denoise, hardware.decode[0], rule)
        names = (*cells.chunkings, "whole")
        self._functions = {name: hardware.chunk_functions(0, chunking_of(profile, name)) for name in names}
        self._samplers = {f"chunks {name}": chunks_sampler(bench, self._functions[name]) for name in cells.chunkings}
        self._samplers |= step_samplers(bench, cells.rows, cells.rows[-1])
        small = StepPiece(bench.model, cells.rows[0])
        self._samplers |= overhead_samplers(bench, small, self._functions["whole"][0])

    def solo(self) -> Solo:
        """A few samples of everything that runs alone, in rounds."""
        from profiler.solo import take_round

        rounds = [take_round(self._samplers) for _ in range(ROUNDS)]
        found = {
            name: [[ns for column in parts for ns in column] for parts in zip(*(r[name] for r in rounds), strict=True)]
            for name in self._samplers
        }
        return Solo(
            {rows: found[f"step {rows}"][0] for rows in self._cells.rows},
            {name: found[f"chunks {name}"] for name in self._cells.chunkings},
            {name.split()[1]: columns[0] for name, columns in found.items() if name.startswith("overhead ")},
        )

    def coruns(self) -> Coruns:
        """Every pair of a step and a chunk."""
        from profiler.corun import chunk_pieces, measure_corun
        from profiler.pieces import StepPiece

        bench = self._bench
        return {
            (name, chunk, rows): measure_corun(bench, StepPiece(bench.model, rows), piece, ([], []))
            for name in self._cells.chunkings
            for chunk, piece in enumerate(chunk_pieces(bench, self._functions[name]))
            for rows in self._cells.corun_rows
        }


def refreshed(profile: Profile, solos: Sequence[Solo], coruns: Sequence[Coruns]) -> Profile:
    """The profile with these cells in place of its own, from the samples of all passes; other cells stay."""
    from profiler.sampling import spread_of

    def pooled(parts: Iterable[Samples]) -> Spread:
        return spread_of([sample for part in parts for sample in part])

    corun = {key: dict(cells) for key, cells in profile.corun.items()}
    for key in coruns[0]:
        pairs = [one[key] for one in coruns]
        cell = Corun(pooled(step for step, _ in pairs), pooled(chunk for _, chunk in pairs), False)
        corun.setdefault(key[:2], {})[key[2]] = cell
    chunks = {
        name: tuple(pooled(one.chunks[name][i] for one in solos) for i in range(len(columns)))
        for name, columns in solos[0].chunks.items()
    }
    steps = {rows: pooled(one.steps[rows] for one in solos) for rows in solos[0].steps}
    overheads = {name: pooled(one.overheads[name] for one in solos) for name in solos[0].overheads}
    return replace(
        profile,
        steps=dict(profile.steps) | steps,
        chunks=dict(profile.chunks) | chunks,
        corun=corun,
        overheads=dict(profile.overheads) | overheads,
        content_hash="",
        _bucket_memo={},
        _step_memo={},
        _slowdown_memo={},
    )


def all_times_scaled(profile: Profile, factor: float) -> Profile:
    """All times multiplied by a factor; slowdowns are ratios and stay."""
    ppm = round(factor * PPM)

    def scaled(spread: Spread) -> Spread:
        median, p10, p90 = (max(1, value * ppm // PPM) for value in (spread.median, spread.p10, spread.p90))
        return Spread(median, p10, p90, spread.n)

    return replace(
        profile,
        steps={rows: scaled(spread) for rows, spread in profile.steps.items()},
        chunks={name: tuple(map(scaled, spreads)) for name, spreads in profile.chunks.items()},
        overheads={name: scaled(spread) if spread.median else spread for name, spread in profile.overheads.items()},
        content_hash="",
        _bucket_memo={},
        _step_memo={},
        _slowdown_memo={},
    )
