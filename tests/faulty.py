"""Hardware that goes wrong on purpose."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
def faulty(hardware: Hardware, faults: Faults) -> Iterator[Any]:
    """The hardware with these faults, and without them again at the end."""
    model = hardware.model
    step, start, chunk_functions = model.step, model.start, hardware.chunk_functions

    def faulty_step(states: Any, modes: Any = None, pad_rows: int = 0) -> Any:
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

    def faulty_start(seed: int, *args: Any, **more: Any) -> Any:
        if seed in faults.unprepared:
            raise RuntimeError("the adapter's file is broken")
        return start(seed, *args, **more)

    def faulty_chunks(lane: Any, chunking: Any, model: Any = None) -> Any:
        return tuple(_faulty_chunk(faults, chunk) for chunk in chunk_functions(lane, chunking, model))

    replaced: list[tuple[Any, str, Any]] = [
        (model, "step", faulty_step),
        (model, "start", faulty_start),
        (hardware, "chunk_functions", faulty_chunks),
    ]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        faults.released.set()
        for owner, name, _ in replaced:
            delattr(owner, name)


def _faulty_chunk(faults: Faults, chunk: Any) -> Any:
    def run(hidden: Any) -> Any:
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
def watched_chunks() -> Iterator[Any]:
    """Chunk pieces say whose they are, so that faults can choose among samples."""
    from real_runner.pieces import ChunkPiece

    attempt = ChunkPiece._attempt

    def watched(piece: Any) -> Any:
        current_seed[threading.get_ident()] = piece.image.state.seed
        return attempt(piece)

    piece_class: Any = ChunkPiece
    piece_class._attempt = watched
    try:
        yield
    finally:
        piece_class._attempt = attempt
