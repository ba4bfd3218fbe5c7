"""From kept samples to a profile: tables, where they come from, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from profiler.bench import Bench, lane_cores
from profiler.facts import GpuWatch, code_version, device_name, host, software
from profiler.findings import findings
from profiler.plan import Plan
from profiler.sampling import spread_of
from profiler.settings import command_line
from synerdiff.profile.tables import OVERHEADS, Corun, Head, Profile, Spread, Weights

Tables = Mapping[str, Mapping[str, Any]]
"""``atoms``: name -> spread; ``solo``: point -> columns of samples; ``corun``: cell -> samples of step and chunk."""


def assemble(plan: Plan, tables: Tables, bench: Bench, watch: GpuWatch | None, spent_s: float, out: str) -> Profile:
    """The profile named after its folder ``out``. Every point of the plan must be there."""
    settings, solo = plan.settings, tables["solo"]
    corun: dict[tuple[str, int], dict[int, Corun]] = {}
    for cell in plan.cells:
        step, chunk = (spread_of(samples) for samples in tables["corun"][cell.key])
        corun.setdefault((cell.chunking, cell.chunk), {})[cell.rows] = Corun(step, chunk, plan.held_out(cell))
    profile = Profile(
        name=Path(out).resolve().name,
        provenance="measured",
        row_buckets=settings.rows,
        steps={rows: spread_of(solo[f"step {rows}"][0]) for rows in settings.rows},
        held_out_steps={rows: spread_of(solo[f"step {rows}"][0]) for rows in settings.held_out_step_rows},
        chunks={cut.name: tuple(map(spread_of, solo[f"chunks {cut.name}"])) for cut in plan.chunkings},
        corun=corun,
        overheads={name: _overhead(name, solo) for name in OVERHEADS},
    )
    notes = {
        **_notes(plan, tables, bench),
        "command": command_line(settings, out),
        "measured_for_s": round(spent_s, 1),
        **findings(profile, settings.corun_rows),
    }
    profile.head = _head(plan, bench, watch, notes)
    return profile


def _overhead(name: str, solo: Mapping[str, Any]) -> Spread:
    if f"overhead {name}" not in solo:
        return Spread(0, 0, 0, 0)
    found = spread_of(solo[f"overhead {name}"][0])
    # A launch that comes too late costs more than one that comes early: nine in ten shall be in time.
    return Spread(found.p90, found.p10, found.p90, found.n) if name == "decision_lead" else found


def _head(plan: Plan, bench: Bench, watch: GpuWatch | None, notes: dict[str, Any]) -> Head:
    model = bench.model
    return Head(
        device=device_name(bench.device.torch_device),
        driver="" if watch is None else watch.driver,
        clocks={} if watch is None else watch.summary(),
        model=model.name,
        weights=cast(Weights, model.weights),
        resolutions=((model.height, model.width),),
        dtype=str(model.dtype).removeprefix("torch."),
        execution="CUDA graphs" if bench.on_gpu else "eager, rows padded to a bucket",
        cuts={cut.name: cut.cuts for cut in plan.chunkings},
        commit=code_version() or "",
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
    )


def _notes(plan: Plan, tables: Tables, bench: Bench) -> dict[str, Any]:
    """What only people read about the measurement."""
    rule, notes = bench.rule, {**host(), **software()}
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
        "unguided_step": _unguided_step(tables["solo"]),
    }


def _unguided_step(solo: Mapping[str, Any]) -> dict[str, Any]:
    """A step of one-row samples against one of as many rows in guided samples, to which T(rows) refers."""
    name = next(name for name in solo if name.startswith("unguided"))
    rows = int(name.split()[1])
    median_ns = spread_of(solo[name][0]).median
    return {
        "rows": rows,
        "median_ns": median_ns,
        "ratio": round(median_ns / spread_of(solo[f"step {rows}"][0]).median, 4),
    }
