"""``synerdiff validate``: what the simulator predicts, what the hardware does, and how far they are apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import progress
from synerdiff.cli.run import stop_on_interrupt
from synerdiff.files import claim_folder

DEFAULT_POLICIES = ("dynamic", "continuous-serial", "continuous-parallel", "synerdiff-feedback")
DEFAULT_LOADS = (0.5, 0.8)


@options.taking(options.ReplayOptions)
def validate(
    given: options.ReplayOptions,
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
    execution: options.ExecutionOption = None,
    tolerance: Annotated[str | None, typer.Option(help="strict or cpu (default: cpu on a CPU, else strict).")] = None,
) -> None:
    """Profile cells and run policies in turn, simulate the same, and report every error against stated tolerances.

    Exit code 1 when a check fails, or when a prediction looked up a cell that was not measured here. Ctrl-C reports the
    repeats that are complete.
    """
    from synerdiff.validation import errors, report, session

    limits = errors.tolerance_of(tolerance or ("cpu" if device == "cpu" else "strict"))
    policies = tuple(dict.fromkeys(policy or DEFAULT_POLICIES))
    spec = given.spec(policies[0])
    loads = (*dict.fromkeys(load or DEFAULT_LOADS), *([session.SATURATION] if saturation else []))
    plan = session.ValidationPlan(spec, policies, loads, repeats)
    name = session.require(plan, model)
    claim_folder(out, "validate")
    with session.opened(plan, name, device, execution) as hardware, stop_on_interrupt() as stop:
        with progress("validating") as on_progress:
            measured = session.measure_session(plan, hardware, stop, on_progress)
        if measured.repeats == 0:
            print("Interrupted before the first repeat was complete; there is nothing to report.", file=sys.stderr)
            raise typer.Exit(130)
        with progress("validating") as on_progress:
            session.predict(measured, on_progress)
        text, passed = report.conclude(out, measured, limits, session.facts(measured, hardware))
    typer.echo(text, nl=False)
    if stop.is_set():
        print(f"Interrupted: the report is over {measured.repeats} complete repeats.", file=sys.stderr)
        raise typer.Exit(130)
    if not passed:
        raise typer.Exit(1)
