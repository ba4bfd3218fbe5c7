"""``synerdiff cluster``: one simulated run on many GPUs, with adapters, and its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cluster(
    file: Annotated[Path, typer.Argument(help="A cluster's file (YAML), for example experiments/swift-cluster.yaml.")],
    profile: Annotated[str, typer.Option(help="Folder of a profile (with adapters.csv where requests ask for some).")],
    trace: Annotated[Path, typer.Option(help="Trace file (CSV or parquet).")],
    policy: Annotated[str, typer.Option(help="Name of a policy, or module:Class; every worker has its own.")],
    out: Annotated[Path, typer.Option(help="Folder for the records.")],
    router: Annotated[
        str, typer.Option(help="round-robin, shortest-queue, least-work or adapter-affinity.")
    ] = "shortest-queue",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, a parameter of the policy; may be repeated.")
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Multiply every arrival by this.")] = 1.0,
    window: Annotated[str | None, typer.Option(help="A:B, seconds of the trace as written; B excluded.")] = None,
    dispersion: Annotated[
        bool, typer.Option("--dispersion", help="Draw times between the profile's p10 and p90 instead of medians.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the drawn times.")] = 0,
    timeline: Annotated[bool, typer.Option("--timeline", help="Also write timeline.json for Perfetto.")] = False,
) -> None:
    """Replay a trace on a cluster: workers behind a router, ControlNet services, LoRA loading, guidance on two GPUs."""
    from policies.registry import build_policy, policy_parameters
    from policies.routers import build_router
    from simulator import simulate_cluster
    from synerdiff.cli.options import parameter_values, summary_lines, window_of
    from synerdiff.config.cluster import load_cluster
    from synerdiff.core import InputError
    from synerdiff.experiments import one_run
    from synerdiff.profile.adapters import load_adapters
    from synerdiff.profile.folder import find_profile, load_profile
    from synerdiff.results import records
    from synerdiff.results.folder import progress_bar, require_run_folder, write_run
    from traces.native import read_trace

    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}; a whole number from 0 to 2^63 - 1 is needed.")
    described = load_cluster(file)
    chosen = build_router(router)
    parameters = parameter_values(policy, policy_parameters(policy, Path()), settings or [])
    span = window_of(window)
    folder = find_profile(profile)
    measured = load_profile(folder)
    adapters = load_adapters(folder, measured.name)
    require_run_folder(out)
    requests = one_run.fitted(read_trace(trace, window=span), measured)
    requests, scale, load = one_run.at_load(requests, measured, None, time_scale, span)
    with progress_bar("simulating", sum(request.images for request in requests)) as on_progress:
        result = simulate_cluster(
            requests,
            lambda: build_policy(policy, parameters, Path()),
            measured,
            described,
            adapters=adapters,
            router=chosen,
            dispersion_seed=seed if dispersion else None,
            on_progress=on_progress,
        )
    tables = (
        records.requests_table(result.run.requests),
        records.work_table(result.run.work, result.run.sample_names),
    )
    frames = (tables[0].to_pandas(), tables[1].to_pandas())
    summary = one_run.summary_of(*frames, requests, measured)
    per_gpu = None if load is None else load / result.gpus
    about = {
        "profile": measured.name,
        "provenance": measured.provenance,
        "trace": trace.name,
        "window_s": span,
        "time_scale": scale,
        "load": per_gpu,
        "policy": policy,
        "parameters": parameters,
        "router": router,
        "cluster": described.model_dump(mode="json"),
        "dispersion_seed": seed if dispersion else None,
        "decisions": result.run.decisions,
        "gpus": result.gpus,
        "gpu_seconds_per_image": result.gpu_seconds_per_image,
        "busy_gpu_seconds_per_image": result.busy_gpu_seconds_per_image,
        "lora_requested": result.lora_requested,
        "lora_reads": result.lora_reads,
        "lora_copies": result.lora_copies,
        "controlnet_loads": result.controlnet_loads,
        "requests_by_worker": [result.worker_of.count(index) for index in range(len(described.workers))],
    }
    write_run(out, tables, frames, {"run": about, **summary}, timeline)
    typer.echo(f"{out}: {policy} behind {router} on {result.gpus} GPUs of {measured.label}, {trace.name}")
    for line in summary_lines(summary, per_gpu):
        typer.echo(line)
    typer.echo(
        f"  GPU-seconds {_number(result.gpu_seconds_per_image)} an image held, "
        f"{_number(result.busy_gpu_seconds_per_image)} busy"
    )
    typer.echo(
        f"  adapters    {result.lora_requested} LoRAs asked for, {result.lora_reads} read, {result.lora_copies} "
        f"copied; {result.controlnet_loads} ControlNets loaded"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
