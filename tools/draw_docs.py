"""Draws figures of docs/synerdiff.md and docs/fidelity.md: python -m tools.draw_docs"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas

from policies.decode_costs import DecodeCosts
from policies.planner import Planner
from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import PPM, Request, SkipBudget
from synerdiff.diffusion import MODELS
from synerdiff.experiments.fidelity_tradeoff import trade_off
from synerdiff.fidelity.table import read_fidelity
from synerdiff.figures.fidelity import latency_against_fidelity
from synerdiff.figures.planner import PlannedStep, controller_over_time, plan_picture
from synerdiff.figures.style import save
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.results.records import work_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER, DATA = DOCS / "figures", DOCS / "data"
MS = 1_000_000
ROWS, ELIGIBLE, THETA, CREDIT_NS, BATCH = 16, 4, 0.95, 4 * MS, 8
STEPS, GUIDANCE, LOADS = 25, 4.0, (0.7, 0.9, 1.1)
METRICS = ["request_latency_mean_s", "request_latency_p99_s", "request_throughput"]
COLUMNS = ["policy", "variant", "load", "seed", "ssim", *METRICS]


def plan_figure() -> None:
    """One plan of the dynamic program over four steps."""
    profile = load_profile(find_profile("h200-sdxl-estimated"))
    costs = DecodeCosts(profile, "c4")
    planner = Planner(costs, 8, 20 * MS)
    plan = planner.plan(ROWS, [0, 0, ELIGIBLE] + [0] * 5, 0, 2, round(THETA * PPM), CREDIT_NS, 1)
    assert plan is not None
    steps, now_ns, done = [], 0, 0
    for count, skip in plan.actions:
        beside = costs.beside(ROWS - ELIGIBLE if skip else ROWS)
        step_ns = costs.step_ns(ROWS - ELIGIBLE if skip else ROWS)
        chunks, at_ns = [], now_ns
        for i in range(done, done + count):
            chunk = i % costs.count
            chunks.append((i // costs.count, chunk, at_ns, at_ns + beside.wall[chunk]))
            at_ns += beside.wall[chunk]
        end_ns = now_ns + step_ns + sum(beside.lost[i % costs.count] for i in range(done, done + count))
        steps.append(PlannedStep(now_ns, end_ns, skip, tuple(chunks)))
        now_ns, done = end_ns, done + count
    caption = f"Two pending images in four chunks each, steps of {ROWS} rows; {ELIGIBLE} samples may skip in the third."
    figure = plan_picture(steps, chunk_count=costs.count, images=2, full_ns=costs.step_ns(ROWS), credit_ns=CREDIT_NS,
                          theta=THETA, estimated=profile.estimated, caption=f"{caption} {profile.name}.")  # fmt: skip
    save(figure, FOLDER, "synerdiff-plan", ("png",))


def controller_figure() -> None:
    """Two quiet minutes, a burst, and quiet again, at the highest contention: at the middle of its range none skips."""
    profile = load_profile(find_profile("h200-sdxl-estimated-contention1"))
    times_s = [5.0 * i for i in range(24)] + [120 + 0.55 * i for i in range(90)] + [180 + 5.0 * i for i in range(36)]
    requests = [Request(i, round(time_s * 1e9), 30) for i, time_s in enumerate(times_s)]
    policy: Any = build_policy("synerdiff-feedback", {"batch": BATCH, "trail": 100_000})
    result = simulate(requests, policy, profile, budget=SkipBudget(300_000))
    work = work_table(result.work, result.sample_names).to_pandas()
    caption = f"A burst of 90 requests from 120 s on, batch {BATCH}, {profile.name}; 30% of the steps may skip."
    save(controller_over_time(policy.trail, work, batch=BATCH, estimated=profile.estimated, caption=caption), FOLDER,
         "synerdiff-controller", ("png",))  # fmt: skip


def fidelity_figure() -> None:
    """Latency, throughput and fidelity by the shipped table of `digits`.

    What was simulated is kept in docs/data/fidelity-latency-digits-cpu.csv and drawn again from there.
    """
    name = "digits-cpu"
    profile, file = load_profile(find_profile(name)), DATA / f"fidelity-latency-{name}.csv"
    if not file.is_file():
        table = read_fidelity(MODELS / "digits")
        trade_off(profile, table, STEPS, GUIDANCE, LOADS)[COLUMNS].round(5).to_csv(file, index=False)
    frame = pandas.read_csv(file).assign(profile=name, estimated=profile.estimated)
    caption = (
        f"DDIM, {STEPS} steps, guidance {GUIDANCE:g} on {name}. Poisson arrivals, means over 3 seeds of 600 "
        "requests; load 1: full guidance in all steps with serial decodes. All run load-skip's placement at its "
        "default batch."
    )
    save(latency_against_fidelity(frame, caption=caption), FOLDER, f"fidelity-latency-{name}", ("png",))


if __name__ == "__main__":
    plan_figure()
    controller_figure()
    fidelity_figure()
