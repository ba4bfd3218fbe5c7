"""Measures a profile: atoms, then both sides of every pair, with rounds of solo times in between.

The finished tables are a function of what ``partial.json`` holds, so an interrupted measurement goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from profiler.assemble import MeasuringPlan, assemble
from profiler.bench import Bench, TimedStep, open_bench
from profiler.machine import GpuWatch, device_name, software
from profiler.partial import Partial, numbers, require_profile_folder
from profiler.settings import Settings
from profiler.timing import (
    BATCH,
    VISITS,
    Sampler,
    chunk_pieces,
    chunks_sampler,
    measure_atoms,
    measure_corun,
    overhead_samplers,
    step_samplers,
    take_round,
    warm_up_all,
)
from synerdiff.core import InputError
from synerdiff.device.lanes import find_device
from synerdiff.diffusion.stages import prepare_chunks
from synerdiff.figures.profile import profile_picture
from synerdiff.figures.style import save
from synerdiff.profile.folder import load_profile, write_profile
from synerdiff.profile.tables import Profile

OnProgress = Callable[[int, int, str], None]
"""Called with points done, points in all, and what is being measured."""


def measure_profile(settings: Settings, out: Path, on_progress: OnProgress | None = None) -> Profile:
    """Measure, write the profile into ``out`` and return it as it reads back.

    An interrupted measurement in ``out`` is continued. Raises InputError for devices, models and folders that cannot
    be used, and for an interrupted measurement that was made under other conditions.
    """
    device = find_device(settings.device)
    require_profile_folder(out)
    partial = Partial(out, _conditions(settings, device))
    watch = GpuWatch(device) if device.type == "cuda" else None
    try:
        with open_bench(settings, device) as bench:
            session = _Session(settings, bench, partial, on_progress, watch)
            session.measure()
            profile = assemble(session.plan, partial.tables, bench, watch, partial.spent_s, str(out))
    except torch.cuda.OutOfMemoryError:
        raise InputError(
            f"{settings.model} with steps of {settings.rows[-1]} rows does not fit into the GPU's memory; "
            "give smaller --rows or --resolution."
        ) from None
    write_profile(out, profile)
    partial.remove()
    return load_profile(out)


def draw_profile(profile: Profile, out: Path) -> None:
    """Steps, decodes and slowdowns as the picture ``profile.png`` in the folder."""
    head = profile.head
    save(profile_picture(profile, caption=f"{head.model} on {head.device}, {head.date}."), out, "profile")


class _Session:
    """One pass over all points: what ``partial`` has is left alone, what is missing is measured and kept."""

    def __init__(
        self,
        settings: Settings,
        bench: Bench,
        partial: Partial,
        on_progress: OnProgress | None,
        watch: GpuWatch | None,
    ) -> None:
        self.settings, self.bench, self.partial = settings, bench, partial
        self._on_progress, self._watch = on_progress, watch
        self._rounds = max(1, bench.rule.most // BATCH)

    @cached_property
    def plan(self) -> MeasuringPlan:
        """Known once the atoms are."""
        return MeasuringPlan(self.settings, [kept[0] for kept in self.partial.table("atoms").values()])

    def measure(self) -> None:
        """Atoms first, because they decide the cuts; then co-runs, interrupted by rounds of solo times."""
        atoms, corun = self.partial.table("atoms"), self.partial.table("corun")
        if not atoms:
            atoms |= {name: numbers(spread) for name, spread in measure_atoms(self.bench).items()}
            self._keep("decoder")
        functions = {cut.name: prepare_chunks(self.bench.model, cut, self.bench.decode) for cut in self.plan.chunkings}
        steps = {rows: TimedStep(self.bench.model, rows) for rows in self.settings.rows}
        samplers = self._samplers(functions, steps[self.settings.rows[0]])
        warm_up_all(self.bench, samplers)
        chunks = {name: chunk_pieces(self.bench, parts) for name, parts in functions.items()}
        for visit in range(1, VISITS + 1):
            visited = self.partial.table(f"visit {visit}")
            for cell in self.plan.cells:
                self._solo_rounds(samplers, self.plan.round_due(self._visits_done(), self._rounds))
                if cell.key not in visited:
                    piece = chunks[cell.chunking][cell.chunk]
                    corun[cell.key] = measure_corun(self.bench, steps[cell.rows], piece, corun.get(cell.key, ([], [])))
                    visited[cell.key] = 1
                    self._keep("pairs")

    def _samplers(self, functions: dict[str, Any], step: TimedStep) -> dict[str, Sampler]:
        rows = (*self.settings.rows, *self.settings.held_out_step_rows)
        unguided = max((r for r in self.settings.rows if r <= 8), default=self.settings.rows[0])
        return {
            **step_samplers(self.bench, rows, unguided),
            **{f"chunks {name}": chunks_sampler(self.bench, parts) for name, parts in functions.items()},
            **overhead_samplers(self.bench, step, functions["whole"][0]),
        }

    def _solo_rounds(self, samplers: dict[str, Sampler], due: int) -> None:
        """Solo rounds up to the one that is due; none any more once every point has been sampled often enough."""
        solo = self.partial.table("solo")
        while self._rounds_done() < due and not self._solo_enough():
            for name, columns in take_round(samplers).items():
                kept = solo.setdefault(name, [[] for _ in columns])
                for samples, more in zip(kept, columns, strict=True):
                    samples += more
            self._keep("solo")

    def _rounds_done(self) -> int:
        return len(self.partial.table("solo").get("chunks whole", [[]])[0]) // BATCH

    def _visits_done(self) -> int:
        return sum(len(self.partial.table(f"visit {visit}")) for visit in range(1, VISITS + 1))

    def _solo_enough(self) -> bool:
        solo = self.partial.table("solo")
        # Gaps and host times are too uneven ever to be known to 1%.
        points = [c for name, columns in solo.items() if not name.startswith("overhead") for c in columns]
        return bool(points) and all(self.bench.rule.enough(samples, 0.0) for samples in points)

    def _keep(self, what: str) -> None:
        self.partial.save()
        if self._watch is not None:
            self._watch.look()
        if self._on_progress is not None:
            total = 1 + self._rounds + VISITS * len(self.plan.cells)
            rounds = self._rounds if self._solo_enough() else self._rounds_done()
            self._on_progress(1 + rounds + self._visits_done(), total, what)


def _conditions(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What results must share to stand in one profile."""
    return {
        "model": settings.model,
        "device": f"{device_name(device)} ({device})",
        "dtype": settings.dtype,
        "resolution": None if settings.resolution is None else list(settings.resolution),
        "rows": list(settings.rows),
        "quick": settings.quick,
        **software(),
    }
