"""Measures a profile: atoms, then both sides of every pair, with rounds of solo times in between.

The tables are a function of what ``partial.json`` holds, so an interrupted measurement goes on where it was, and a
profile can be made at any time of the chunkings that are complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch

from profiler import timing
from profiler.assemble import Cell, MeasuringPlan, assemble, point
from profiler.bench import Bench, TimedStep, open_bench
from profiler.machine import GpuWatch, device_name, software
from profiler.partial import Partial, require_profile_folder
from profiler.settings import Settings
from synerdiff.core import NS_PER_S, InputError
from synerdiff.device.lanes import find_device
from synerdiff.diffusion.stages import prepare_chunks
from synerdiff.figures.profile import profile_picture
from synerdiff.figures.style import save
from synerdiff.profile.folder import load_profile, write_profile
from synerdiff.profile.tables import Profile, pixels_of

WRITING_S = 2.0
"""What writing the profile and its picture takes at the end of a measurement with a deadline."""
OnProgress = Callable[[int, int, str], None]
"""Called with points done, points in all, and what is being measured."""


def measure_profile(
    settings: Settings,
    out: Path,
    on_progress: OnProgress | None = None,
    *,
    minutes: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Measure, write the profile into ``out`` and return it as it reads back.

    With ``minutes``, loading included, it ends in time, with a profile of the chunkings that are complete by then; so
    does an interruption, which is then raised on. ``say`` is told how long all of it will take. An unfinished
    measurement in ``out`` is continued. Raises InputError for devices, models and folders that cannot be used, when
    the time did not suffice for any profile, and for an unfinished measurement that was made under other conditions.
    """
    until_s = inf if minutes is None else time.monotonic() + 60 * minutes - WRITING_S
    device = find_device(settings.device)
    require_profile_folder(out)
    partial = Partial(out, _conditions(settings, device))
    watch = GpuWatch(device) if device.type == "cuda" else None
    try:
        with open_bench(settings, device) as bench:
            session = _Session(settings, bench, partial, on_progress, watch, until_s)
            try:
                session.measure(say)
            except KeyboardInterrupt:
                if session.assemblable:
                    _write(session, watch, out)
                raise
            if not session.assemblable:
                why = "no pair of a step and a whole decode could be settled"
                why = why if minutes is None else f"{minutes:g} minutes did not suffice for a profile"
                raise InputError(f"{out}: {why}; what was measured is kept, and the same command goes on from there.")
            _write(session, watch, out)
    except torch.cuda.OutOfMemoryError:
        raise InputError(
            f"{settings.model} with steps of {settings.rows[-1]} rows does not fit into the GPU's memory; "
            "give smaller --rows or --resolution."
        ) from None
    return load_profile(out)


def _write(session: _Session, watch: GpuWatch | None, out: Path) -> None:
    """The profile of what there is; a measurement that lacks something can be continued."""
    partial = session.partial
    write_profile(out, assemble(session.plan, partial.tables, session.bench, watch, partial.spent_s, str(out)))
    if not session.plan.missing(partial.tables):
        partial.remove()


def draw_profile(profile: Profile, out: Path) -> None:
    """Steps, decodes and slowdowns as the picture ``profile.png`` in the folder; a further resolution as
    ``profile-HxW.png``."""
    head = profile.head
    for one in (profile, *profile.others.values()):
        pixels = pixels_of(one.head.resolutions[0])
        caption = f"{head.model} at {pixels} on {head.device}, {head.date}."
        save(profile_picture(one, caption=caption), out, "profile" if one is profile else f"profile-{pixels}")


class _Session:
    """One pass over all points: what ``partial`` has is left alone, what is missing is measured and kept."""

    def __init__(
        self,
        settings: Settings,
        bench: Bench,
        partial: Partial,
        on_progress: OnProgress | None,
        watch: GpuWatch | None,
        until_s: float,
    ) -> None:
        self.settings, self.bench, self.partial = settings, bench, partial
        self._on_progress, self._watch, self._until_s = on_progress, watch, until_s
        self._rounds = max(1, bench.rule.most // timing.BATCH)
        several = len(bench.faces) > 1
        self.faces = {pixels_of((f.model.height, f.model.width)) if several else "": f for f in bench.faces}
        """A bench of each resolution, by its name; the one there is has none."""

    @cached_property
    def plan(self) -> MeasuringPlan:
        """Known once the atoms are."""
        atoms_ns = [kept[0] for kept in self.partial.table("atoms").values()]
        return MeasuringPlan(self.settings, atoms_ns, [*self.faces])

    @property
    def assemblable(self) -> bool:
        """Whether a profile can be made of what there is."""
        if not self.partial.table("atoms") or not self.partial.table("solo"):
            return False
        try:
            return bool(self.plan.complete(self.partial.table("corun")))
        except InputError:
            return False

    def measure(self, say: Callable[[str], None]) -> None:
        """Atoms first, because they decide the cuts; then co-runs, interrupted by rounds of solo times."""
        atoms, corun = self.partial.table("atoms"), self.partial.table("corun")
        if not atoms:
            atoms |= timing.measure_atoms(self.bench)
            self._keep("decoder")
        functions = {
            (at, cut.name): prepare_chunks(face.model, cut, face.decode)
            for at, face in self.faces.items()
            for cut in self.plan.chunkings
        }
        steps = {(at, r): TimedStep(face.model, r) for at, face in self.faces.items() for r in self.settings.rows}
        samplers = self._samplers(functions, steps)
        timing.warm_up_all(self.bench, samplers)
        chunks = {key: timing.chunk_pieces(self.faces[key[0]], parts) for key, parts in functions.items()}
        # A measurement that may end early knows its solo times first; another spreads them over the whole of it.
        first = 1 if self._until_s == inf else min(self._rounds, -(-self.bench.rule.least // timing.BATCH))
        self._solo_rounds(samplers, first)
        say(self._forecast())
        skipped = self.partial.table("skipped")
        for visit in range(1, timing.VISITS + 1):
            visited = self.partial.table(f"visit {visit}")
            for cell in self.plan.cells:
                if cell.key in visited:
                    continue
                self._solo_rounds(samplers, max(first, self.plan.round_due(self._visits_done(), self._rounds)))
                if time.monotonic() + self._block_s(cell) > self._until_s:
                    return
                step, piece = steps[cell.step_at, cell.rows], chunks[cell.chunk_at, cell.chunking][cell.chunk]
                before = corun.get(cell.key, ([], []))
                try:
                    corun[cell.key] = timing.measure_corun(self.bench, step.again, piece, before, self._until_s)
                except timing.Unsettled as error:
                    if cell.key not in corun:
                        skipped[cell.key] = str(error)
                else:
                    skipped.pop(cell.key, None)
                    visited[cell.key] = 1
                self._keep("pairs")

    def _block_s(self, cell: Cell) -> float:
        """About how long the shortest visit of this pair takes."""
        return timing.visit_s(replace(self.bench.rule, cap_s=0), *self._solo_ns(cell))

    def _solo_ns(self, cell: Cell) -> tuple[float, float]:
        solo = self.partial.table("solo")
        chunks = solo[point(f"chunks {cell.chunking}", cell.chunk_at)]
        return median(solo[point(f"step {cell.rows}", cell.step_at)][0]), median(chunks[cell.chunk])

    def _forecast(self) -> str:
        """How long what is left will take, and how much of it there will be time for."""
        points = [median(c) for name, columns in self.partial.table("solo").items() for c in columns if c]
        rounds = 0 if self._solo_enough() else max(0, self._rounds - self._rounds_done())
        round_s = (timing.BATCH + 1) * sum(points) / NS_PER_S
        left = [
            timing.visit_s(self.bench.rule, *self._solo_ns(cell))
            for visit in range(1, timing.VISITS + 1)
            for cell in self.plan.cells
            if cell.key not in self.partial.table(f"visit {visit}")
        ]
        total_s = rounds * round_s + sum(left)
        text = f"about {total_s / 60:.1f} minutes for {rounds} rounds of solo times and {len(left)} visits of pairs"
        time_s = self._until_s - time.monotonic()
        if time_s >= total_s:
            return text
        share = max(0.0, time_s) / total_s
        ends = [sum(left[: count + 1]) + share * rounds * round_s for count in range(len(left))]
        fits = sum(end <= time_s for end in ends)
        return f"{text}; there is time for about {fits} of these visits, in the order of their value"

    def _samplers(
        self, functions: dict[tuple[str, str], Any], steps: dict[tuple[str, int], TimedStep]
    ) -> dict[str, timing.Sampler]:
        rows = (*self.settings.rows, *self.settings.held_out_step_rows)
        unguided = max((r for r in self.settings.rows if r <= 8), default=self.settings.rows[0])
        samplers: dict[str, timing.Sampler] = {}
        for at, face in self.faces.items():
            samplers |= {point(name, at): one for name, one in timing.step_samplers(face, rows, unguided).items()}
        for (at, name), parts in functions.items():
            samplers[point(f"chunks {name}", at)] = timing.chunks_sampler(self.faces[at], parts)
        first = next(iter(self.faces))
        own = {r: step for (at, r), step in steps.items() if at == first}
        return samplers | timing.overhead_samplers(self.bench, own, functions[first, "whole"][0])

    def _solo_rounds(self, samplers: dict[str, timing.Sampler], due: int) -> None:
        """Solo rounds up to the one that is due; none any more once every point has been sampled often enough."""
        solo = self.partial.table("solo")
        while self._rounds_done() < due and not self._solo_enough():
            if solo and time.monotonic() > self._until_s:
                return
            for name, columns in timing.take_round(samplers).items():
                columns_so_far = solo.setdefault(name, [[] for _ in columns])
                for samples, more in zip(columns_so_far, columns, strict=True):
                    samples += more
            self._keep("solo")

    def _rounds_done(self) -> int:
        name = point("chunks whole", next(iter(self.faces)))
        return len(self.partial.table("solo").get(name, [[]])[0]) // timing.BATCH

    def _visits_done(self) -> int:
        return sum(len(self.partial.table(f"visit {visit}")) for visit in range(1, timing.VISITS + 1))

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
            total = 1 + self._rounds + timing.VISITS * len(self.plan.cells)
            rounds = self._rounds if self._solo_enough() else self._rounds_done()
            self._on_progress(1 + rounds + self._visits_done(), total, what)


def _conditions(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What results must share to stand in one profile."""
    sizes = [pixels_of(size) for size in (settings.resolution, *settings.others) if size is not None]
    return {
        "model": settings.model,
        "device": f"{device_name(device)} ({device})",
        "dtype": settings.dtype,
        "resolution": None if settings.resolution is None else sizes,
        "across": settings.across,
        "rows": list(settings.rows),
        "quick": settings.quick,
        "execution": None if settings.execution is None else str(settings.execution),
        **software(),
    }
