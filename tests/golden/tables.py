"""The tables that are pinned, small, made by today's code: a restructuring adapts the calls here, not the values."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from policies.registry import build_policy
from simulator import simulate
from synerdiff.config.experiment import load_experiment
from synerdiff.core import RunResult, SkipBudget
from synerdiff.experiments.grid import Grid
from synerdiff.experiments.sweep import run_sweep
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.scaling import all_times_scaled
from synerdiff.results.records import requests_table, work_table
from synerdiff.validation.errors import METRICS, TOLERANCES, case_errors, checks
from synerdiff.validation.scorecard import katz_scores, predict
from synerdiff.validation.session import SATURATION, Validation
from tests.builders import requests_at
from tests.golden.pins import Table
from tests.validation.recorded import contended, recorded_session, times_of

SWEEP = """
name: golden
profiles: [digits-cpu, h200-sdxl-estimated]
requests: 80
seeds: [1, 2]
loads: [0.7, 1.0]
slo: {solo_multiple: 3}
skip_budget: {fraction: 0.3}
workloads:
  - {name: guided, generator: poisson, parameters: {mix: gentd26}}
  - {name: bursty, generator: gentd26-like, parameters: {loras: none}, loads: [0.6], batch_from: guided}
batch_search: {batches: [4, 8], loads: [0.9], seed: 0, requests: 60}
policies:
  - {policy: continuous-serial, batch: best}
  - {policy: synerdiff-feedback, batch: best}
  - {policy: auto, batch: 8}
  - {policy: dynamic, label: fewer, steps_scale: 0.7}
"""
COMPARISON = """
name: golden
report: comparison
profiles: h200-sdxl-estimated
contention: [0.5, 1.5]
decode_share: 2
workloads:
  - {name: guided-20-50, generator: poisson, parameters: {mix: guided-20-50}}
policies:
  - {policy: continuous-serial}
  - {policy: synerdiff-feedback}
  - {policy: auto}
  - {policy: continuous-serial, label: fewer, skip: false, steps_scale: 0.8}
baselines: continuous-serial
batch: best
loads: 0.8
seeds: [1, 2]
requests: 80
saturation: 120
batch_search: {batches: [4, 8], loads: 0.8, requests: 40}
slo: {solo_multiple: 3}
skip_budget: {fraction: 0.3}
"""
ADAPTERS = """
name: golden
report: adapters
profiles: h800-sdxl-katz
fleets:
  - {name: "inline, synchronous", strategies: [], gpus: 8, host_cache_mib: 1900}
  - {name: ControlNet service, strategies: [service], gpus: 8, host_cache_mib: 1900}
  - {name: asynchronous LoRAs, strategies: [asynchronous], gpus: 8, host_cache_mib: 1900}
  - {name: guidance on two GPUs, strategies: [two-gpus], gpus: 8, host_cache_mib: 1900}
  - {name: service and asynchronous, strategies: [service, asynchronous], gpus: 8, host_cache_mib: 1900}
  - {name: all three, strategies: [service, asynchronous, two-gpus], gpus: 8, host_cache_mib: 1900}
workloads:
  - {name: service, generator: adapters, parameters: {service: A, steps: 20}, lora_share: 0.5}
policies:
  - {policy: continuous-serial, batch: 1}
baselines: "inline, synchronous"
loads: 0.6
saturation: 50
seeds: 1
requests: 50
"""
RUN_IDENTITY = ("purpose", "profile", "workload", "policy", "batch", "load", "seed")
COMPARISON_IDENTITY = (
    *("profile", "contention", "decode_share", "decode_gpus", "workload", "policy", "measure", "load", "seed"),
)
COMPARED = (
    *("request_latency_mean_s", "request_latency_p99_s", "request_throughput", "image_throughput", "goodput"),
    *("good_fraction", "error_request_count"),
)
MARKS = ("estimated", "batch", "skip_fraction", "forced_fraction")
PUBLISHED = "katz-published"
NOT_VALUES = ("key", "run")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Here:
    """A backend without processes."""

    elsewhere = False

    def run_unordered(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        return map(function, items)


def sweep_runs() -> Table:
    """``runs.parquet`` of a small sweep, batch search included."""
    return RUN_IDENTITY, _sweep()[0]


def sweep_requests() -> Table:
    """``requests.parquet`` of the same sweep, each request with its run's identity."""
    return (*RUN_IDENTITY, "request_id"), _sweep()[1]


_SWEPT: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []


def _sweep() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(runs, requests), computed once in a process."""
    import pandas

    if not _SWEPT:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "golden.yaml").write_text(SWEEP, encoding="utf-8")
            out = folder / "out"
            run_sweep(Grid(load_experiment(folder / "golden.yaml"), folder, out), Here())
            runs = [_plain(row) for row in pandas.read_parquet(out / "runs.parquet").to_dict("records")]
            requests = [_plain(row) for row in pandas.read_parquet(out / "requests.parquet").to_dict("records")]
        named = {row["key"]: {name: row[name] for name in RUN_IDENTITY} for row in runs}
        # A request has a seed too, that of its images.
        joined = [{**row, "image_seed": row["seed"], **named[row["run"]]} for row in requests]
        _SWEPT.append(([_values(row) for row in runs], [_values(row) for row in joined]))
    return _SWEPT[0]


def comparison() -> Table:
    """The rows of a comparison: saturation and one load, two levels of contention, fewer steps beside."""
    rows = []
    for row in _rows(COMPARISON):
        saturated = row["load"] is None
        columns = {"image_throughput": row["saturation_throughput"]} if saturated else {n: row[n] for n in COMPARED}
        marks = {name: row[name] for name in (*COMPARISON_IDENTITY, *MARKS) if name != "measure"}
        rows.append({**marks, "measure": "saturation" if saturated else "latency", **columns})
    return COMPARISON_IDENTITY, rows


def _rows(text: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "golden.yaml").write_text(text, encoding="utf-8")
        return run_sweep(Grid(load_experiment(folder / "golden.yaml"), folder, folder / "out"), Here()).rows


def katz() -> Table:
    """Predicted latencies of every published combination and of one more."""
    rows = [
        {"system": system, "controlnets": c, "loras": n, "predicted_s": predict(system, c, n)}
        for system in ("diffusers", "katz")
        for c in range(5)
        for n in range(5)
    ]
    return ("system", "controlnets", "loras"), rows


def katz_published() -> Table:
    """The predictions beside the published medians, in the folder that SYNERDIFF_DATA names."""
    scores = katz_scores(Path(os.environ["SYNERDIFF_DATA"]))
    rows = [{**asdict(score), "error": score.error} for score in scores]
    return ("case", "measure"), rows


def adapters() -> Table:
    """Rows of a small grid of strategies for adapters."""
    names = {"strategies": "fleet", "latency_mean_s": "request_latency_mean_s"}
    names |= {"latency_p99_s": "request_latency_p99_s"}
    same = ("workers", "services", "gpu_seconds_per_image", "busy_gpu_seconds_per_image", "lora_reads_per_request")
    names |= {name: name for name in ("gpus", "lora_share", "seed", *same)}
    rows = [
        {name: row.get(column) for name, column in names.items()} | {"load": row["load"] or 0}
        for row in _rows(ADAPTERS)
    ]
    return ("strategies", "gpus", "lora_share", "load", "seed"), rows


def records() -> Table:
    """The requests of single runs on a profile in round numbers: contention, chunks, skips, several images."""
    rows = []
    for policy, result in _single_runs():
        rows += [{"policy": policy, **row} for row in requests_table(result.requests).to_pylist()]
    return ("policy", "request_id"), rows


def work() -> Table:
    """The pieces of work of the same runs."""
    rows = []
    for policy, result in _single_runs():
        pieces = work_table(result.work, result.sample_names).to_pylist()
        rows += [{"policy": policy, "piece": number, **row} for number, row in enumerate(pieces)]
    return ("policy", "piece"), rows


def _single_runs() -> Iterator[tuple[str, RunResult]]:
    profile = contended()
    requests = [
        replace(request, images=1 + request.request_id % 2, steps=8 + request.request_id % 5)
        for request in requests_at(*(7.0 * i for i in range(24)), steps=10, guidance_scale=7.5)
    ]
    budget = SkipBudget(300_000, 2, 1)
    for policy in ("static", "chunked", "synerdiff", "synerdiff-feedback", "auto", "load-skip", "edf"):
        yield policy, simulate(requests, build_policy(policy), profile, decode_gpus=(0,), budget=budget)


def validation() -> Table:
    """Errors of predictions, from recorded runs whose hardware is the simulator with a slower profile."""
    rows = []
    for found in _case_errors():
        case = {"policy": found.case.policy, "load": found.case.load}
        for name in METRICS:
            metric = found.metrics.get(name)
            if metric is None:
                continue
            error = metric.error
            rows.append(
                {
                    **case,
                    "metric": name,
                    "measured": metric.measured,
                    "predicted": metric.predicted,
                    "error": None if error is None else error.value,
                    "low": None if error is None else error.low,
                    "high": None if error is None else error.high,
                }
            )
        rows.append({**case, "metric": "faults", "measured": found.faults})
    return ("policy", "load", "metric"), rows


def verdicts() -> Table:
    """What the checks say about the same runs, under both sets of tolerances."""
    rows = []
    for found in _case_errors():
        for name, tolerance in TOLERANCES.items():
            for check in checks(found, tolerance):
                rows.append(
                    {
                        "policy": check.case.policy,
                        "load": check.case.load,
                        "tolerance": name,
                        "what": check.what,
                        "text": check.value,
                        "allowed": check.allowed,
                        "verdict": check.verdict,
                    }
                )
    return ("policy", "load", "tolerance", "what"), rows


def _case_errors() -> list[Any]:
    session = _recorded_session()
    return [case_errors(session, case) for case in session.plan.cases]


def _recorded_session() -> Validation:
    """Two policies at two loads and in a burst; the machine is up to 9% slower than the profile."""
    profile = load_profile(find_profile("digits-cpu"))
    truth = all_times_scaled(profile, 1.06)
    truth.chunks = all_times_scaled(profile, 1.09).chunks
    return recorded_session(
        profile,
        truth,
        lambda repeat: times_of(profile, 1.01 if repeat < 0 else 1.0 + 0.01 * repeat, (-1_000, 0, 3_000)),
        loads=(0.5, 0.8, SATURATION),
        policies=("continuous-serial", "synerdiff-feedback"),
        requests=(40, 8, 6),
    )


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in NOT_VALUES}


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}


TABLES: dict[str, Callable[[], Table]] = {
    "sweep-runs": sweep_runs,
    "sweep-requests": sweep_requests,
    "comparison": comparison,
    "katz": katz,
    PUBLISHED: katz_published,
    "adapters": adapters,
    "records": records,
    "work": work,
    "validation": validation,
    "verdicts": verdicts,
}
