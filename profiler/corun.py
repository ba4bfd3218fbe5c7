"""Slowdowns of both sides while a step and a chunk run at the same time.

Every pair is visited twice, half a measurement apart, so that one bad minute of the machine does not decide it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from profiler.bench import Bench
from profiler.pieces import ChunkPiece, StepPiece
from profiler.replay import Side, alone, together
from synerdiff.core import PPM, InputError
from synerdiff.diffusion.stages import ChunkFunction

BLOCK = 4
BRACKET_NS = 30_000_000
FEWEST_IN_BRACKET, MOST_IN_BRACKET = 3, 10
GIVE_UP = 10
VISITS = 2

Slowdowns = tuple[list[int], list[int]]
"""Samples (ppm) of the step and of the chunk."""


def chunk_pieces(bench: Bench, functions: Sequence[ChunkFunction]) -> list[ChunkPiece]:
    """Each chunk with the input that it has in a decode, to be run on its own."""
    hidden, pieces = bench.latent(), []
    for function in functions:
        pieces.append(ChunkPiece(function, hidden))
        hidden = bench.decode.submit(lambda function=function, hidden=hidden: function(hidden)).result()  # type: ignore[misc]
    return pieces


def measure_corun(bench: Bench, step: StepPiece, chunk: ChunkPiece, kept: Slowdowns) -> Slowdowns:
    """One visit of a pair: its samples so far and new ones, slowdowns (ppm) of the step and of the chunk.

    Blocks of solo, co-run, solo: each co-run time is divided by the median of the solo times on both sides of it, so
    that drift cancels. A visit has at least one block and about half of the rule's time. Raises InputError when the
    machine is so busy that the two never run without a gap.
    """
    sides = (Side(bench.denoise, step), Side(bench.decode, chunk))
    for side in sides:
        alone(side, 1)
    before = [alone(side, FEWEST_IN_BRACKET) for side in sides]
    slowdowns = (list(kept[0]), list(kept[1]))
    since_s = time.monotonic()
    while True:
        solo_ns = [median(times) for times in before]
        slow = 0 if solo_ns[0] >= solo_ns[1] else 1
        pair = together(sides[slow], sides[1 - slow], BLOCK, max(1, int(solo_ns[1 - slow])))
        during = pair if slow == 0 else pair[::-1]
        after = [alone(side, _bracket(ns)) for side, ns in zip(sides, solo_ns, strict=True)]
        for found, first, last, times in zip(slowdowns, before, after, during, strict=True):
            reference_ns = median([*first, *last])
            found += [max(1, round(PPM * ns / reference_ns)) for ns in times]
        before = after
        spent_s = time.monotonic() - since_s
        if all(bench.rule.enough(found, VISITS * spent_s) for found in slowdowns):
            return slowdowns
        if spent_s > GIVE_UP * bench.rule.cap_s and not all(slowdowns):
            raise InputError("The machine is too busy to measure: a step and a chunk never ran together without a gap.")


def _bracket(solo_ns: float) -> int:
    """Solo samples between two co-runs: short pieces get more, because they cost little."""
    return min(MOST_IN_BRACKET, max(FEWEST_IN_BRACKET, int(BRACKET_NS / solo_ns)))
