"""Garbage collection while a simulation runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

ALLOCATIONS = 100_000
"""Net new objects between two collections; Python's own default is 700."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage rarely, and as before afterwards.

    A simulation allocates records that stay and hardly any cycles: with Python's default the collector goes over them
    again and again, for a sixth of the time.
    """
    before = gc.get_threshold()
    if not 0 < before[0] < ALLOCATIONS:
        yield
        return
    gc.set_threshold(ALLOCATIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
