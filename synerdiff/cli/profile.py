"""``synerdiff profile``: measure a model on a device, or import what others measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from profiler.settings import make_settings
from synerdiff.cli import options
from synerdiff.cli.progress import progress
from synerdiff.core import NS_PER_S, InputError
from synerdiff.files import claim_folder
from synerdiff.profile.adapters import QUANTITIES, write_adapters
from synerdiff.profile.batching import band_meaning, batch_points, best_point, sentence
from synerdiff.profile.folder import combined, find_profile, load_profile, write_profile
from synerdiff.profile.tables import Profile, pixels_of

profile_app = typer.Typer(add_completion=False, rich_markup_mode=None)
import_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Import what others measured.")
profile_app.add_typer(import_app, name="import")

WarmUp = Annotated[int, typer.Option(min=0, max=1000, help="First steps to leave out.")]
Guided = Annotated[bool, typer.Option("--guided/--unguided", help="Whether an image takes two rows of a step.")]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of every import."""

    out: Annotated[Path, typer.Option(help="Folder for the profile, which is named after it.")]
    guided: Guided = True
    estimate: Annotated[
        str | None,
        typer.Option(help="Card whose estimate fills what is missing, marked: slowdowns, chunks, h100, l40s, ..."),
    ] = None
    contention: Annotated[
        str | None, typer.Option(help="With --estimate: low, mid (default), high or a number from 0 to 3.")
    ] = None
    source: Annotated[str, typer.Option(help="Who published the numbers, and where; kept in profile.yaml.")] = ""

    @property
    def name(self) -> str:
        """Of the profile."""
        return self.out.resolve().name


@profile_app.callback(invoke_without_command=True)
def profile(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="digits, sd15, sdxl, tiny-sd, tiny-sdxl, a checkpoint folder or a hub name.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the profile: new, empty, or of an interrupted measurement.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU).")
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(help="Pixels: a side or HEIGHTxWIDTH; several separated by commas (default: the model's own)."),
    ] = None,
    across: Annotated[
        bool, typer.Option("--across", help="With several resolutions: measure pairs of two of them as well.")
    ] = False,
    rows: Annotated[
        str | None, typer.Option(help="Row buckets, rising, for example 1,2,4,8 (default: 10 from 1 to 32).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows, chunks and samples: a first look.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.05, help="Stop in time: the most valuable cells first, and profile.yaml names the rest."),
    ] = None,
    execution: options.ExecutionOption = None,
    levers: Annotated[
        str | None,
        typer.Option(help="Kernels to replace, not the execution's own: channels-last,qkv; +float8 adds to its own."),
    ] = None,
    adapters: Annotated[
        bool,
        typer.Option("--adapters", help="Measure adapters.csv of the finished profile in --out: LoRAs, ControlNets."),
    ] = False,
) -> None:
    """Measure steps, decode chunks, their slowdowns together and overheads; or import what others measured.

    An unfinished measurement goes on where it stopped when the same command is given again.
    """
    if context.invoked_subcommand is not None:
        return
    if not model or out is None:
        absent = "out" if model else "model"
        raise InputError(f"--{absent} is missing; give --model and --out, or synerdiff profile import.")
    if adapters:
        _adapters(model, out, device, quick)
        return
    settings = make_settings(model, device, dtype, resolution, rows, quick, execution, levers, across)
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


@profile_app.command()
def combine(
    folders: Annotated[list[str], typer.Argument(help="Profiles of one model on one device, a resolution each.")],
    out: Annotated[Path, typer.Option(help="Folder for the profile of all, which is named after it.")],
) -> None:
    """Make one profile of several resolutions: the first is what a request without one gets; overheads are its own.

    Example: synerdiff profile combine p512 p1024 --out both
    """
    if len(folders) < 2:
        raise InputError("profile combine: at least two profiles are needed.")
    whole = combined([load_profile(find_profile(folder)) for folder in folders], out.resolve().name)
    claim_folder(out, "profile combine")
    write_profile(out, whole)
    sizes = ", ".join(map(pixels_of, whole.head.resolutions))
    typer.echo(f"{out}: {whole.name}, {whole.provenance}, resolutions {sizes}")


@profile_app.command()
def batching(
    folder: Annotated[str, typer.Argument(metavar="PROFILE", help="Its folder, or the name of one that ships.")],
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps of an image.")] = 30,
    guided: Guided = True,
    slo: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="Seconds from an image's admission to its end, at most.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figure.")] = Path("batching"),
) -> None:
    """Does batching pay, and which size? Images a second and latency by batch, at each resolution of a profile.

    Example: synerdiff profile batching h200-sdxl-estimated --steps 30 --slo 5
    """
    from synerdiff.figures import profile as pictures

    of = load_profile(find_profile(folder))
    points = batch_points(of, steps, guided)
    if not points:
        raise InputError(f"profile '{of.name}' knows no step of two rows, which a guided image takes; try --unguided.")
    claim_folder(out, "profile batching")
    sizes = list(dict.fromkeys(point.resolution for point in points))
    by_size = [[point for point in points if point.resolution == at] for at in sizes]
    for own in by_size:
        typer.echo(sentence(own, slo))
    typer.echo("  resolution   batch  images/s (band)            gain  s an image")
    for own in by_size:
        best = best_point(own, slo)
        for point in own:
            rate = f"{point.images_per_s:.4g} ({point.low:.4g} to {point.high:.4g})"
            gain = point.images_per_s / own[0].images_per_s
            chosen = "  *" if point is best else ""
            typer.echo(
                f"  {point.resolution:<11}  {point.batch:>5}  {rate:<25}  {gain:.2f}  {point.latency_s:.4g}{chosen}"
            )
    kind = "guided" if guided else "unguided"
    facts = f"continuous-serial at full batches, {steps} {kind} steps. Band: {band_meaning(of)}."
    typer.echo(f"  {facts}")
    caption = f"{facts} Filled: the smallest batch with 95% of the most images/s that the limit permits."
    caption += "" if slo is None else " Red: the limit."
    for path in pictures.save_batching(points, slo, of, caption, out):
        typer.echo(f"{path}: written")


@import_app.command()
@options.taking(ImportOptions)
def throughput(
    given: ImportOptions,
    images_per_s: Annotated[float, typer.Option(help="Of the whole machine, at full batches and saturated.")],
    gpus: Annotated[int, typer.Option(help="Of that machine.")],
    batch: Annotated[int, typer.Option(help="Images of a batch on one GPU.")],
    steps: Annotated[int, typer.Option(help="Denoising steps of an image.")],
    model: Annotated[str, typer.Option(help="sd15 or sdxl.")] = "sdxl",
    decode_ms: Annotated[
        float, typer.Option(help="One image's decode, where it is known; else all of the time is in the steps.")
    ] = 0.0,
    gpu: Annotated[str, typer.Option(help="Card whose estimated T(rows) gives smaller batches their share.")] = "h100",
) -> None:
    """One GPU's profile from a machine's saturated throughput, such as MLPerf's Offline result.

    Example: synerdiff profile import throughput --images-per-s 16.35 --gpus 8 --batch 8 --steps 20 --out h100x8
    """
    from profiler import imported

    of = imported.Throughput(images_per_s, gpus, batch, steps, given.guided, model, decode_ms, gpu, given.estimate)
    _write_imported(imported.throughput_profile(of, given.name, given.source), given)


@import_app.command()
@options.taking(ImportOptions)
def table(
    given: ImportOptions,
    file: Annotated[Path, typer.Argument(help="CSV: kind (step, decode, encode), milliseconds, rows or batch.")],
    model: Annotated[str, typer.Option(help="Its name, for people.")] = "",
    resolution: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH; which one, where the column resolution has several.")
    ] = None,
) -> None:
    """A profile from a table of times: kind (step, decode, encode), milliseconds, rows or batch, and resolution.

    Example: synerdiff profile import table times.csv --model sdxl --source "our own bench" --out imported
    """
    from profiler import imported

    found = imported.table_profile(file, given.name, given.source, model, resolution, given.guided)
    _write_imported(found, given)


@import_app.command()
@options.taking(ImportOptions)
def sglang(
    given: ImportOptions,
    files: Annotated[list[Path], typer.Argument(help="Dumps of --perf-dump-path.")],
    batch: Annotated[str, typer.Option(help="Images of a batch, which dumps do not name: one number, or one a file.")],
    resolution: Annotated[str, typer.Option(help="HEIGHTxWIDTH, which dumps do not name.")],
    model: Annotated[str, typer.Option(help="Its name; sd15 or sdxl for --estimate.")] = "",
    warm_up: WarmUp = 1,
) -> None:
    """A profile from SGLang's performance dumps: steps, decode and text encoding.

    Example: synerdiff profile import sglang b1.json b4.json --batch 1,4 --resolution 1024x1024 --out mine
    """
    from profiler import engine_logs as logs

    size = logs.size_of(resolution)
    times = logs.sglang_times(files, logs.batches_of(batch, len(files)), given.guided, warm_up)
    _write_imported(logs.engine_profile(times, given.name, given.source or "SGLang", model, size), given)


@import_app.command("vllm-omni")
@options.taking(ImportOptions)
def vllm_omni(
    given: ImportOptions,
    files: Annotated[list[Path], typer.Argument(help="Logs with lines of [DiffusionBatchProfiler].")],
    resolution: Annotated[str, typer.Option(help="HEIGHTxWIDTH: which of the logged batches count.")],
    unit: Annotated[
        str | None, typer.Option(help="s, ms, us or ns: of times that the lines give without a unit.")
    ] = None,
    model: Annotated[str, typer.Option(help="Its name; sd15 or sdxl for --estimate.")] = "",
    warm_up: WarmUp = 1,
) -> None:
    """A profile from the lines of vllm-omni's batching profiler: steps alone.

    Example: synerdiff profile import vllm-omni server.log --unit ms --resolution 1024x1024 --model sdxl --out mine
    """
    from profiler import engine_logs as logs

    if unit is not None and unit not in logs.UNITS_NS:
        raise InputError(f"--unit is {unit!r}; allowed are {', '.join(logs.UNITS_NS)}.")
    size = logs.size_of(resolution)
    times = logs.vllm_omni_times(files, size, unit, given.guided, warm_up)
    _write_imported(logs.engine_profile(times, given.name, given.source or "vllm-omni", model, size), given)


def _write_imported(found: Profile, given: ImportOptions) -> None:
    """With what is missing estimated where that is asked for, and with what is to be known about it."""
    out = given.out
    if given.estimate is not None:
        from profiler.engine_logs import filled

        found = filled(found, given.estimate, "mid" if given.contention is None else given.contention)
    elif given.contention is not None:
        raise InputError("--contention is that of --estimate, which is missing; give both or neither.")
    for fact in found.head.notes.get("said", ()):
        typer.echo(f"  {fact}")
    claim_folder(out, "profile import")
    write_profile(out, found)
    for line in _times(found):
        typer.echo(line)
    if found.corun:
        for cell, origin in found.head.notes["cells"].items():
            typer.echo(f"  {cell}: {origin}")
        typer.echo(f"{out}: {found.label}, imported; figures name it so.")
        return
    typer.echo(f"{out}: {found.name} (imported). It has no co-run slowdowns, so its policies decode by themselves:")
    typer.echo("static, dynamic, continuous-serial.")


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
    for what in ("chunkings", "resolutions"):
        if left_out := missing.get(f"{what}_left_out"):
            parts.append(f"without the {what} {', '.join(left_out)}")
    if once := missing.get("pairs_visited_less_than_twice"):
        parts.append(f"{once} pairs visited only once")
    return ", ".join(parts)


_LACKS = {"not_measured": "not measured", "not_settled": "not settled"}


def _times(profile: Profile) -> list[str]:
    """Its tables of times."""
    ms = NS_PER_S / 1000
    lines = []
    for one in (profile, *profile.others.values()):
        lines += [f"  at {pixels_of(one.head.resolutions[0])}"] if profile.others else []
        times = "  ".join(f"{rows}: {spread.median / ms:.2f}" for rows, spread in one.steps.items())
        decodes = "  ".join(f"{name}: {one.decode_ns(name) / ms:.2f}" for name in one.chunkings)
        lines += [f"  step, ms by rows   {times}", f"  decode, ms         {decodes}"]
    overheads = "  ".join(f"{name}: {profile.overhead_ns(name) / ms:.3f}" for name in profile.overheads)
    launches = "  ".join(f"{rows}: {spread.median / ms:.3f}" for rows, spread in profile.step_launch.items())
    return [*lines, f"  overheads, ms      {overheads or 0}", f"  idle launch, ms    {launches or 0}"]


def report(measured: Profile) -> list[str]:
    """What a measurement found, in a few lines."""
    notes = measured.head.notes
    found = {f" at {size}": of_size for size, of_size in notes.get("findings", {}).items()}
    found = {f" at {pixels_of(measured.head.resolutions[0])}" if found else "": notes, **found}
    lines = _times(measured)
    for at, of_size in found.items():
        lines.append(f"  1/s_u + 1/s_v of a decode by rows{at} (above 1, running it beside steps pays)")
        for name, by_rows in of_size["overlap"].items():
            lines.append(f"    {name:<16} " + "  ".join(f"{rows}: {value:.2f}" for rows, value in by_rows.items()))
        lines.append(f"  kappa, slowdown with chunks / with the whole decode{at}, by rows: step side, chunk side")
        for name, by_row in of_size["kappa"].items():
            pairs = "  ".join(f"{rows}: {pair['step']:.2f} {pair['chunk']:.2f}" for rows, pair in by_row.items())
            lines.append(f"    {name:<16} {pairs}")
        errors = _errors(of_size["held_out_error"])
        lines.append(f"  lookups against held-out cells{at}: {errors or 'no cell was held out'}")
    if across := notes.get("across_error"):
        errors = _errors({name: error for name, error in across.items() if name != "clamped"})
        lines.append(
            f"  pairs across resolutions by solo time, had they not been measured: {errors}; {across['clamped']} of"
        )
        lines[-1] += f" {across['step_slowdown']['cells']} beyond the range"
    return lines


def _errors(by_name: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {100 * error['mean']:.1f}% (worst {100 * error['worst']:.1f}%, "
        f"{error['cells']} cells)"
        for name, error in by_name.items()
    )
