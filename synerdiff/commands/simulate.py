"""``synerdiff simulate``: one simulated run and its records."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

RUN_FILES = ("requests.parquet", "work.parquet", "timeline.json", "summary.json")
"""What a run's folder holds; the summary comes last and marks the folder as a run's."""


def simulate(
    profile: Annotated[str, typer.Option(help="Folder of a profile, or the name of a shipped one.")],
    trace: Annotated[Path, typer.Option(help="Trace file (CSV or parquet).")],
    policy: Annotated[str, typer.Option(help="Name of a policy, or module:Class.")],
    out: Annotated[Path, typer.Option(help="Folder for the records.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, a parameter of the policy; may be repeated.")
    ] = None,
    load: Annotated[float | None, typer.Option(help="Stretch the arrivals to this load.")] = None,
    time_scale: Annotated[float | None, typer.Option(help="Multiply every arrival by this.")] = None,
    window: Annotated[str | None, typer.Option(help="A:B, seconds of the trace as written; B excluded.")] = None,
    dispersion: Annotated[
        bool, typer.Option("--dispersion", help="Draw times between the profile's p10 and p90 instead of medians.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the drawn times.")] = 0,
    decode_gpus: Annotated[str, typer.Option(help="GPU of each decode lane, separated by commas.")] = "0",
    skip_fraction: Annotated[float, typer.Option(help="Share of a sample's steps that may skip guidance.")] = 0.0,
    skip_warmup: Annotated[int, typer.Option(help="First steps that are always guided.")] = 3,
    skip_longest_run: Annotated[int, typer.Option(help="Most skips in a row.")] = 1,
    skip_mode: Annotated[str, typer.Option(help="What a skip does: reuse or conditional.")] = "reuse",
    timeline: Annotated[bool, typer.Option("--timeline", help="Also write timeline.json for Perfetto.")] = False,
) -> None:
    """Replay a trace through a policy on a profile, and write requests, work and metrics."""
    from policies.registry import policy_parameters
    from synerdiff import records
    from synerdiff.commands.texts import decode_lanes, parameter_values, skip_budget, summary_lines, window_of
    from synerdiff.core import InputError
    from synerdiff.files import atomic, require_writable_folder
    from synerdiff.profile_files import find_profile, load_profile
    from synerdiff.studies import one_run
    from synerdiff.timeline import write_timeline
    from traces.native import read_trace
    from traces.scaling import scaled

    if load is not None and time_scale is not None:
        raise InputError("--load and --time-scale exclude each other; give one of them.")
    if load is not None and not 0 < load <= 100:
        raise InputError(f"--load is {load:g}; a number above 0 and up to 100 is needed.")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}; a whole number from 0 to 2^63 - 1 is needed.")
    setup = one_run.Setup(
        policy,
        parameter_values(policy, policy_parameters(policy, Path()), settings or []),
        decode_lanes(decode_gpus),
        skip_budget(skip_fraction, skip_warmup, skip_longest_run, skip_mode),
        seed if dispersion else None,
        Path(),
    )
    span = window_of(window)
    measured = load_profile(find_profile(profile))
    _require_run_folder(out)
    require_writable_folder(out)
    requests = one_run.fitted(read_trace(trace, window=span), measured)
    scale = 1.0 if time_scale is None else time_scale
    if load is not None:
        scale = one_run.time_scale_for_load(requests, measured, load, span)
    elif span is not None or requests[-1].arrival_ns > 0:  # else all arrive at once, and no load is defined
        load = one_run.time_scale_for_load(requests, measured, scale, span)
    requests = scaled(requests, scale)

    with _progress(sum(request.images for request in requests)) as on_progress:
        result = one_run.run_simulated(requests, measured, setup, on_progress)
    request_table = records.requests_table(result.requests)
    work_table = records.work_table(result.work, result.sample_names)
    request_frame, work_frame = request_table.to_pandas(), work_table.to_pandas()
    summary = one_run.summary_of(request_frame, work_frame, requests, measured)
    described = {
        "profile": measured.name,
        "provenance": measured.provenance,
        "trace": trace.name,
        "window_s": span,
        "time_scale": scale,
        "load": load,
        "policy": policy,
        "parameters": dict(setup.parameters),
        "decode_gpus": list(setup.decode_gpus),
        "skip_fraction_allowed": skip_fraction,
        "dispersion_seed": setup.dispersion_seed,
        "decisions": result.decisions,
    }
    # All files are complete under temporary names before the first takes its place; the summary is the last.
    with ExitStack() as stack:
        text = json.dumps({"run": described, **summary}, indent=2, allow_nan=False) + "\n"
        stack.enter_context(atomic(out / "summary.json")).write_text(text, encoding="utf-8")
        if timeline:
            write_timeline(stack.enter_context(atomic(out / "timeline.json")), work_frame, request_frame)
        records.store(stack.enter_context(atomic(out / "work.parquet")), work_table)
        records.store(stack.enter_context(atomic(out / "requests.parquet")), request_table)
    if not timeline:
        (out / "timeline.json").unlink(missing_ok=True)
    typer.echo(f"{out}: {policy} on {measured.label}, {trace.name}")
    for line in summary_lines(summary, load):
        typer.echo(line)


def _require_run_folder(out: Path) -> None:
    """An earlier run's files may be replaced; a folder with anything else is left alone."""
    from synerdiff.core import InputError

    if not out.is_dir():
        return
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if name not in RUN_FILES and not name.endswith(".part")]
    if foreign:
        raise InputError(f"{out}: this folder holds {foreign[0]}, which is no file of a run; give another folder.")


@contextmanager
def _progress(samples: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on standard error while somebody watches it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=samples)
        yield lambda ended: bar.update(task, completed=ended)
