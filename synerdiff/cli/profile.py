"""``synerdiff profile``: measure a model on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from profiler.settings import make_settings
from synerdiff.cli.progress import progress
from synerdiff.core import NS_PER_S, InputError
from synerdiff.profile.adapters import QUANTITIES, write_adapters
from synerdiff.profile.folder import load_profile
from synerdiff.profile.tables import Profile


def profile(
    model: Annotated[
        str, typer.Option(help="digits, sd15, sdxl, tiny-sd, tiny-sdxl, a checkpoint folder or a hub name.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the profile: new, empty, or of an interrupted measurement.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU).")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Pixels: one side or HEIGHTxWIDTH (default: the model's own).")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Row buckets, rising, for example 1,2,4,8 (default: 10 from 1 to 32).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows, chunks and samples: a first look.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.05, help="Stop in time: the most valuable cells first, and profile.yaml names the rest."),
    ] = None,
    adapters: Annotated[
        bool,
        typer.Option("--adapters", help="Measure adapters.csv of the finished profile in --out: LoRAs, ControlNets."),
    ] = False,
) -> None:
    """Measure steps, decode chunks, both sides' slowdowns when they run together, and overheads.

    An unfinished measurement goes on where it stopped when the same command is given again.
    """
    if adapters:
        _adapters(model, out, device, quick)
        return
    settings = make_settings(model, device, dtype, resolution, rows, quick)
    from profiler import measure

    try:
        with progress("loading") as on_progress:
            measured = measure.measure_profile(
                settings, out, on_progress, minutes=minutes, say=lambda line: typer.echo(line, err=True)
            )
    except KeyboardInterrupt:
        typer.echo(f"{out}: what was measured is kept; the same command goes on from there.", err=True)
        raise
    for line in report(measured):
        typer.echo(line)
    measure.draw_profile(measured, out)
    spent_s = measured.head.notes["measured_for_s"]
    typer.echo(f"{out}: tables, profile.yaml and the picture profile.png, measured in {spent_s:.0f} s")
    if missing := measured.head.notes.get("missing"):
        typer.echo(f"{out}: {lacks(missing)}; the same command goes on from there.")


def _adapters(model: str, out: Path, device: str, quick: bool) -> None:
    """Add adapters.csv to a finished profile of this model."""
    from profiler.adapter_cells import measure_adapters, rows_line

    measured = load_profile(out)
    if measured.head.model != model:
        raise InputError(f"{out}: this profile was made for the model {measured.head.model}, not for {model}.")
    with progress("loading") as on_progress:
        found = measure_adapters(measured, device, quick, on_progress)
    write_adapters(out, found)
    timed = [name for name, (at, unit, _) in QUANTITIES.items() if unit == "ns" and at != "constant"]
    typer.echo("  medians, ms by bytes or rows")
    for line in rows_line(found, timed):
        typer.echo(line)
    link = "not measured, and no service: that needs a second GPU"
    if "link_latency" in found.tables:
        gb_per_s, latency_us = found.constant("link_bytes_per_s") / 1e9, found.constant("link_latency") / 1000
        link = f"{gb_per_s:.3g} GB/s after {latency_us:.0f} us"
    typer.echo(f"  {'link':<26}{link}")
    typer.echo(f"{out}: adapters.csv")


def lacks(missing: dict[str, Any]) -> str:
    """What an unfinished measurement lacks, in one line; profile.yaml lists it."""
    parts = [f"{len(missing[name])} pairs {words}" for name, words in _LACKS.items() if name in missing]
    if left_out := missing.get("chunkings_left_out"):
        parts.append(f"without the chunkings {', '.join(left_out)}")
    if once := missing.get("pairs_visited_less_than_twice"):
        parts.append(f"{once} pairs visited only once")
    return ", ".join(parts)


_LACKS = {"not_measured": "not measured", "not_settled": "not settled"}


def report(measured: Profile) -> list[str]:
    """What a measurement found, in a few lines."""
    notes, ms = measured.head.notes, NS_PER_S / 1000
    times = "  ".join(f"{rows}: {spread.median / ms:.2f}" for rows, spread in measured.steps.items())
    decodes = "  ".join(f"{name}: {measured.decode_ns(name) / ms:.2f}" for name in measured.chunkings)
    overheads = "  ".join(f"{name}: {measured.overhead_ns(name) / ms:.3f}" for name in measured.overheads)
    launches = "  ".join(f"{rows}: {spread.median / ms:.3f}" for rows, spread in measured.step_launch.items())
    lines = [
        f"  step, ms by rows   {times}",
        f"  decode, ms         {decodes}",
        f"  overheads, ms      {overheads}",
        f"  idle launch, ms    {launches}",
        "  1/s_u + 1/s_v of a decode by rows (above 1, running it beside steps pays)",
    ]
    for name, by_rows in notes["overlap"].items():
        lines.append(f"    {name:<16} " + "  ".join(f"{rows}: {value:.2f}" for rows, value in by_rows.items()))
    lines.append("  kappa, slowdown with chunks / with the whole decode, by rows: step side, chunk side")
    for name, by_row in notes["kappa"].items():
        pairs = "  ".join(f"{rows}: {pair['step']:.2f} {pair['chunk']:.2f}" for rows, pair in by_row.items())
        lines.append(f"    {name:<16} {pairs}")
    errors = ", ".join(
        f"{name.replace('_', ' ')} {100 * error['mean']:.1f}% (worst {100 * error['worst']:.1f}%, "
        f"{error['cells']} cells)"
        for name, error in notes["held_out_error"].items()
    )
    lines.append(f"  lookups against held-out cells: {errors or 'no cell was held out'}")
    return lines
