"""Which points are measured, how samples become the tables of a profile, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import permutations, product
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, cast

from profiler.bench import Bench, lane_cores
from profiler.deciding import decision_times
from profiler.machine import GpuWatch, code_version, device_name, host, kernels, software
from profiler.sampling import spread_of
from profiler.settings import Settings, command_line
from profiler.timing import VISITS
from synerdiff.core import PPM, InputError
from synerdiff.diffusion.decoder import WHOLE, Chunking, choose_cuts
from synerdiff.profile.folder import combined
from synerdiff.profile.tables import OVERHEADS, Corun, Dtype, Head, Profile, Spread, Weights, pixels_of

VALUABLE_ROWS = (2, 8)
"""One guided sample, and four: what most runs meet."""

Tables = Mapping[str, Mapping[str, Any]]
"""``atoms``: name -> spread; ``solo``: point -> columns of samples; ``corun``: cell -> samples of step and chunk;
``skipped``: cell -> why it could not be settled."""


class Cell(NamedTuple):
    """One co-run: a chunk beside steps of so many rows; with several resolutions, the step's and the chunk's."""

    chunking: str
    chunk: int
    rows: int
    step_at: str = ""
    chunk_at: str = ""

    @property
    def key(self) -> str:
        """Its name in the partial file."""
        pair = f" step {self.step_at} chunk {self.chunk_at}" if self.step_at else ""
        return f"{self.chunking} {self.chunk} {self.rows}{pair}"

    @property
    def crosses(self) -> bool:
        """The two sides have different resolutions."""
        return self.step_at != self.chunk_at


def point(name: str, at: str) -> str:
    """The name of a solo point at that resolution; empty where there is one."""
    return f"{name} at {at}" if at else name


class MeasuringPlan:
    """``chunkings``: whole, then the cuts that make the longest chunk as short as the measured atoms allow, for each
    wanted number of chunks that the decoder has atoms for. ``cells``: the co-runs in the order of their value, which
    decides what a measurement that runs out of time still has: the whole decode beside one and four guided samples,
    the longest chunk of each cut there, the rest of the whole decode, chunking by chunking the ends of the range and
    then its inside, then pairs of two resolutions, and last what is held out. ``longest``: the longest chunk of each
    chunking, by the atoms. ``sizes``: the resolutions (HxW), the first one first, whose atoms decide the cuts of all;
    one empty text where there is one.
    """

    def __init__(self, settings: Settings, atoms_ns: Sequence[int], sizes: Sequence[str] = ("",)) -> None:
        self.settings, self.sizes = settings, tuple(sizes)
        counts = [count for count in settings.chunk_counts if count <= len(atoms_ns)]
        self.chunkings = (WHOLE, *(choose_cuts(atoms_ns, count) for count in counts))
        self.longest: dict[str, int] = {}
        for cut in self.chunkings:
            times_ns = [sum(atoms_ns[i] for i in atoms) for atoms in cut.ranges(len(atoms_ns))]
            self.longest[cut.name] = times_ns.index(max(times_ns))
        cells = [
            Cell(cut.name, chunk, rows, step_at, chunk_at)
            for step_at, chunk_at in product(self.sizes, self.sizes)
            if step_at == chunk_at or settings.across
            for cut in self.chunkings
            for chunk in range(len(cut))
            for rows in settings.rows
            if rows in settings.corun_rows or (step_at == chunk_at and chunk == self.longest[cut.name])
        ]
        self.cells = tuple(sorted(cells, key=self._rank))

    def _rank(self, cell: Cell) -> tuple[int, ...]:
        """Its place in the order of value."""
        names = [cut.name for cut in self.chunkings]
        place, ends = names.index(cell.chunking), (self.settings.rows[0], self.settings.rows[-1])
        early = cell.rows in VALUABLE_ROWS and cell.chunk == self.longest[cell.chunking]
        if self.held_out(cell):
            return (4, place)
        if cell.crosses:
            return (3, place, int(cell.rows not in ends))
        if early:
            return (0 if place == 0 else 1, place)
        return (2, place, int(cell.rows not in ends))

    def held_out(self, cell: Cell) -> bool:
        """Whether lookups do without this cell: it shows how well they interpolate."""
        return cell.rows not in self.settings.corun_rows

    def round_due(self, visits_done: int, rounds: int) -> int:
        """How many of ``rounds`` solo rounds belong before the next visit of a pair, spread evenly over all of them."""
        return min(rounds, 1 + visits_done * rounds // (VISITS * len(self.cells)))

    def complete(self, corun: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], tuple[Chunking, ...]]:
        """What a profile can be made of: the range of rows that the whole decode was measured beside, at each
        resolution that has one, and the chunkings all of whose chunks were measured at both ends of these ranges.
        InputError while the first resolution has none."""
        ends: dict[str, tuple[int, int]] = {}
        for at in self.sizes:
            own = [cell for cell in self.cells if cell[:1] + cell[3:] == ("whole", at, at)]
            if beside := [cell.rows for cell in own if cell.key in corun and not self.held_out(cell)]:
                ends[at] = (min(beside), max(beside))
        if self.sizes[0] not in ends:
            raise InputError("Nothing can be made of this measurement yet: no step was measured beside a decode.")
        full = [
            cut
            for cut in self.chunkings
            if all(
                Cell(cut.name, chunk, rows, at, at).key in corun
                for at, of_size in ends.items()
                for chunk in range(len(cut))
                for rows in of_size
            )
        ]
        return ends, tuple(full)

    def missing(self, tables: Tables) -> dict[str, Any]:
        """What a finished measurement would have and this one lacks, for profile.yaml; empty when it is finished."""
        skipped, corun = tables.get("skipped", {}), tables.get("corun", {})
        missing: dict[str, Any] = {}
        if lacking := [cell.key for cell in self.cells if cell.key not in corun and cell.key not in skipped]:
            missing["not_measured"] = lacking
        if skipped:
            missing["not_settled"] = dict(skipped)
        ends, full = self.complete(corun)
        if left := [cut.name for cut in self.chunkings if cut not in full]:
            missing["chunkings_left_out"] = left
        if left := [at for at in self.sizes if at not in ends]:
            missing["resolutions_left_out"] = left
        again = tables.get(f"visit {VISITS}", {})
        if once := sum(cell.key in corun and cell.key not in again for cell in self.cells):
            missing["pairs_visited_less_than_twice"] = once
        return missing


def assemble(
    plan: MeasuringPlan, tables: Tables, bench: Bench, watch: GpuWatch | None, spent_s: float, out: str
) -> Profile:
    """The profile named after its folder ``out``, of the chunkings that are complete; its head says what is missing.

    Row buckets are those between the ends of what the whole decode was measured beside. Raises InputError when that
    is nothing.
    """
    settings, solo = plan.settings, tables["solo"]
    ends, chunkings = plan.complete(tables["corun"])
    faces = {at: face for at, face in zip(plan.sizes, bench.faces, strict=True) if at in ends}
    alone = {name: spread_of(columns[0]) for name, columns in solo.items()}
    overheads = {name: alone.get(f"overhead {name}", Spread(0, 0, 0, 0)) for name in OVERHEADS}
    # A launch that comes too late costs more than one that comes early: nine in ten shall be in time.
    overheads["decision_lead"] = overheads["decision_lead"]._replace(median=overheads["decision_lead"].p90)
    launches = {rows: _launch(rows, alone, plan.sizes[0]) for rows in settings.rows}

    def cells(step_at: str, chunk_at: str) -> dict[tuple[str, int], dict[int, Corun]]:
        corun: dict[tuple[str, int], dict[int, Corun]] = {}
        low, high = ends[step_at]
        names = [cut.name for cut in chunkings]
        for cell in plan.cells:
            within = low <= cell.rows <= high and cell.chunking in names
            if (cell.step_at, cell.chunk_at) == (step_at, chunk_at) and within and cell.key in tables["corun"]:
                step, chunk = (spread_of(samples) for samples in tables["corun"][cell.key])
                corun.setdefault((cell.chunking, cell.chunk), {})[cell.rows] = Corun(step, chunk, plan.held_out(cell))
        ordered = sorted(corun, key=lambda key: (names.index(key[0]), key[1]))
        return {key: dict(sorted(corun[key].items())) for key in ordered}

    def sized(at: str, face: Bench) -> Profile:
        def steps(rows: Iterable[int]) -> dict[int, Spread]:
            return {r: alone[point(f"step {r}", at)] for r in rows}

        low, high = ends[at]
        profile = Profile(
            name=Path(out).resolve().name,
            provenance="measured",
            row_buckets=tuple(rows for rows in settings.rows if low <= rows <= high),
            steps=steps(settings.rows),
            held_out_steps=steps(rows for rows in settings.held_out_step_rows if rows <= high),
            chunks={cut.name: tuple(map(spread_of, solo[point(f"chunks {cut.name}", at)])) for cut in chunkings},
            corun=cells(at, at),
            overheads=overheads,
            step_launch=launches,
        )
        found = findings(profile, [rows for rows in settings.corun_rows if low <= rows <= high])
        profile.head = _head(chunkings, face, watch, found)
        return profile

    every = [sized(at, face) for at, face in faces.items()]
    if bench.on_gpu:
        lead = with_deciding(overheads, decision_times(every[0]))
        every = [replace(one, overheads=lead) for one in every]
    profile = every[0] if len(every) == 1 else combined(every, every[0].name)
    size_of = {at: (face.model.height, face.model.width) for at, face in faces.items()}
    pairs = {(size_of[u], size_of[v]): cells(u, v) for u, v in permutations(faces, 2)}
    profile.across = {pair: found for pair, found in pairs.items() if found}
    notes = {
        **_notes(plan, tables, bench, alone),
        "command": command_line(settings, out),
        "measured_for_s": round(spent_s, 1),
        **profile.head.notes,
    }
    if profile.others:
        notes["findings"] = {pixels_of(size): one.head.notes for size, one in profile.others.items()}
    if profile.across:
        notes["across_error"] = across_error(profile)
    if missing := plan.missing(tables):
        notes["missing"] = missing
    profile.head = profile.head.model_copy(update={"notes": notes})
    return profile


def with_deciding(overheads: Mapping[str, Spread], deciding_ns: Sequence[int]) -> dict[str, Spread]:
    """``decision_lead``, so far the launch's 90th percentile, with the 90th percentile of polling and deciding."""
    launch, deciding = overheads["decision_lead"], spread_of(deciding_ns)
    ends = (launch.median + deciding.p90, launch.p10 + deciding.p10, launch.p90 + deciding.p90)
    return {**overheads, "decision_lead": Spread(*ends, launch.n)}


def _launch(rows: int, alone: Mapping[str, Spread], at: str) -> Spread:
    """What a step takes longer on an idle lane than behind another: the medians' difference, never below 0."""
    queued_ns = alone[point(f"step {rows}", at)].median
    return alone[f"overhead idle {rows}"].each(lambda value: max(0, value - queued_ns))


def _head(chunkings: Sequence[Chunking], bench: Bench, watch: GpuWatch | None, notes: dict[str, Any]) -> Head:
    model = bench.model
    return Head(
        device=device_name(bench.device.torch_device),
        driver="" if watch is None else watch.driver,
        clocks={} if watch is None else watch.summary(),
        model=model.name,
        weights=cast(Weights, model.weights),
        resolutions=((model.height, model.width),),
        dtype=cast(Dtype, str(model.dtype).removeprefix("torch.")),
        execution=model.execution.kind,
        levers=model.execution.levers,
        cuts={cut.name: cut.cuts for cut in chunkings},
        commit=code_version() or "",
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
    )


def _notes(plan: MeasuringPlan, tables: Tables, bench: Bench, alone: Mapping[str, Spread]) -> dict[str, Any]:
    """What only people read about the measurement."""
    rule, notes = bench.rule, {**host(), **software(), **kernels(bench.model.unet)}
    if not bench.on_gpu:
        notes["lanes"] = "one thread each, pinned to cores {} (denoise) and {} (decode)".format(*lane_cores())
    return {
        **notes,
        "quick": plan.settings.quick,
        "sampling": (
            f"{rule.least} to {rule.most} samples a point until the 95% interval of the median is below "
            f"{100 * rule.width:g}%; a pair of step and chunk about {rule.cap_s:g} s at most"
        ),
        "atoms_ns": {name: numbers[0] for name, numbers in tables["atoms"].items()},
        "unguided_step": _unguided_step(alone, plan.sizes[0]),
    }


def _unguided_step(alone: Mapping[str, Spread], at: str) -> dict[str, Any]:
    """A step of one-row samples against one of as many rows in guided samples, to which T(rows) refers."""
    name = next(name for name in alone if name.startswith("unguided"))
    rows, median_ns = int(name.split()[1]), alone[name].median
    ratio = round(median_ns / alone[point(f"step {rows}", at)].median, 4)
    return {"rows": rows, "median_ns": median_ns, "ratio": ratio}


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


def overlap(profile: Profile, rows: Sequence[int]) -> dict[str, dict[int, float]]:
    """1/s_u + 1/s_v of a decode, by chunking and rows; above 1 running beside pays."""
    return {
        chunking: {r: round(sum(1 / s for s in decode_slowdowns(profile, chunking, r)), 4) for r in rows}
        for chunking in profile.chunkings
    }


def kappa(profile: Profile, rows: Sequence[int]) -> dict[str, dict[int, dict[str, float]]]:
    """Slowdown with chunks / slowdown with the whole decode, per chunking, rows and side.

    Below 1 chunks contend less than a whole decode, and chunking alone raises throughput.
    """
    whole = {r: decode_slowdowns(profile, "whole", r) for r in rows}

    def ratios(chunking: str, r: int) -> dict[str, float]:
        both = zip(decode_slowdowns(profile, chunking, r), whole[r], strict=True)
        return {side: round(cut / own, 4) for side, (cut, own) in zip(("step", "chunk"), both, strict=True)}

    return {name: {r: ratios(name, r) for r in rows} for name in profile.chunkings if name != "whole"}


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


def across_error(profile: Profile) -> dict[str, Any]:
    """Measured pairs of two resolutions against what would be taken for them had they not been measured (contract:
    slowdowns across resolutions): |rule / measured - 1|, its mean and worst, and how many were clamped."""
    unknown = replace(profile, across={})
    found: dict[str, list[float]] = {"step_slowdown": [], "chunk_slowdown": []}
    clamped = 0
    for (step_size, chunk_size), by_chunk in profile.across.items():
        for (chunking, chunk), cells in by_chunk.items():
            for rows, cell in cells.items():
                s_u, s_v, how = unknown.slowdowns_beside(step_size, rows, chunking, chunk, chunk_size)
                clamped += how > 1
                found["step_slowdown"].append(s_u / cell.step.median - 1)
                found["chunk_slowdown"].append(s_v / cell.chunk.median - 1)
    return {name: _error(values) for name, values in found.items()} | {"clamped": clamped}


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


def findings(profile: Profile, rows: Sequence[int]) -> dict[str, Any]:
    """All of the above at these rows, for profile.yaml."""
    return {
        "held_out_error": held_out_error(profile),
        "dispersion": dispersion(profile),
        "overlap": overlap(profile, rows),
        "kappa": kappa(profile, rows),
    }
