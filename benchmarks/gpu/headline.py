"""Policies against each other on hardware, in one process: saturation throughput, then latencies at a load.

    python -m benchmarks.gpu.headline --profile DIR --trace A.csv --trace B.csv --policy static ... --out DIR

Runs are interleaved: trace by trace every policy in turn, another one first each time. A finished run is a file, so the
same command goes on where it was stopped. Every policy has the batch size that the simulator finds best for it. Each
request is for one image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from numpy import quantile

from synerdiff.core import NS_PER_S, PPM, InputError, SkipBudget
from synerdiff.experiments.run import Outcome, Prepared, RunSpec, Served, execute, prepare
from synerdiff.files import atomic
from synerdiff.profile.capacity import most_samples
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.results.intervals import (
    p99_upper_bound,
    paired_log_ratio,
    requests_for_p99_claim,
    t_interval,
)
from synerdiff.results.metrics import latencies_s, measured, saturation_throughput
from traces.native import read_trace

BATCHES = (4, 8, 16)
SATURATION, LATENCY = "saturation", "latency"
OURS = ("synerdiff-feedback", "auto")


def best_batch(prepared: Prepared, kind: str) -> int:
    """Of 4, 8 and 16 as far as the row buckets allow: highest simulated rate, or least simulated mean latency."""
    rows = 2 if any(request.guidance_scale > 1 for request in prepared.requests) else 1
    most = most_samples(prepared.profile, rows)
    sizes = [size for size in BATCHES if size <= most] or [most]

    def cost_s(batch: int) -> float:
        latencies = latencies_s(execute(prepared.with_parameters(batch=batch)).result.requests)
        if not latencies:
            return inf
        return max(latencies) if kind == SATURATION else fmean(latencies)

    return min(sizes, key=lambda size: (cost_s(size), size))


def measure(arguments: argparse.Namespace) -> None:
    from real_runner.engine import run_real
    from real_runner.hardware import open_hardware

    profile = load_profile(find_profile(arguments.profile))
    arguments.out.mkdir(parents=True, exist_ok=True)
    offered: list[tuple[str, dict[str, Prepared]]] = []
    for trace in arguments.trace:
        # One image a request: what a run needs is many requests, and percentiles are over requests.
        requests = tuple(replace(request, images=1) for request in read_trace(trace))
        runs = {
            policy: prepare(
                RunSpec(
                    profile=profile,
                    source=requests,
                    policy=policy,
                    budget=SkipBudget(round(arguments.skip_fraction * PPM)),
                    load=arguments.load,
                )
            )
            for policy in arguments.policy
        }
        if arguments.backlog:
            offered.append((SATURATION, {policy: run.at_once(arguments.backlog) for policy, run in runs.items()}))
        offered.append((LATENCY, runs))
    batches = {
        (policy, kind): best_batch(prepared, kind)
        for kind, runs in offered[: 2 if arguments.backlog else 1]
        for policy, prepared in runs.items()
    }
    with open_hardware(profile.head.model, arguments.device, profile) as hardware:
        for turn, (kind, runs) in enumerate(offered):
            number = turn // (2 if arguments.backlog else 1)
            first = turn % len(arguments.policy)
            for policy in arguments.policy[first:] + arguments.policy[:first]:
                batch = batches[policy, kind]
                prepared = runs[policy].with_parameters(batch=batch)
                head = {"policy": policy, "kind": kind, "trace": number, "batch": batch, "load": arguments.load}
                head |= {"requests": len(prepared.served), "skip_fraction_allowed": arguments.skip_fraction}
                path = arguments.out / f"{kind}-{number}-{policy}.json"
                if path.exists() and head.items() <= json.loads(path.read_text(encoding="utf-8")).items():
                    continue
                run = run_real(prepared.served, prepared.policy(), profile, hardware, budget=prepared.budget)
                if run.error is not None:
                    raise run.error
                record = head | outcome(run, prepared)
                with atomic(path) as temporary:
                    temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
                rate = record["images_per_s"]
                print(f"{path.name}: {record['images_per_s_note'] or f'{rate:.3g} images/s'}", flush=True)


def outcome(run: Any, prepared: Prepared) -> dict[str, Any]:
    """One run's metrics, and the latencies behind them, so that runs can be pooled."""
    ended = Outcome(prepared, Served(run.result))
    frame, work = ended.frames
    try:
        rate: float | None = saturation_throughput(work)
        note = ""
    except InputError as error:
        rate, note = None, str(error)
    window = measured(frame)
    done = window[window["status"] == "done"]
    finished = frame.loc[frame["status"] == "done", "finished_s"]
    steps = work[work["kind"] == "step"]
    return {
        "images_per_s": rate,
        "images_per_s_note": note,
        "whole_run_images_per_s": int(frame["images"].sum()) / float(finished.max()) if len(finished) else None,
        "latencies_s": [float(value) for value in done["request_latency_s"]],
        "measured_requests": len(window),
        "step_median_s": float((steps["end_ns"] - steps["start_ns"]).median()) / NS_PER_S if len(steps) else None,
        "dispatch": run.dispatch.summary(),
        "faults": len(run.faults),
        "summary": ended.summary,
    }


def conclude(cases: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Per policy: rate and mean latency with t intervals over traces, P99 of the pooled latencies and what can be
    claimed; and paired ratios of ours to every other policy. Only what was measured is in it."""
    by: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for case in cases:
        by.setdefault((case["policy"], case["kind"]), {})[case["trace"]] = case
    policies: dict[str, dict[str, Any]] = {}
    rates: dict[str, dict[int, float]] = {}
    means: dict[str, dict[int, float]] = {}
    for (policy, kind), runs in sorted(by.items()):
        entry = policies.setdefault(policy, {})
        if kind == SATURATION:
            known = {n: run["images_per_s"] for n, run in runs.items() if run["images_per_s"]}
            if known:
                rates[policy] = known
                entry["saturation_images_per_s"] = _interval(t_interval(list(known.values())))
            entry["saturation_batch"] = next(iter(runs.values()))["batch"]
            continue
        latencies = [value for run in runs.values() for value in run["latencies_s"]]
        wanted = sum(run["measured_requests"] for run in runs.values())
        entry["latency_batch"] = next(iter(runs.values()))["batch"]
        entry["load"] = next(iter(runs.values()))["load"]
        entry["measured_requests"], entry["without_latency"] = wanted, wanted - len(latencies)
        entry["skip_fraction"] = [run["summary"]["skip_fraction"] for run in runs.values()]
        entry["stages_mean_s"] = {
            stage: [run["summary"][f"{stage}_mean_s"] for run in runs.values()]
            for stage in ("queue", "denoise", "decode_wait", "decode")
        }
        if latencies:
            whole = {n: run for n, run in runs.items() if run["latencies_s"]}
            means[policy] = {n: sum(run["latencies_s"]) / len(run["latencies_s"]) for n, run in whole.items()}
            entry["mean_latency_s"] = _interval(t_interval(list(means[policy].values())))
            entry["p99_latency_s"] = float(quantile(latencies, 0.99))
            bound = p99_upper_bound(latencies)
            enough = len(latencies) == wanted >= requests_for_p99_claim()
            entry["p99_claim_s"] = bound if enough else None
    ratios = {
        f"{ours} / {other}": {
            name: _ratio(values[ours], values[other])
            for name, values in (("saturation", rates), ("mean_latency", means))
            if ours in values and other in values
        }
        for ours in OURS
        for other in policies
        if other != ours and ours in policies
    }
    return {"policies": policies, "paired_ratios": ratios}


def _interval(interval: Any) -> dict[str, float | None]:
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: value if abs(value) != float("inf") else None for name, value in values.items()} | {"n": interval.n}


def _ratio(ours: dict[int, float], other: dict[int, float]) -> dict[str, float | None] | None:
    both = sorted(set(ours) & set(other))
    if not both:
        return None
    paired = paired_log_ratio({n: ours[n] for n in both}, {n: other[n] for n in both})
    bounded = paired.seeds > 1
    return {
        "ratio": paired.ratio,
        "low": paired.low if bounded else None,
        "high": paired.high if bounded else None,
        "traces": paired.seeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", required=True)
    parser.add_argument("--trace", type=Path, action="append", required=True)
    parser.add_argument("--policy", action="append", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--backlog", type=int, default=0, help="requests of a saturation run; 0: none")
    parser.add_argument("--skip-fraction", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
