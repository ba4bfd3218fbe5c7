"""``synerdiff validate``: what the simulator predicts, what the hardware does, and how far they are apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_POLICIES = ("dynamic", "continuous-serial", "continuous-parallel", "synerdiff-feedback")
DEFAULT_LOADS = (0.5, 0.8)


def validate(
    profile: Annotated[str, typer.Option(help="Folder of a profile of this model, or the name of a shipped one.")],
    trace: Annotated[Path, typer.Option(help="Trace file (CSV or parquet); its arrivals are stretched to the loads.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"A policy; may be repeated (default: {', '.join(DEFAULT_POLICIES)})."),
    ] = None,
    load: Annotated[list[float] | None, typer.Option(help="A load; may be repeated (default: 0.5 and 0.8).")] = None,
    saturation: Annotated[bool, typer.Option(help="Also run all requests at once, for the throughput.")] = True,
    repeats: Annotated[int, typer.Option(help="Runs of every case, interleaved with profiling.")] = 7,
    model: Annotated[
        str | None, typer.Option(help="digits, sd15, sdxl, a checkpoint folder or a hub name (default: the profile's).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    tolerance: Annotated[str | None, typer.Option(help="strict or cpu (default: cpu on a CPU, else strict).")] = None,
    skip_fraction: Annotated[float, typer.Option(help="Share of a sample's steps that may skip guidance.")] = 0.0,
    skip_warmup: Annotated[int, typer.Option(help="First steps that are always guided.")] = 3,
    skip_longest_run: Annotated[int, typer.Option(help="Most skips in a row.")] = 1,
    skip_mode: Annotated[str, typer.Option(help="What a skip does: reuse or conditional.")] = "reuse",
) -> None:
    """Profile cells and run policies in turn, simulate the same, and report every error against stated tolerances.

    Exit code 1 when a tolerance is exceeded. Ctrl-C reports the repeats that are complete.
    """
    from synerdiff.cli.options import skip_budget
    from synerdiff.core import InputError
    from synerdiff.experiments import one_run
    from synerdiff.profile.folder import find_profile, load_profile
    from synerdiff.validation import session as study
    from synerdiff.validation.errors import TOLERANCES, case_errors, checks
    from synerdiff.validation.report import require_validation_folder, write_report
    from traces.native import read_trace

    chosen = tolerance or ("cpu" if device == "cpu" else "strict")
    if chosen not in TOLERANCES:
        raise InputError(f"--tolerance is '{chosen}'; allowed are {' and '.join(TOLERANCES)}.")
    limits = TOLERANCES[chosen]
    plan = study.ValidationPlan(
        tuple(dict.fromkeys(policy or DEFAULT_POLICIES)),
        (*dict.fromkeys(load or DEFAULT_LOADS), *([study.SATURATION] if saturation else [])),
        repeats,
        skip_budget(skip_fraction, skip_warmup, skip_longest_run, skip_mode),
        (1 - limits.range_factor, 1 + limits.range_factor),
    )
    measured = load_profile(find_profile(profile))
    if measured.estimated:
        raise InputError(f"profile '{measured.name}' is estimated; only a measured one can be validated.")
    require_validation_folder(out)
    requests = one_run.fitted(read_trace(trace), measured)
    name = str(model or measured.info.get("model") or "")
    if not name:
        raise InputError(f"profile '{measured.name}' does not say for which model it was made; give --model.")

    from profiler.facts import device_name, software
    from real_runner.hardware import open_hardware
    from synerdiff.cli.run import stop_on_interrupt

    with open_hardware(name, device, measured) as hardware, stop_on_interrupt() as stop:
        with _progress() as on_progress:
            session = study.measure_session(plan, measured, requests, hardware, stop, on_progress)
        if session.repeats == 0:
            print("Interrupted before the first repeat was complete; there is nothing to report.", file=sys.stderr)
            raise typer.Exit(130)
        with _progress() as on_progress:
            study.predict(session, len(hardware.decode), on_progress)
        facts = {
            "model": name,
            "device": device_name(hardware.model.device),
            "software": ", ".join(f"{key} {value}" for key, value in software().items()),
            "date": _today(),
            "trace": trace.name,
            "requests": len(requests),
            "warm_up_s": hardware.warm_up_ns / 1e9,
        }
        errors = [case_errors(session, case) for case in plan.cases]
        verdicts = [check for one in errors for check in checks(one, limits)]
        text = write_report(out, session, errors, verdicts, limits, facts)
    typer.echo(text, nl=False)
    if stop.is_set():
        print(f"Interrupted: the report is over {session.repeats} complete repeats.", file=sys.stderr)
        raise typer.Exit(130)
    if not all(check.passed for check in verdicts):
        raise typer.Exit(1)


def _today() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).strftime("%Y-%m-%d")


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the remaining time, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawing once a second keeps the bar's own thread out of the measurement.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1, transient=True) as bar:
        task = bar.add_task("validating", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
