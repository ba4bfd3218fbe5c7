"""A profile with cells measured again, on the very lanes on which runs follow: machines drift between two sittings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from synerdiff.core import PPM
from synerdiff.profile.tables import Corun, Profile, Spread
from synerdiff.validation.cell_tour import Beside, CellTour, Seen, cells_seen, joined

if TYPE_CHECKING:
    from real_runner.hardware import Hardware

ROUNDS = 1
"""Visits of every cell in one pass."""
MOST_SLOWDOWN = 10
"""A piece that seems to stand still beside the other lane counts as slowed down so many times."""


@dataclass(frozen=True, slots=True)
class Cells:
    """What a study's runs can meet: step rows and chunkings."""

    rows: tuple[int, ...]
    chunkings: tuple[str, ...]


def cells_for(profile: Profile, most_rows: int, chunkings: Sequence[str], even_only: bool = False) -> Cells:
    """The profile's row buckets up to that of ``most_rows``, and the chunkings that the policies use.

    ``even_only``: all samples are guided and none skips, so that only even numbers of rows occur.
    """
    largest = profile.bucket(min(most_rows, profile.max_rows))
    if even_only:
        rows = {profile.bucket(r) for r in range(2, min(most_rows, profile.max_rows) + 1, 2)}
    else:
        rows = {r for r in profile.row_buckets or tuple(profile.steps) if r <= largest}
    return Cells(tuple(sorted(rows)), tuple(dict.fromkeys(chunkings)))


def take_pass(hardware: Hardware, profile: Profile, cells: Cells) -> Seen:
    """Every cell once, in a small run for each chunking. Raises what ended one of them early."""
    from real_runner.engine import run_real

    parts = []
    for name in cells.chunkings:
        tour = CellTour(name, cells.rows, ROUNDS)
        run = run_real(tour.requests, tour, profile, hardware, stop=tour.over)
        if run.error is not None:
            raise run.error
        parts.append(cells_seen(name, run))
    return joined(parts)


def refreshed(profile: Profile, times: Sequence[Seen], ratios: Sequence[Seen]) -> Profile:
    """The profile with these cells in place of its own; other cells stay.

    Times come from the passes ``times``; slowdowns, which are ratios and drift far less, from ``ratios``. Both are
    means: a run pays the mean of its pieces, and single pieces on a shared machine have a long tail, which medians
    leave out.
    """
    overheads = {name: _mean(seen.overheads[name] for seen in times) for name in times[0].overheads}
    # The simulator adds the hand-over to every piece; one within a decode is shorter than one to a lane that sleeps.
    step_ns, chunk_ns = (overheads[name].median for name in ("step_dispatch", "chunk_dispatch"))
    steps = {rows: _mean((seen.steps[rows] for seen in times), step_ns) for rows in times[0].steps}
    chunks = {
        name: tuple(_mean((seen.chunks[name][i] for seen in times), chunk_ns) for i in range(len(columns)))
        for name, columns in times[0].chunks.items()
    }
    corun = {key: dict(cells) for key, cells in profile.corun.items()}
    for chunking, chunk, rows in ratios[0].beside:
        both = [seen.beside[chunking, chunk, rows] for seen in ratios]
        cell = Corun(_slowdown([step for step, _ in both]), _slowdown([part for _, part in both]), False)
        corun.setdefault((chunking, chunk), {})[rows] = cell
    again = (
        f"means over pieces of runs: steps of {', '.join(map(str, steps))} rows, chunkings {', '.join(chunks)}, "
        "what ran beside each other of these, overheads; all else is as first measured"
    )
    return replace(
        profile,
        steps=dict(profile.steps) | steps,
        chunks=dict(profile.chunks) | chunks,
        corun=corun,
        overheads=dict(profile.overheads) | overheads,
        info=dict(profile.info) | {"measured_again": again},
        content_hash="",
        _bucket_memo={},
        _step_memo={},
        _slowdown_memo={},
    )


def _mean(parts: Iterable[Sequence[int]], less_ns: int = 0) -> Spread:
    """The mean, in the place where lookups look, with p10 and p90; ``less_ns`` is taken off every sample."""
    from profiler.sampling import spread_of

    samples = [max(1, sample - less_ns) if less_ns else sample for part in parts for sample in part]
    found, mean_ns = spread_of(samples), round(sum(samples) / len(samples))
    return Spread(mean_ns, min(found.p10, mean_ns), max(found.p90, mean_ns), found.n)


def _slowdown(parts: Sequence[Beside]) -> Spread:
    """Overlap over progress (ppm), summed over all pieces; single pieces tell too little for a spread."""
    overlap_ns = sum(part.overlap_ns for part in parts)
    least_ns = overlap_ns / MOST_SLOWDOWN
    ppm = round(PPM * overlap_ns / max(least_ns, sum(part.progress_ns for part in parts))) if overlap_ns else PPM
    return Spread(ppm, ppm, ppm, sum(part.pieces for part in parts))


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
