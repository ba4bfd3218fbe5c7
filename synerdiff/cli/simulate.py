"""``synerdiff simulate``: one simulated run, on one worker or on a cluster, and its records."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import progress
from synerdiff.core import InputError
from synerdiff.files import claim_folder


def simulate(
    profile: options.ProfileName,
    trace: options.TraceFile,
    policy: options.PolicyName,
    out: options.OutFolder,
    settings: options.Settings = None,
    load: options.LoadOption = None,
    rate: options.RateOption = None,
    time_scale: options.TimeScale = None,
    max_concurrency: options.MaxConcurrency = None,
    window: options.Window = None,
    map: options.Map = None,
    sort: options.Sort = False,
    slo: options.Slo = None,
    dispersion: Annotated[
        bool, typer.Option("--dispersion", help="Draw times between the profile's p10 and p90 instead of medians.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the drawn times.")] = 0,
    decode_gpus: options.DecodeGpus = "0",
    cluster: options.ClusterFile = None,
    router: Annotated[
        str | None,
        typer.Option(help="With --cluster, instead of its own: round-robin, shortest-queue, least-work, ..."),
    ] = None,
    skip_fraction: options.SkipFraction = 0.0,
    skip_warmup: options.SkipWarmup = 3,
    skip_longest_run: options.SkipLongestRun = 1,
    skip_mode: options.SkipMode = "reuse",
    min_ssim: options.MinSsim = None,
    fidelity: options.FidelityFolder = None,
    times_off: Annotated[
        str | None,
        typer.Option(
            "--profile-error",
            help="Band of the results when all times are off by so much, like 2%; own: by the profile's own band or "
            "spread (default up to 2,000 images); 0: none. Takes two more runs.",
        ),
    ] = None,
    timeline: options.Timeline = False,
) -> None:
    """Replay a trace through a policy on a profile, and write requests, work and metrics.

    With --cluster: workers behind a router, ControlNet services, LoRA loading, guidance on two GPUs.
    """
    from synerdiff.experiments import profile_error, run

    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}; a whole number from 0 to 2^63 - 1 is needed.")
    if router is not None and cluster is None:
        raise InputError("--router chooses among the workers of --cluster; give both or neither.")
    spec = options.run_spec(
        profile,
        trace,
        policy,
        settings,
        budget=options.skip_budget(skip_fraction, skip_warmup, skip_longest_run, skip_mode),
        window=window,
        mapping=map,
        sort=sort,
        decode_gpus=decode_gpus,
        cluster=cluster,
        router=router,
        min_ssim=min_ssim,
        fidelity=fidelity,
        load=load,
        rate_per_s=rate,
        time_scale=time_scale,
        max_concurrency=max_concurrency,
        slo_seconds=slo,
        dispersion_seed=seed if dispersion else None,
    )
    claim_folder(out, "simulate")
    prepared = run.prepare(spec)
    band = profile_error.asked_band(times_off, prepared)
    with progress("simulating", prepared.images) as on_progress:
        outcome = run.execute(prepared, run.simulator, on_progress)
    if band is not None:
        outcome = replace(outcome, profile_error=profile_error.banded(prepared, band))
    outcome.write(out, timeline)
    where = "" if spec.cluster is None else f" behind {spec.router_entry.kind} on {len(spec.cluster.gpus)} GPUs"
    options.report(outcome, f"{out}: {policy}{where} on {prepared.profile.label}, {trace.name}")
    options.require_served(outcome)
