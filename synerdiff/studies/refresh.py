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
"""Rounds of a few samples of every solo cell, before the co-runs of a pass and as many after them."""

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
class Block:
    """The samples of one pass over the cells: ns, and ppm for the slowdowns of (step, chunk)."""

    steps: Mapping[int, Samples]
    chunks: Mapping[str, Sequence[Samples]]
    corun: Mapping[CorunKey, tuple[Samples, Samples]]
    overheads: Mapping[str, Samples]


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


def measure_block(hardware: Hardware, profile: Profile, cells: Cells, rule: Rule) -> Block:
    """One pass, with the profiler's own functions on the hardware's own lanes."""
    from profiler.bench import Bench
    from profiler.corun import chunk_pieces, measure_corun
    from profiler.pieces import StepPiece
    from profiler.solo import chunks_sampler, overhead_samplers, step_samplers, take_round
    from real_runner.hardware import chunking_of

    bench = Bench(hardware.model, hardware.device, hardware.denoise, hardware.decode[0], rule)
    functions = {name: hardware.chunk_functions(0, chunking_of(profile, name)) for name in (*cells.chunkings, "whole")}
    samplers = {f"chunks {name}": chunks_sampler(bench, functions[name]) for name in cells.chunkings}
    samplers |= step_samplers(bench, cells.rows, cells.rows[-1])
    samplers |= overhead_samplers(bench, StepPiece(bench.model, cells.rows[0]), functions["whole"][0])
    # Rounds before and after the co-runs, so that both kinds of cells describe the same minutes.
    rounds = [take_round(samplers) for _ in range(ROUNDS)]
    corun: dict[CorunKey, tuple[Samples, Samples]] = {}
    for name in cells.chunkings:
        for chunk, piece in enumerate(chunk_pieces(bench, functions[name])):
            for rows in cells.corun_rows:
                corun[name, chunk, rows] = measure_corun(bench, StepPiece(bench.model, rows), piece, ([], []))
    rounds += [take_round(samplers) for _ in range(ROUNDS)]
    found = {
        name: [
            [sample for column in parts for sample in column] for parts in zip(*(r[name] for r in rounds), strict=True)
        ]
        for name in samplers
    }
    return Block(
        {rows: found[f"step {rows}"][0] for rows in cells.rows},
        {name: found[f"chunks {name}"] for name in cells.chunkings},
        corun,
        {name.split()[1]: columns[0] for name, columns in found.items() if name.startswith("overhead ")},
    )


def refreshed(profile: Profile, blocks: Sequence[Block]) -> Profile:
    """The profile with these cells in place of its own, from the samples of all blocks; other cells stay."""
    from profiler.sampling import spread_of

    def pooled(parts: Iterable[Samples]) -> Spread:
        return spread_of([sample for part in parts for sample in part])

    corun = {key: dict(cells) for key, cells in profile.corun.items()}
    for key in blocks[0].corun:
        pairs = [block.corun[key] for block in blocks]
        cell = Corun(pooled(step for step, _ in pairs), pooled(chunk for _, chunk in pairs), False)
        corun.setdefault(key[:2], {})[key[2]] = cell
    chunks = {
        name: tuple(pooled(block.chunks[name][i] for block in blocks) for i in range(len(columns)))
        for name, columns in blocks[0].chunks.items()
    }
    steps = {rows: pooled(block.steps[rows] for block in blocks) for rows in blocks[0].steps}
    overheads = {name: pooled(block.overheads[name] for block in blocks) for name in blocks[0].overheads}
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
