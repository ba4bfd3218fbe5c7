"""What skips and fewer steps buy: latency, throughput and fidelity of simulated runs on one profile, same arrivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from synerdiff.core import GUIDED, NO_SKIPS, Request, SkipBudget
from synerdiff.experiments.run import RunSpec, execute, prepare
from synerdiff.fidelity.floor import UnreachedFloor, budget_from_floor, run_ssim
from synerdiff.fidelity.table import FidelityTable
from synerdiff.profile.capacity import default_batch, serial_capacity_samples_per_s
from synerdiff.profile.tables import Profile
from traces.generate import generate

if TYPE_CHECKING:
    import pandas

FEWER_STEPS = "fewer steps, full guidance"
PLACEMENT = "load-skip"
"""All variants run this policy, so that only skips and steps differ; without a budget it never skips."""
ALWAYS, QUEUE = "skip always", "skip while samples wait"
FLOORS = (0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95)


class Variant(NamedTuple):
    """One way to serve a request of ``steps`` steps."""

    policy: str
    """How the figure calls it."""
    name: str
    steps: int
    budget: SkipBudget
    skip_queue: int
    """Samples that must wait before guidance is skipped."""


def variants(table: FidelityTable, steps: int, guidance_scale: float, profile: Profile) -> list[Variant]:
    """Full guidance, every equal-cost baseline, and for each floor that a rule reaches skips always and under load.

    Raises InputError for a table of another model or one that does not cover the setting.
    """
    ways = [Variant(FEWER_STEPS, f"{steps} steps", steps, NO_SKIPS, 0)]
    for row in table.rows:
        own = row.solver == table.solver and row.steps == steps and row.guidance_scale == guidance_scale
        if own and row.mode == GUIDED and row.run_steps < steps:
            ways.append(Variant(FEWER_STEPS, f"{row.run_steps} steps", row.run_steps, NO_SKIPS, 0))
    model, resolution = profile.head.model, profile.head.size
    budgets: list[SkipBudget] = []
    for floor in FLOORS:
        try:
            choice = budget_from_floor(table, floor, [(steps, guidance_scale)], model, resolution)
        except UnreachedFloor:
            continue
        if choice.budget not in budgets:
            budgets.append(choice.budget)
            rule = choice.rules[steps].rule
            ways.append(Variant(ALWAYS, rule, steps, choice.budget, 0))
            ways.append(Variant(QUEUE, rule, steps, choice.budget, 1))
    return ways


def trade_off(
    profile: Profile,
    table: FidelityTable,
    steps: int,
    guidance_scale: float,
    loads: Sequence[float] = (0.7, 0.9, 1.1),
    seeds: Sequence[int] = (1, 2, 3),
    requests: int = 600,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> pandas.DataFrame:
    """One row per variant, load and seed: profile, estimated, policy, variant, load, seed, ssim and the run's metrics.

    Poisson arrivals of one image each; load 1 is what full guidance in all steps sustains with serial decodes. Every
    variant sees the same arrivals, at the default batch size.
    """
    import pandas

    chosen = variants(table, steps, guidance_scale, profile)
    capacity = serial_capacity_samples_per_s(profile, steps, default_batch(profile))
    rows: list[dict[str, Any]] = []
    total = len(chosen) * len(loads) * len(seeds)
    asked = {"mix": "fixed", "requests": requests, "steps": steps, "guidance_scale": guidance_scale}
    for load, seed in product(loads, seeds):
        arrivals = generate("poisson", rate_per_s=load * capacity, seed=seed, **asked)
        for variant in chosen:
            rows.append(_run(variant, arrivals, profile, table, steps) | {"load": load, "seed": seed})
            on_progress(f"{variant.policy}: {variant.name}, load {load:g}", len(rows) / total)
    return pandas.DataFrame(rows)


def _run(
    variant: Variant, arrivals: Sequence[Request], profile: Profile, table: FidelityTable, steps: int
) -> dict[str, Any]:
    spec = RunSpec(
        profile=profile,
        source=tuple(replace(request, steps=variant.steps) for request in arrivals),
        policy=PLACEMENT,
        parameters={"skip_queue": variant.skip_queue},
        budget=variant.budget,
    )
    outcome = execute(prepare(spec))
    images = outcome.frames[0][["modes", "guidance_scale"]].to_dict("records")
    return {
        "profile": profile.name,
        "estimated": profile.estimated,
        "policy": variant.policy,
        "variant": variant.name,
        "ssim": run_ssim(table, ((image["modes"], image["guidance_scale"], steps) for image in images)),
        **outcome.summary,
    }
