"""``synerdiff run``: the run that ``simulate`` predicts, on hardware."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import progress
from synerdiff.core import InputError
from synerdiff.files import claim_folder, require_writable_folder


@options.taking(options.RunOptions)
def run(
    given: options.RunOptions,
    model: Annotated[
        str | None, typer.Option(help="digits, sd15, sdxl, a checkpoint folder or a hub name (default: the profile's).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    execution: options.ExecutionOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the profile's).")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++2m or a diffusers class (default: the model's own).")
    ] = None,
    loras: Annotated[Path | None, typer.Option(help="Folder of the LoRAs, NAME.safetensors each.")] = None,
    controlnets: Annotated[
        Path | None, typer.Option(help="Folder of the ControlNets, a folder each as diffusers saves it.")
    ] = None,
    controlnet_images: Annotated[
        Path | None, typer.Option(help="Folder of the conditioning images; unless a request names one, SEED.png.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Empty folder for the images, as PNG files that hold their parameters.")
    ] = None,
    watchdog: Annotated[
        float, typer.Option(help="Seconds after which a lane that does not come back is given up.")
    ] = 60,
) -> None:
    """Replay a trace through a policy on this machine's hardware, and write requests, work and metrics.

    Ctrl-C ends the run early: what is on a lane is finished, all is written, the rest is unfinished. Twice aborts.
    """
    if not 0 < watchdog < 1e6:
        raise InputError(f"--watchdog is {watchdog:g}; a number of seconds above 0 and below a million is needed.")
    for option, folder in (("loras", loras), ("controlnets", controlnets), ("controlnet-images", controlnet_images)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"--{option} {folder}: there is no such folder.")
    from synerdiff.experiments import hardware, run

    if hardware.served_another_rank():
        return
    spec = given.described(scheduler=scheduler)
    claim_folder(given.out, "run")
    if images is not None:
        _require_empty(images)
    prepared = run.prepare(spec)
    engine = hardware.HardwareEngine(
        device,
        model,
        dtype,
        scheduler,
        loras,
        controlnets,
        controlnet_images,
        images=images,
        watchdog_s=watchdog,
        execution=execution,
    )
    engine.require(prepared)
    with engine, stop_on_interrupt(engine.stop), progress("running", prepared.images) as on_progress:
        outcome = run.execute(prepared, engine, on_progress)
        outcome.write(given.out, given.timeline)
    facts = outcome.served.facts
    title = f"{given.out}: {given.policy} on {facts['device']}, {given.trace.name}"
    options.report(outcome, title, hardware.hardware_lines(facts))
    if engine.hung:
        print(engine.error, file=sys.stderr)
        if engine.device.startswith("cuda"):
            # The driver would wait for the kernel that never ends.
            sys.stdout.flush()
            os._exit(1)
        raise typer.Exit(1)
    if engine.error is not None:
        raise engine.error
    if engine.stop.is_set():
        unfinished = outcome.summary["unfinished_count"]
        print(f"Interrupted: {unfinished} requests are unfinished; what was finished is written.", file=sys.stderr)
        raise typer.Exit(130)
    options.require_served(outcome)


def _require_empty(folder: Path) -> None:
    require_writable_folder(folder)
    first = next(folder.iterdir(), None)
    if first is not None:
        raise InputError(f"{folder}: the folder for images holds {first.name} already; give an empty one.")


@contextmanager
def stop_on_interrupt(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, a second one interrupts at once."""
    stop = stop or threading.Event()

    def interrupted(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nStopping: what runs is finished first (Ctrl-C again aborts).", file=sys.stderr)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
