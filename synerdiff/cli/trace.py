"""``synerdiff trace``: fetch, describe, generate and convert workloads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import print_table, progress
from synerdiff.core import InputError, Request
from synerdiff.files import claim_folder
from traces.dialects import Reading, convert_trace, load_trace, read_shapes
from traces.fetch import fetch as fetch_files
from traces.fetch import published_trace
from traces.gentd26 import read_gentd26
from traces.katz import read_katz
from traces.native import require_trace_target, write_trace
from traces.spec import trace_spec

if TYPE_CHECKING:
    from traces.describe import TraceSummary

trace_app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Workloads: fetch, describe, generate and convert traces."
)

_PICTURE = "trace"
_MOST_LISTED = 6


@trace_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Which published trace: gentd26.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files (default: the trace's name).")] = None,
    base_url: Annotated[str | None, typer.Option(help="Another address of the folder that holds the files.")] = None,
) -> None:
    """Fetch a published trace from its public address and check its SHA-256."""

    published = published_trace(name)
    folder = Path(name) if out is None else out
    with progress(name) as update:
        files = fetch_files(name, folder, base_url, lambda file, done, total: update(done, total, file))
    for path, fetched in files:
        typer.echo(f"{path}: {'fetched' if fetched else 'already there'}, SHA-256 as published")
    typer.echo(f"Please cite: {published.citation}.")


@trace_app.command()
def describe(
    file: Annotated[Path, typer.Argument(help="A trace of any dialect.")],
    out: Annotated[Path | None, typer.Option(help=f"Folder for a picture, {_PICTURE}.png and .pdf.")] = None,
    map: options.Map = None,
    sort: options.Sort = False,
) -> None:
    """Show what a trace is like: load, mix, popularity and burstiness."""
    from traces.describe import describe as summarise

    if out is not None:
        claim_folder(out, "trace describe")
    with progress(f"Reading {file.name}") as update:
        conversion = load_trace(file, Reading(map or "", sort), update)
    requests = conversion.requests
    for line in conversion.lines():
        typer.echo(line)
    summary = summarise(requests)
    print_table((file.name, ""), _overview(summary))
    if summary.windows:
        typer.echo("\narrivals counted in windows")
        print_table(("window", "windows", "mean", "largest", "peak/mean", "index of dispersion"), _windows(summary))
    if summary.replay:
        typer.echo("\nworth replaying")
        for window in summary.replay:
            typer.echo(f"  --window {window.start_s}:{window.end_s}  {window.why}, {window.requests:,} requests")
    if out is not None:
        for path in _drawn(requests, summary, file.name, out):
            typer.echo(f"{path}: written")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of ``generate`` that are fields of a ``TraceSpec``."""

    requests: Annotated[int | None, typer.Option(help="How many requests; or give --duration.")] = None
    duration_s: Annotated[float | None, typer.Option("--duration", help="Seconds that the trace covers.")] = None
    rate_per_s: Annotated[
        float | None, typer.Option("--rate", help="Mean requests per second (default 1; gentd26-like: 0.013483).")
    ] = None
    min_requests: Annotated[
        int | None, typer.Option(help="mlperf: go on after --duration until there are so many.")
    ] = None
    seed: Annotated[int, typer.Option(help="Same seed, same trace.")] = 0
    mix: Annotated[
        str | None,
        typer.Option(
            help="Steps and images: gentd26, fixed, guided-20-50, unguided-4 or unguided-8 (4 or 8 steps); "
            "default gentd26, for mlperf fixed."
        ),
    ] = None
    steps: Annotated[int | None, typer.Option(help="Steps per image; with --mix fixed (default 30).")] = None
    images: Annotated[int | None, typer.Option(help="Images per request; with --mix fixed (default 1).")] = None
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale; with --mix fixed (default 7.5).")] = None
    cv: Annotated[float | None, typer.Option(help="gamma: standard deviation / mean of the gaps (default 2).")] = None
    burst_ratio: Annotated[float | None, typer.Option(help="mmpp: rate in bursts / rate outside (default 5).")] = None
    burst_share: Annotated[float | None, typer.Option(help="mmpp: share of time in bursts (default 0.2).")] = None
    burst_s: Annotated[float | None, typer.Option(help="mmpp: mean length of a burst in seconds (default 60).")] = None
    loras: Annotated[
        str | None, typer.Option(help="none or gentd26 (default: gentd26 for gentd26-like, else none).")
    ] = None


@trace_app.command()
@options.taking(GenerateOptions)
def generate(
    given: GenerateOptions,
    kind: Annotated[str, typer.Argument(help="poisson, gamma, mmpp, gentd26-like or mlperf (LoadGen's schedule).")],
    out: Annotated[Path, typer.Option(help="The trace to write (.csv).")],
    mix_file: Annotated[
        Path | None, typer.Option(help="Shapes of requests with weights, as vllm-omni's random requests (JSON).")
    ] = None,
) -> None:
    """Generate a trace with a seed."""
    from traces.generate import generate_trace

    fields = {name: value for name, value in asdict(given).items() if value is not None} | {"kind": kind}
    if mix_file is not None:
        fields["shapes"] = read_shapes(mix_file, fields.pop("steps", None))
    spec = trace_spec(fields, "trace generate")
    require_trace_target(out)
    generated = generate_trace(spec)
    write_trace(out, generated)
    typer.echo(f"{out}: {len(generated):,} requests, {_duration(generated[-1].arrival_ns / 1e9)}, seed {given.seed}")


@trace_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The foreign trace: a file, or for gentd26 the folder of its files.")],
    target: Annotated[Path, typer.Argument(help="The trace to write (.csv).")],
    format: Annotated[str, typer.Option(help="auto, gentd26 or katz.")] = "auto",
    map: options.Map = None,
    sort: options.Sort = False,
    seed: Annotated[int, typer.Option(help="auto: of where posts fall within their minute (DiffusionDB).")] = 0,
    checkpoints: Annotated[
        str, typer.Option(help="one: all checkpoints count as one model; keep: base_model names them.")
    ] = "one",
    adapters: Annotated[str, typer.Option(help="keep or drop LoRAs and ControlNets.")] = "keep",
    all_types: Annotated[
        bool, typer.Option("--all-types", help="gentd26: keep image-to-image and inpainting, as if text-to-image.")
    ] = False,
    service: Annotated[str | None, typer.Option(help="katz: only service A or B.")] = None,
    steps: Annotated[int | None, typer.Option(help="katz: steps per image, absent there (default 50).")] = None,
    images: Annotated[int | None, typer.Option(help="katz: images per request, absent there (default 1).")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="katz: guidance scale, absent there (default 7.5).")
    ] = None,
) -> None:
    """Convert a trace of any dialect into synerdiff's format, and tell how it was read, what was left out and why."""

    _one_of("--format", format, ("auto", "gentd26", "katz"))
    _one_of("--service", service or "A", ("A", "B"))
    for flag, value in (("service", service), ("steps", steps), ("images", images), ("guidance-scale", guidance_scale)):
        if format != "katz" and value is not None:
            other = f"give --map {flag.replace('-', '_')}={value} instead" if flag != "service" else "leave it out"
            raise InputError(f"--{flag} belongs to --format katz; {other}.")
    if format != "gentd26" and all_types:
        raise InputError("--all-types belongs to --format gentd26; other traces name no types.")
    for flag, is_given in (("map", map is not None), ("sort", sort), ("seed", seed != 0)):
        if format != "auto" and is_given:
            raise InputError(f"--{flag} belongs to --format auto; {format} is read without it.")
    for flag, value, default in (("checkpoints", checkpoints, "one"), ("adapters", adapters, "keep")):
        if format == "auto" and value != default:
            raise InputError(f"--{flag} belongs to --format gentd26 and katz; say with --map what is read.")
    require_trace_target(target)
    with progress(f"Reading {source.name}") as update:
        if format == "auto":
            conversion = convert_trace(source, Reading(map or "", sort, seed), update)
        elif format == "gentd26":
            conversion = read_gentd26(
                source, checkpoints=checkpoints, adapters=adapters, all_types=all_types, progress=update
            )
        else:
            conversion = read_katz(
                source,
                service=service,
                steps=50 if steps is None else steps,
                images=1 if images is None else images,
                guidance_scale=7.5 if guidance_scale is None else guidance_scale,
                checkpoints=checkpoints,
                adapters=adapters,
                progress=update,
            )
    write_trace(target, conversion.requests)
    typer.echo(f"{source}: {conversion.rows:,} rows")
    for line in conversion.lines():
        typer.echo(line)
    typer.echo(f"{target}: {len(conversion.requests):,} requests")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{flag} is {value!r}; allowed are {' and '.join(allowed)}.")


def _drawn(requests: Sequence[Request], summary: TraceSummary, name: str, out: Path) -> list[Path]:
    from synerdiff.figures import style, workload

    figure = workload.trace_picture(requests, summary, title=f"{name}: {summary.requests:,} requests")
    return style.save(figure, out, _PICTURE)


def _overview(summary: TraceSummary) -> list[tuple[str, str]]:
    rate, cv = summary.rate_per_s, summary.gap_cv
    rows = [
        ("requests", f"{summary.requests:,}"),
        ("span", _duration(summary.span_s)),
        ("rate", "undefined" if rate is None else f"{rate:.6g} requests/s ({rate * 3600:.4g}/h)"),
        ("gap CV", "undefined" if cv is None else f"{cv:.3f} (Poisson 1)"),
        ("samples", f"{summary.samples:,}"),
        ("sample-steps", f"{summary.sample_steps:,}"),
        ("steps", _listed(summary.steps)),
        ("images", _listed(summary.images)),
        ("guidance scale", f"{_listed(summary.guidance_scale)} (guided {summary.guided_share:.1%})"),
        ("resolutions", _listed(summary.resolutions)),
        ("prompts", f"{summary.prompts:,}" if summary.prompts else "none"),
        ("duplicates", f"{summary.duplicates:,} equal another request of their instant"),
        ("longest gaps", ", ".join(f"{_duration(gap)} from {at:.6g} s" for gap, at in summary.gaps_s) or "none"),
    ]
    for what, counts, used in (
        ("LoRAs", summary.loras_per_request, summary.loras),
        ("ControlNets", summary.controlnets_per_request, summary.controlnets),
    ):
        if used.draws:
            tops = ", ".join(f"top {rank} {share:.1%}" for rank, share in used.top_share.items())
            rows += [(f"{what} per request", _listed(counts)), (f"{what} used", f"{used.distinct} distinct: {tops}")]
        else:
            rows.append((what, "none"))
    return [*rows, ("base models", str(summary.base_models.distinct))]


def _windows(summary: TraceSummary) -> list[tuple[str, ...]]:
    return [
        (
            _duration(counts.window_s),
            f"{counts.windows:,}",
            f"{counts.mean:.4g}",
            f"{counts.largest:,}",
            f"{counts.peak_to_mean:.1f}",
            f"{counts.index_of_dispersion:.3f}",
        )
        for counts in summary.windows
    ]


def _listed(shares: dict[int, float] | dict[float, float] | dict[str, float]) -> str:
    entries = [
        f"{value if isinstance(value, str) else f'{value:g}'}: {share:.1%}"
        for value, share in list(shares.items())[:_MOST_LISTED]
    ]
    more = len(shares) - len(entries)
    return ", ".join(entries) + (f" and {more} more" if more > 0 else "")


def _duration(seconds: float) -> str:
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.4g} {unit}"
    return f"{seconds:.4g} s"
