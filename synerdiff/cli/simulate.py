"""``synerdiff simulate``: one simulated run, on one worker or on a cluster, and its records."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import progress
from synerdiff.core import InputError
from synerdiff.files import claim_folder


@options.taking(options.RunOptions)
def simulate(
    given: options.RunOptions,
    dispersion: Annotated[
        bool, typer.Option("--dispersion", help="Draw times between the profile's p10 and p90 instead of medians.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the drawn times.")] = 0,
    router: Annotated[
        str | None,
        typer.Option(help="With --cluster, instead of its own: round-robin, shortest-queue, least-work, ..."),
    ] = None,
    times_off: Annotated[
        str | None,
        typer.Option(
            "--profile-error",
            help="Band of the results when all times are off by so much, like 2%; own: by the profile's own band or "
            "spread (default up to 2,000 images); 0: none. Takes two more runs.",
        ),
    ] = None,
) -> None:
    """Replay a trace through a policy on a profile, and write requests, work and metrics.

    With --cluster: workers behind a router, ControlNet services, LoRA loading, guidance on two GPUs.
    """
    from synerdiff.experiments import profile_error, run

    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}; a whole number from 0 to 2^63 - 1 is needed.")
    if router is not None and given.cluster is None:
        raise InputError("--router chooses among the workers of --cluster; give both or neither.")
    spec = given.described(router=router, dispersion_seed=seed if dispersion else None)
    claim_folder(given.out, "simulate")
    prepared = run.prepare(spec)
    band = profile_error.asked_band(times_off, prepared)
    with progress("simulating", prepared.images) as on_progress:
        outcome = run.execute(prepared, run.simulator, on_progress)
    if band is not None:
        outcome = replace(outcome, profile_error=profile_error.banded(prepared, band))
    outcome.write(given.out, given.timeline)
    where = "" if spec.cluster is None else f" behind {spec.router_entry.kind} on {len(spec.cluster.gpus)} GPUs"
    options.report(outcome, f"{given.out}: {given.policy}{where} on {prepared.profile.label}, {given.trace.name}")
    options.require_served(outcome)
