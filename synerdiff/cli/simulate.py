"""``synerdiff simulate``: one simulated run and its records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


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
    timeline: Annotated[bool, typer.Option("--timeline", help="Also write timeline.json for Perfetto.")] = False,
) -> None:
    """Replay a trace through a policy on a profile, and write requests, work and metrics."""
    from policies.registry import policy_parameters
    from synerdiff.cli.options import (
        decode_lanes,
        floor_choice,
        parameter_values,
        skip_budget,
        summary_lines,
        window_of,
    )
    from synerdiff.core import PPM, InputError
    from synerdiff.experiments import one_run
    from synerdiff.profile.folder import find_profile, load_profile
    from synerdiff.results import records
    from synerdiff.results.folder import progress_bar, require_run_folder, write_run
    from traces.native import read_trace

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
    profile_folder = find_profile(profile)
    measured = load_profile(profile_folder)
    require_run_folder(out)
    requests = one_run.fitted(read_trace(trace, window=span), measured)
    floor = floor_choice(min_ssim, fidelity, setup.budget, requests, measured, profile_folder)
    if floor is not None:
        setup = replace(setup, budget=floor.budget)
    requests, scale, load = one_run.at_load(requests, measured, load, time_scale, span)

    with progress_bar("simulating", sum(request.images for request in requests)) as on_progress:
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
        "skip_fraction_allowed": setup.budget.fraction_ppm / PPM,
        "min_ssim": min_ssim,
        "dispersion_seed": setup.dispersion_seed,
        "decisions": result.decisions,
    }
    write_run(out, (request_table, work_table), (request_frame, work_frame), {"run": described, **summary}, timeline)
    typer.echo(f"{out}: {policy} on {measured.label}, {trace.name}")
    for line in [*(floor.lines() if floor is not None else ()), *summary_lines(summary, load)]:
        typer.echo(line)
