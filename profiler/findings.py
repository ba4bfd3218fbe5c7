"""What follows from the tables: does overlap pay, what does chunking change, and how good are the lookups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Any

from synerdiff.core import PPM
from synerdiff.profile.tables import Profile, Spread


def decode_slowdowns(profile: Profile, chunking: str, rows: int) -> tuple[float, float]:
    """(s_u, s_v) of a whole decode run as these chunks beside steps of ``rows`` rows.

    With c_i the solo times and s_u,i, s_v,i the slowdowns: the decode takes W = sum(c_i * s_v,i), so
    s_v = W / sum(c_i); the steps progress by sum(c_i * s_v,i / s_u,i) meanwhile, so s_u = W / that.
    """
    alone = beside = progress = 0.0
    for chunk in range(profile.chunk_count(chunking)):
        c = profile.chunk_ns(chunking, chunk)
        s_u, s_v = (ppm / PPM for ppm in profile.slowdown_ppm(rows, chunking, chunk))
        alone, beside, progress = alone + c, beside + c * s_v, progress + c * s_v / s_u
    return beside / progress, beside / alone


def overlap(profile: Profile, rows: Iterable[int]) -> dict[str, dict[int, float]]:
    """1/s_u + 1/s_v of a decode, by chunking and rows; above 1 running beside pays."""
    rows = list(rows)
    return {
        chunking: {r: round(sum(1 / s for s in decode_slowdowns(profile, chunking, r)), 4) for r in rows}
        for chunking in profile.chunkings
    }


def kappa(profile: Profile, rows: Iterable[int]) -> dict[str, dict[int, dict[str, float]]]:
    """Slowdown with chunks / slowdown with the whole decode, per chunking, rows and side.

    Below 1 chunks contend less than a whole decode, and chunking alone raises throughput.
    """
    rows = list(rows)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for chunking in profile.chunkings:
        if chunking == "whole":
            continue
        found[chunking] = {}
        for r in rows:
            cut, whole = decode_slowdowns(profile, chunking, r), decode_slowdowns(profile, "whole", r)
            found[chunking][r] = {"step": round(cut[0] / whole[0], 4), "chunk": round(cut[1] / whole[1], 4)}
    return found


def held_out_error(profile: Profile) -> dict[str, dict[str, float]]:
    """Lookups against measured cells that lookups do not use: |lookup / measured - 1|, its mean and worst."""
    steps = [profile.step_ns(rows) / spread.median - 1 for rows, spread in profile.held_out_steps.items()]
    step_side, chunk_side = [], []
    for (chunking, chunk), cells in profile.corun.items():
        for rows, cell in cells.items():
            if cell.held_out:
                s_u, s_v = profile.slowdown_ppm(rows, chunking, chunk)
                step_side.append(s_u / cell.step.median - 1)
                chunk_side.append(s_v / cell.chunk.median - 1)
    named = {"step_time": steps, "step_slowdown": step_side, "chunk_slowdown": chunk_side}
    return {name: _error(values) for name, values in named.items() if values}


def _error(values: list[float]) -> dict[str, float]:
    sizes = [abs(value) for value in values]
    return {"cells": len(sizes), "mean": round(fmean(sizes), 4), "worst": round(max(sizes), 4)}


def dispersion(profile: Profile) -> dict[str, float]:
    """(p90 - p10) / median of each table: the median over its cells."""
    cells = [cell for by_rows in profile.corun.values() for cell in by_rows.values()]
    tables: Mapping[str, list[Spread]] = {
        "step_time": list(profile.steps.values()),
        "chunk_time": [spread for spreads in profile.chunks.values() for spread in spreads],
        "step_slowdown": [cell.step for cell in cells],
        "chunk_slowdown": [cell.chunk for cell in cells],
    }
    return {
        name: round(median((spread.p90 - spread.p10) / spread.median for spread in spreads), 4)
        for name, spreads in tables.items()
        if spreads
    }


def findings(profile: Profile, rows: Iterable[int]) -> dict[str, Any]:
    """All of the above at these rows, for profile.yaml."""
    rows = list(rows)
    return {
        "held_out_error": held_out_error(profile),
        "dispersion": dispersion(profile),
        "overlap": overlap(profile, rows),
        "kappa": kappa(profile, rows),
    }
