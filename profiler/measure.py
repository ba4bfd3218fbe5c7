"""Measures a profile: overheads, steps, atoms, chunks, then both sides of every pair, with a model on a device.

The finished tables are a function of what ``partial.json`` holds, so an interrupted measurement goes on cell by cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from profiler.facts import GpuWatch, code_version, device_name, host, software
from profiler.findings import findings
from profiler.partial import Partial, claim_folder, from_json, to_json
from profiler.pieces import StepPiece
from profiler.sampling import FULL_CPU, FULL_GPU, QUICK, Rule
from profiler.settings import Settings, command_line
from profiler.tables import (
    Bench,
    chunk_pieces,
    measure_atoms,
    measure_chunks,
    measure_corun,
    measure_overheads,
    measure_steps,
)
from synerdiff.core import InputError
from synerdiff.diffusion.chunking import WHOLE, Chunking, choose_cuts
from synerdiff.diffusion.device import Device, available_cores, find_device, open_device
from synerdiff.diffusion.loading import load_model
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.stages import prepare_chunks, prepare_steps
from synerdiff.profile import OVERHEADS, Corun, Profile
from synerdiff.profile_files import load_profile, write_profile

OnProgress = Callable[[int, int, str], None]
"""Called with points done, points in all, and what was measured last."""


def measure_profile(settings: Settings, out: Path, on_progress: OnProgress | None = None) -> Profile:
    """Measure, write the profile into ``out`` and return it as it reads back.

    An interrupted measurement in ``out`` is continued. Raises InputError for devices, models and folders that cannot
    be used, and for an interrupted measurement that was made under other conditions.
    """
    claim_folder(out)
    device = find_device(settings.device)
    partial = Partial(out, _conditions(settings, device))
    with _one_thread(device), open_device(device) as lanes:
        watch = GpuWatch(device) if device.type == "cuda" else None
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        model = load_model(settings.model, device, dtype, settings.resolution)
        bench = _bench(model, lanes, settings)
        session = _Session(settings, bench, partial, on_progress or (lambda done, total, what: None), watch)
        try:
            session.measure()
        except torch.cuda.OutOfMemoryError:
            raise InputError(
                f"{settings.model} with steps of {settings.rows[-1]} rows does not fit into the GPU's memory; "
                "give smaller --rows or --resolution."
            ) from None
        finally:
            partial.save()
        profile = session.profile(out)
    write_profile(out, profile)
    partial.remove()
    return load_profile(out)


class _Session:
    """One pass over all points: what ``partial`` has is left alone, what is missing is measured and kept."""

    def __init__(
        self, settings: Settings, bench: Bench, partial: Partial, on_progress: OnProgress, watch: GpuWatch | None
    ) -> None:
        self.settings, self.bench, self.partial = settings, bench, partial
        self._on_progress, self._watch = on_progress, watch
        self._rows = (*settings.rows, *settings.held_out_step_rows)
        self._counts = [count for count in settings.chunk_counts if count <= len(bench.model.decoder.atoms)]
        cells = len(settings.corun_rows) * (1 + sum(self._counts))
        held_out = len(settings.held_out_corun_rows) * (1 + len(self._counts))
        self._total = 1 + len(self._rows) + 1 + 1 + (1 + len(self._counts)) + cells + held_out

    def measure(self) -> None:
        self._overheads()
        self._steps()
        self._atoms()
        functions = {cut.name: prepare_chunks(self.bench.model, cut, self.bench.decode) for cut in self.chunkings()}
        for name, found in self._missing("chunks", list(functions)):
            found[name] = [to_json(spread) for spread in measure_chunks(self.bench, functions[name])]
        pieces = {
            (name, index): piece
            for name, chunks in functions.items()
            for index, piece in enumerate(chunk_pieces(self.bench, chunks))
        }
        steps = {rows: StepPiece(self.bench.model, rows) for rows in self.settings.rows}
        for key, found in self._missing("corun", [_key(*cell) for cell in self._cells()]):
            name, chunk, rows = key.split()
            pair = measure_corun(self.bench, steps[int(rows)], pieces[name, int(chunk)])
            found[key] = [to_json(spread) for spread in pair]

    def _missing(self, table: str, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each key that the table lacks; the caller fills it, then the table is saved."""
        cells = self.partial.table(table)
        self._report(table)
        for key in keys:
            if key not in cells:
                yield key, cells
                self._kept(table)

    def _kept(self, what: str) -> None:
        self.partial.save()
        if self._watch is not None:
            self._watch.look()
        self._report(what)

    def _report(self, what: str) -> None:
        self._on_progress(sum(map(len, self.partial.tables.values())), self._total, what)

    def _overheads(self) -> None:
        for name, found in self._missing("overheads", ["all"]):
            spreads = measure_overheads(self.bench, StepPiece(self.bench.model, self.settings.rows[0]))
            found[name] = {key: to_json(spread) for key, spread in spreads.items()}

    def _steps(self) -> None:
        cells = self.partial.table("steps")
        unguided = max((rows for rows in self.settings.rows if rows <= 8), default=self.settings.rows[0])
        wanted = {str(rows): StepPiece(self.bench.model, rows) for rows in self._rows}
        wanted[f"unguided {unguided}"] = StepPiece(self.bench.model, unguided, guided=False)

        def keep(name: str, spread: Any) -> None:
            cells[name] = to_json(spread)
            self._kept("steps")

        measure_steps(self.bench, {name: piece for name, piece in wanted.items() if name not in cells}, keep)

    def _atoms(self) -> None:
        for name, found in self._missing("atoms", ["all"]):
            found[name] = {atom: to_json(spread) for atom, spread in measure_atoms(self.bench).items()}

    def chunkings(self) -> list[Chunking]:
        """``whole``, then the cuts that make the largest chunk as short as the measured atoms allow."""
        times_ns = [spread[0] for spread in self.partial.table("atoms")["all"].values()]
        return [WHOLE, *(choose_cuts(times_ns, count) for count in self._counts)]

    def _cells(self) -> list[tuple[str, int, int]]:
        """(chunking, chunk, rows) of every co-run, rows changing fastest, so that the time left is easy to guess."""
        held_out = self._held_out_chunks()
        return [
            (cut.name, chunk, rows)
            for cut in self.chunkings()
            for chunk in range(len(cut))
            for rows in self.settings.rows
            if rows in self.settings.corun_rows or (cut.name, chunk) in held_out
        ]

    def _held_out_chunks(self) -> set[tuple[str, int]]:
        """The longest chunk of each chunking."""
        longest = set()
        for name, spreads in self.partial.table("chunks").items():
            medians = [spread[0] for spread in spreads]
            longest.add((name, medians.index(max(medians))))
        return longest

    def profile(self, out: Path) -> Profile:
        """The tables as a profile, once everything is measured."""
        tables, settings = self.partial.tables, self.settings
        corun: dict[tuple[str, int], dict[int, Corun]] = {}
        for cut, chunk, rows in self._cells():
            step, piece = (from_json(numbers) for numbers in tables["corun"][_key(cut, chunk, rows)])
            corun.setdefault((cut, chunk), {})[rows] = Corun(step, piece, rows not in settings.corun_rows)
        profile = Profile(
            name=out.resolve().name,
            provenance="measured",
            row_buckets=settings.rows,
            steps={rows: from_json(tables["steps"][str(rows)]) for rows in settings.rows},
            held_out_steps={rows: from_json(tables["steps"][str(rows)]) for rows in settings.held_out_step_rows},
            chunks={cut.name: tuple(map(from_json, tables["chunks"][cut.name])) for cut in self.chunkings()},
            corun=corun,
            overheads={name: from_json(tables["overheads"]["all"][name]) for name in OVERHEADS},
        )
        profile.info = {**self._provenance(str(out)), **findings(profile, settings.corun_rows)}
        return profile

    def _provenance(self, out: str) -> dict[str, Any]:
        bench, model, rule = self.bench, self.bench.model, self.bench.rule
        sides = (model.height, model.width)
        device: dict[str, Any] = {"device": device_name(bench.device.torch_device), **host(), **software()}
        if self._watch is not None:
            device |= {"driver": self._watch.driver, "clocks": self._watch.summary()}
        else:
            device["lanes"] = "one thread each, pinned to cores {} (denoise) and {} (decode)".format(*_cores())
        return {
            **device,
            "model": model.name,
            "resolution": sides[0] if sides[0] == sides[1] else list(sides),
            "dtype": str(model.dtype).removeprefix("torch."),
            "execution": "CUDA graphs" if bench.on_gpu else "eager, rows padded to a bucket",
            "quick": self.settings.quick,
            "command": command_line(self.settings, out),
            "commit": code_version(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "measured_for_s": round(self.partial.spent_s, 1),
            "sampling": _rule_text(rule),
            "cuts": {cut.name: list(cut.cuts) for cut in self.chunkings()},
            "atoms_ns": {name: spread[0] for name, spread in self.partial.tables["atoms"]["all"].items()},
            "unguided_step": self._unguided_step(),
        }

    def _unguided_step(self) -> dict[str, Any]:
        """A step of one-row samples against one of as many rows in guided samples, to which T(rows) refers."""
        steps = self.partial.tables["steps"]
        name = next(name for name in steps if name.startswith("unguided"))
        rows = name.split()[1]
        return {"rows": int(rows), "median_ns": steps[name][0], "ratio": round(steps[name][0] / steps[rows][0], 4)}


def _bench(model: DiffusionModel, device: Device, settings: Settings) -> Bench:
    on_gpu = device.torch_device.type == "cuda"
    cores = (None, None) if on_gpu else _cores()
    denoise = device.lane("denoise", high_priority=True, core=cores[0])
    decode = device.lane("decode0", core=cores[1])
    prepare_steps(model, settings.rows, denoise)
    rule: Rule = QUICK if settings.quick else FULL_GPU if on_gpu else FULL_CPU
    return Bench(model, device, denoise, decode, rule)


def _cores() -> tuple[int, int]:
    """The first core for the denoise lane and the next for the decode lane; one core alone serves both."""
    cores = available_cores()
    return cores[0], cores[1 if len(cores) > 1 else 0]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU the lanes share the machine: one intra-op thread each, and one for what this thread does."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _key(chunking: str, chunk: int, rows: int) -> str:
    return f"{chunking} {chunk} {rows}"


def _rule_text(rule: Rule) -> str:
    return (
        f"{rule.least} to {rule.most} samples a point until the 95% interval of the median is below "
        f"{100 * rule.width:g}% or {rule.cap_s:g} s have passed"
    )
