"""``synerdiff run``: the run that ``simulate`` predicts, on hardware."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from real_runner.engine import RealRun
    from real_runner.hardware import Hardware
    from synerdiff.config.cluster import Cluster


def run(
    profile: Annotated[str, typer.Option(help="Folder of a profile of this model, or the name of a shipped one.")],
    trace: Annotated[Path, typer.Option(help="Trace file (CSV or parquet).")],
    policy: Annotated[str, typer.Option(help="Name of a policy, or module:Class.")],
    out: Annotated[Path, typer.Option(help="Folder for the records.")],
    model: Annotated[
        str | None, typer.Option(help="digits, sd15, sdxl, a checkpoint folder or a hub name (default: the profile's).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, a parameter of the policy; may be repeated.")
    ] = None,
    load: Annotated[float | None, typer.Option(help="Stretch the arrivals to this load.")] = None,
    time_scale: Annotated[float | None, typer.Option(help="Multiply every arrival by this.")] = None,
    window: Annotated[str | None, typer.Option(help="A:B, seconds of the trace as written; B excluded.")] = None,
    decode_gpus: Annotated[str, typer.Option(help="One 0 for each decode lane, separated by commas.")] = "0",
    skip_fraction: Annotated[float, typer.Option(help="Share of a sample's steps that may skip guidance.")] = 0.0,
    skip_warmup: Annotated[int, typer.Option(help="First steps that are always guided.")] = 3,
    skip_longest_run: Annotated[int, typer.Option(help="Most skips in a row.")] = 1,
    skip_mode: Annotated[str, typer.Option(help="What a skip does: reuse or conditional.")] = "reuse",
    min_ssim: Annotated[
        float | None,
        typer.Option(
            help="Floor on image fidelity instead: the cheapest skipping whose mean SSIM stays above it, by the "
            "fidelity table."
        ),
    ] = None,
    fidelity: Annotated[
        Path | None,
        typer.Option(help="Folder of the fidelity table (default: beside the profile, else the one of its model)."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the profile's).")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++2m or a diffusers class (default: the model's own).")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="Cluster file (YAML) with one worker: how LoRAs, ControlNets and guidance are served."),
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
    timeline: Annotated[bool, typer.Option("--timeline", help="Also write timeline.json for Perfetto.")] = False,
) -> None:
    """Replay a trace through a policy on this machine's hardware, and write requests, work and metrics.

    Ctrl-C ends the run early: what is on a lane is finished, all is written, the rest is unfinished. Twice aborts.
    """
    from policies.registry import build_policy, policy_parameters
    from synerdiff.cli.options import decode_lanes, floor_choice, parameter_values, skip_budget, window_of
    from synerdiff.core import PPM, InputError
    from synerdiff.experiments import one_run
    from synerdiff.profile.folder import find_profile, load_profile
    from synerdiff.results.folder import progress_bar, require_run_folder
    from traces.native import read_trace

    if int(os.environ.get("RANK", "0")) and "TORCHELASTIC_RUN_ID" in os.environ:
        from real_runner.adapters.crew import serve_under_torchrun

        serve_under_torchrun()
        return
    if not 0 < watchdog < 1e6:
        raise InputError(f"--watchdog is {watchdog:g}; a number of seconds above 0 and below a million is needed.")
    setup = one_run.Setup(
        policy,
        parameter_values(policy, policy_parameters(policy, Path()), settings or []),
        decode_lanes(decode_gpus),
        skip_budget(skip_fraction, skip_warmup, skip_longest_run, skip_mode),
        base_folder=Path(),
    )
    if set(setup.decode_gpus) != {0}:
        raise InputError(f"--decode-gpus {decode_gpus}: a run uses one GPU, so every decode lane is on GPU 0.")
    span = window_of(window)
    profile_folder = find_profile(profile)
    measured = load_profile(profile_folder)
    require_run_folder(out)
    if images is not None:
        _require_empty(images)
    requests = one_run.fitted(read_trace(trace, window=span), measured)
    floor = floor_choice(min_ssim, fidelity, setup.budget, requests, measured, profile_folder, scheduler)
    if floor is not None:
        setup = replace(setup, budget=floor.budget)
    requests, scale, load = one_run.at_load(requests, measured, load, time_scale, span)
    chosen = model or measured.info.get("model")
    if chosen is None:
        raise InputError(f"profile '{measured.name}' does not say for which model it was made; give --model.")

    from real_runner.adapters.opening import open_serving
    from real_runner.adapters.serving import Folders
    from real_runner.engine import run_real
    from real_runner.hardware import open_hardware
    from real_runner.pictures import PictureFolder

    folders = Folders(loras, controlnets, controlnet_images)
    layout = _layout(cluster, decode_gpus)
    lanes = len(layout.workers[0].lanes)
    if device == "cuda":
        device = f"cuda:{layout.workers[0].denoise_gpu}"
    with (
        open_hardware(str(chosen), device, measured, decode_lanes=lanes, dtype=dtype, scheduler=scheduler) as hardware,
        ExitStack() as stack,
    ):
        serving = None
        if cluster is not None or any(request.loras or request.controlnets for request in requests):
            serving = stack.enter_context(open_serving(hardware, layout, requests, folders, min(30.0, watchdog / 4)))
        on_image = None
        if images is not None:
            shared = {"software": "synerdiff", "model": str(chosen), "policy": policy}
            on_image = stack.enter_context(
                PictureFolder(images, shared | {"scheduler": hardware.model.solver.scheduler_name})
            ).put
        stop = stack.enter_context(stop_on_interrupt())
        count = sum(request.images for request in requests)
        on_progress = stack.enter_context(progress_bar("running", count))
        found = run_real(
            requests,
            build_policy(policy, dict(setup.parameters), Path()),
            measured,
            hardware,
            budget=setup.budget,
            stop=stop,
            on_progress=on_progress,
            on_image=on_image,
            watchdog_s=watchdog,
            serving=serving,
        )
        described = {
            "profile": measured.name,
            "provenance": measured.provenance,
            "trace": trace.name,
            "window_s": span,
            "time_scale": scale,
            "load": load,
            "policy": policy,
            "parameters": dict(setup.parameters),
            "decode_gpus": list(layout.workers[0].lanes),
            "cluster": None if serving is None else layout.model_dump(mode="json"),
            "skip_fraction_allowed": setup.budget.fraction_ppm / PPM,
            "min_ssim": min_ssim,
            "decisions": found.result.decisions,
            **_hardware(hardware, found),
        }
        from synerdiff.cli.options import summary_lines
        from synerdiff.results import records
        from synerdiff.results.folder import write_run

        tables = (
            records.requests_table(found.result.requests),
            records.work_table(found.result.work, found.result.sample_names),
        )
        frames = (tables[0].to_pandas(), tables[1].to_pandas())
        summary = one_run.summary_of(*frames, requests, measured)
        write_run(out, tables, frames, {"run": described, **summary}, timeline)
    typer.echo(f"{out}: {policy} on {described['device']}, {trace.name}")
    for line in [*(floor.lines() if floor is not None else ()), *summary_lines(summary, load), *_lines(described)]:
        typer.echo(line)
    _leave(found, stop.is_set(), summary["unfinished_count"], hardware)


def _layout(cluster: Path | None, decode_gpus: str) -> Cluster:
    """The cluster's one worker; without a file a worker that does everything itself."""
    from synerdiff.cli.options import decode_lanes
    from synerdiff.config.cluster import cluster_of, load_cluster
    from synerdiff.core import InputError

    if cluster is None:
        return cluster_of({"workers": [{"denoise_gpu": 0, "decode_gpus": list(decode_lanes(decode_gpus))}]})
    if decode_gpus != "0":
        raise InputError("--decode-gpus excludes --cluster, whose worker lists its decode_gpus.")
    return load_cluster(cluster)


def _leave(found: RealRun, stopped: bool, unfinished: int, hardware: Hardware) -> None:
    """End with the run's own error or exit code, now that everything is written."""
    from real_runner.faults import LaneHung

    if isinstance(found.error, LaneHung):
        print(found.error, file=sys.stderr)
        if hardware.model.device.type == "cuda":
            # The driver would wait for the kernel that never ends.
            sys.stdout.flush()
            os._exit(1)
        raise typer.Exit(1)
    if found.error is not None:
        raise found.error
    if stopped:
        print(f"Interrupted: {unfinished} requests are unfinished; what was finished is written.", file=sys.stderr)
        raise typer.Exit(130)


def _hardware(hardware: Hardware, found: RealRun) -> dict[str, Any]:
    """What only a run on hardware has, for the summary."""
    from profiler.facts import device_name, software
    from synerdiff.core import NS_PER_S

    model = hardware.model
    return {
        "model": model.name,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "scheduler": model.solver.scheduler_name,
        "software": software(),
        "warm_up_s": hardware.warm_up_ns / NS_PER_S,
        "max_rows_at_end": found.max_rows,
        "dispatch": found.dispatch.summary(),
        "faults": [
            {"time_s": f.time_ns / NS_PER_S, "kind": f.kind, "samples": list(f.samples), "detail": f.detail}
            for f in found.faults
        ],
    }


def _lines(described: dict[str, Any]) -> list[str]:
    """Dispatch, the sender and what went wrong, for the terminal."""

    def spread(name: str) -> str:
        values = described["dispatch"][name]
        if not values["count"]:
            return "-"
        return "  ".join(f"{key} {values[key + '_s'] * 1e3:.3g}" for key in ("p50", "p90", "p99", "max"))

    lines = [
        f"  lanes idle between pieces, ms: step  {spread('step_dispatch')}",
        f"                                chunk  {spread('chunk_dispatch')}",
        f"  sender behind its schedule, ms       {spread('sender_lag')}",
        f"  warm-up     {described['warm_up_s']:.3g} s, not part of any number",
    ]
    faults = described["faults"]
    for fault in faults[:5]:
        who = f" ({', '.join(fault['samples'])})" if fault["samples"] else ""
        lines.append(f"  fault       {fault['time_s']:.3f} s: {fault['kind']}{who}: {fault['detail']}")
    if len(faults) > 5:
        lines.append(f"  fault       and {len(faults) - 5} more in summary.json")
    return lines


def _require_empty(folder: Path) -> None:
    from synerdiff.core import InputError
    from synerdiff.files import require_writable_folder

    require_writable_folder(folder)
    first = next(folder.iterdir(), None)
    if first is not None:
        raise InputError(f"{folder}: the folder for images holds {first.name} already; give an empty one.")


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, a second one interrupts at once."""
    stop = threading.Event()

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
