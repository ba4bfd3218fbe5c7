"""``synerdiff capacity``: the fewest and the cheapest GPUs that keep an SLO, or the highest rate of a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synerdiff.cli import options
from synerdiff.cli.progress import print_parts, progress
from synerdiff.config.experiment import PolicyEntry, is_policy_file, load_policy
from synerdiff.core import InputError
from synerdiff.files import MOST, plain_digits


def capacity(
    file: Annotated[Path | None, typer.Argument(help="A capacity file (YAML), instead of the options.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace file of any dialect, replayed as it is.")] = None,
    map: options.Map = None,
    sort: options.Sort = False,
    profile: Annotated[list[str] | None, typer.Option(help="Profile of a GPU; may be repeated.")] = None,
    slo: Annotated[str | None, typer.Option(help="What is to be met: p99=10s, or goodput=0.99.")] = None,
    slo_seconds: Annotated[
        float | None, typer.Option(help="goodput: the latency limit (default: 3 times the latency alone).")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policies or policy files, separated by commas (default: auto).")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Batch of the policies: a size, sizes to try, or best.")] = None,
    gpus: Annotated[str | None, typer.Option(help="How many GPUs to look at: 1..32, or one number.")] = None,
    find: Annotated[str | None, typer.Option(help="gpus: the fewest; rate: the highest rate of so many.")] = None,
    price: Annotated[str | None, typer.Option(help="Per GPU-hour: h100=2.5,l40s=0.8.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Also fleets of two of the profiles, by price.")] = False,
    stages: Annotated[
        str | None, typer.Option(help="GPUs of their own: together,decode,encode,both; one or several.")
    ] = None,
    link: Annotated[float | None, typer.Option(help="GB/s between stages apart.")] = None,
    router: Annotated[str | None, typer.Option(help="Which worker serves a request (default: shortest-queue).")] = None,
    skip_fraction: Annotated[
        float | None, typer.Option(help="Share of a sample's steps that may skip guidance.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results (default: results/NAME).")] = None,
    jobs: options.Jobs = None,
    backend: options.BackendName = "loky",
    address: options.Address = None,
    emit: options.Emit = None,
) -> None:
    """Find the fewest and the cheapest GPUs that keep an SLO on a trace, or the highest rate that a fleet keeps it at.

    Exit code 1 when nothing within --gpus does.
    """
    from synerdiff.experiments.capacity_report import open_capacity

    if trace is None and (map is not None or sort):
        raise InputError("--map and --sort say how --trace is read, which is missing.")
    reading = ({} if map is None else {"map": map}) | ({"sort": True} if sort else {})
    given: dict[str, Any] = {
        "profiles": profile,
        "slo": slo,
        "slo_seconds": slo_seconds,
        "policies": None if policy is None else [_policy(name, batch) for name in policy.split(",")],
        "gpus": gpus,
        "find": find,
        "prices": None if price is None else options.priced(price),
        "mixed": mixed or None,
        "stages": None if stages is None else [part.strip() for part in stages.split(",")],
        "link": None if link is None else {"gb_per_s": link},
        "router": router,
        "skip_budget": None if skip_fraction is None else {"fraction": skip_fraction},
        "workload": None if trace is None else {"name": "trace", "trace": str(trace), "parameters": reading},
    }
    fields = {name: value for name, value in given.items() if value is not None}
    if file is not None and fields:
        raise InputError(
            f"{file}: a capacity file holds the whole question, so no option may give {next(iter(fields))}."
        )
    if file is None:
        for name, option in (("workload", "--trace"), ("profiles", "--profile"), ("slo", "--slo")):
            if name not in fields:
                raise InputError(f"{option} is missing; give it, or a capacity file.")
    if batch is not None and policy is None:
        raise InputError("--batch is the batch of the policies that --policy names; give both.")
    run = open_capacity(file, fields, out, jobs, backend, address, emit)
    with progress("capacity") as update:
        parts, met = run(lambda done: update(done, None, f"{done} runs"))
    print_parts(parts)
    if not met:
        raise typer.Exit(1)


def _policy(name: str, batch: str | None) -> dict[str, Any] | PolicyEntry:
    """A policy file, or a name with ``4``, ``4,8`` or ``best``; what that is not stays a text, to be refused."""
    if is_policy_file(name.strip()):
        if batch is not None:
            raise InputError(f"{name.strip()} holds its own batch, which excludes --batch.")
        return load_policy(Path(name.strip()))
    if batch is None:
        return {"policy": name.strip()}
    sizes = [plain_digits(part.strip(), 1, MOST) or part.strip() for part in batch.split(",")]
    return {"policy": name.strip(), "batch": sizes[0] if len(sizes) == 1 else sizes}
