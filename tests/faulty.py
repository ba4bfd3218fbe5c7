"""Hardware that goes wrong on purpose."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch

from real_runner.hardware import Hardware
from synerdiff.core import GUIDED


class Faults:
    """What is to go wrong, by the request's seed; ``largest_rows`` is where memory ends."""

    def __init__(self) -> None:
        self.largest_rows = 10_000
        self.short_of_memory_once: set[int] = set()
        """Seeds whose next chunk finds no memory, once."""
        self.never_enough_memory: set[int] = set()
        self.raises: set[int] = set()
        """Seeds whose steps raise."""
        self.not_a_number: set[int] = set()
        """Seeds whose latent becomes NaN at their second step."""
        self.unprepared: set[int] = set()
        """Seeds whose preparation raises."""
        self.bad_decode: set[int] = set()
        self.nan_decode: set[int] = set()
        self.hangs: set[int] = set()
        """Seeds whose decode never ends (until ``released``)."""
        self.released = threading.Event()


@contextmanager
def faulty(hardware: Hardware, faults: Faults):
    """The hardware with these faults, and without them again at the end."""
    model = hardware.model
    step, start, chunk_functions = model.step, model.start, hardware.chunk_functions

    def faulty_step(states, modes=None, pad_rows=0):
        modes = [state.default_mode for state in states] if modes is None else modes
        rows = len(states) + sum(mode is GUIDED for mode in modes) + pad_rows
        seeds = {state.seed for state in states}
        if rows > faults.largest_rows or seeds & faults.never_enough_memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory at {rows} rows")
        if seeds & faults.raises:
            raise RuntimeError("an adapter of other shapes")
        done = step(states, modes, pad_rows)
        for state in states:
            if state.seed in faults.not_a_number and state.step_index >= 2:
                state.latent = state.latent * float("nan")
        return done

    def faulty_start(seed, *args, **more):
        if seed in faults.unprepared:
            raise RuntimeError("the adapter's file is broken")
        return start(seed, *args, **more)

    def faulty_chunks(lane, chunking):
        return tuple(_faulty_chunk(faults, chunk) for chunk in chunk_functions(lane, chunking))

    model.step, model.start, hardware.chunk_functions = faulty_step, faulty_start, faulty_chunks
    try:
        yield
    finally:
        faults.released.set()
        del model.step, model.start, hardware.chunk_functions


def _faulty_chunk(faults: Faults, chunk):
    def run(hidden):
        seed = current_seed.get(threading.get_ident())
        if seed in faults.hangs:
            faults.released.wait(30)
        if seed in faults.short_of_memory_once:
            faults.short_of_memory_once.discard(seed)
            raise torch.OutOfMemoryError("CUDA out of memory in a decode")
        if seed in faults.bad_decode:
            raise RuntimeError("a decode that cannot be")
        out = chunk(hidden)
        return out * float("nan") if seed in faults.nan_decode else out

    return run


current_seed: dict[int, int] = {}
"""Thread -> the seed of the sample whose chunk it runs; filled by ``watched_chunks``."""


@contextmanager
def watched_chunks():
    """Chunk pieces say whose they are, so that faults can choose among samples."""
    from real_runner.pieces import ChunkPiece

    attempt = ChunkPiece._attempt

    def watched(piece):
        current_seed[threading.get_ident()] = piece.image.state.seed
        return attempt(piece)

    ChunkPiece._attempt = watched
    try:
        yield
    finally:
        ChunkPiece._attempt = attempt
