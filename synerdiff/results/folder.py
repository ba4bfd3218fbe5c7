"""The folder of one run: how its files are written, and its summary for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.files import atomic
from synerdiff.results import records
from synerdiff.results.intervals import requests_for_p99_claim, values_for_interval
from synerdiff.results.metrics import measured_count
from synerdiff.results.timeline import write_timeline

if TYPE_CHECKING:
    import pandas
    import pyarrow

SETTLED = 0.98
"""Share of what is offered below which a run did not keep up with it."""
STATES = ("stable", "near saturation", "saturated")
UTILISATION = "lane_utilisation_"
NEAR_SATURATION = 0.9
"""Share of what the policy sustains from which on small errors of the times move latencies much."""


def write_run(
    out: Path,
    tables: tuple[pyarrow.Table, pyarrow.Table],
    frames: tuple[pandas.DataFrame, pandas.DataFrame],
    summary: dict[str, Any],
    timeline: bool,
) -> None:
    """Requests and work (as tables, and the same as frames), the summary, and the timeline if wanted.

    All files are complete under temporary names before the first takes its place; the summary is the last.
    """
    with ExitStack() as stack:
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        stack.enter_context(atomic(out / "summary.json")).write_text(text, encoding="utf-8")
        if timeline:
            write_timeline(stack.enter_context(atomic(out / "timeline.json")), frames[1], frames[0])
        records.store(stack.enter_context(atomic(out / "work.parquet")), tables[1])
        records.store(stack.enter_context(atomic(out / "requests.parquet")), tables[0])
    for stale in ["report.html"] + ["timeline.json"] * (not timeline):  # of an earlier run in this folder
        (out / stale).unlink(missing_ok=True)


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """What ``summary.json`` holds that matters most, for people, one a line."""
    run = summary["run"]
    latency = "  ".join(
        f"{name} {_number(summary[f'request_latency_{name}_s'])}" for name in ("mean", "p50", "p90", "p99")
    )
    stages = "  ".join(
        f"{name.replace('_', ' ')} {_number(summary[f'{name}_mean_s'])}"
        for name in ("queue", "denoise", "decode_wait", "decode")
    )
    if not summary["p99_claimable"]:
        latency += " (cannot be claimed)"
    lost = summary["error_request_count"]
    measured, done = summary["measured_request_count"], summary["request_count"]
    lines = [
        f"  requests    {summary['trace_request_count']}, of which {measured} measured"
        f" and {lost} unfinished, rejected or failed",
        *_load_lines(run, summary),
        f"  SLO         {_span(run['slo_lowest_s'], run['slo_highest_s'])} s: {run['slo']}",
        f"  latency, s  {latency}",
        *_claim_lines(summary, measured, done),
        *_error_lines(run),
        f"  stages, s   {stages}",
        f"  throughput  {_number(summary['request_throughput'])} requests/s, "
        f"{_number(summary['image_throughput'])} images/s",
        f"  goodput     {_number(summary['goodput'])} requests/s within their SLO "
        f"({_number(100 * summary['good_fraction'])}% of them)",
        f"  skipped     {_number(100 * summary['skip_fraction'])}% of guided steps",
        *_busy_lines(summary),
    ]
    if "gpus" in run:
        lines += [
            f"  GPU-seconds {_number(run['gpu_seconds_per_image'])} an image held, "
            f"{_number(run['busy_gpu_seconds_per_image'])} busy",
            f"  adapters    {run['lora_requested']} LoRAs asked for, {run['lora_reads']} read, {run['lora_copies']} "
            f"copied; {run['controlnet_loads']} ControlNets loaded",
        ]
    return lines


def _load_lines(run: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """The load and what it is a share of, the rate beside it, and how far the trace was stretched."""
    rate, load, scale = run["rate_per_s"], run["load"], run["time_scale"]
    if run["max_concurrency"] is not None:
        capacity = run["policy_capacity_per_s"]
        most = "" if capacity is None else f"; at most {_number(capacity)} requests/s by {run['policy']} at its own batch"
        return [f"  closed loop {run['max_concurrency']:,} requests in the system at a time{most}"]
    if rate is None:
        return ["  load        -: all requests arrive at once"]
    speed = "as written" if scale == 1 else f"{_number(max(scale, 1 / scale))} times as {'slow' if scale > 1 else 'fast'}"
    lines = [f"  time scale  {_number(scale)}: the trace {speed}"]
    lines.append(
        f"  load        {_number(load)}: {_number(rate)} of the {_number(rate / load)} requests/s that continuous-serial "
        f"sustains at batch {run['load_batch']}"
    )
    if run["policy_capacity_per_s"] is not None:
        lines.append(
            f"  capacity    {_number(run['policy_capacity_per_s'])} requests/s by {run['policy']} at its own batch, of "
            f"which {_number(100 * run['policy_load'])}% are offered: {state(run['policy_load'], summary)}"
        )
    else:
        lines.append(f"  capacity    of {run['policy']} not known; by what was served: {state(0.0, summary)}")
    return lines


def how_full(summary: dict[str, Any]) -> str:
    """The load of a run in one line: beside its policy's capacity, its word, its time scale and its limits."""
    run = summary["run"]
    if run["load"] is None:
        most = run.get("max_concurrency")
        return "all at once" if most is None else f"closed loop of {most:,} requests"
    share = run.get("policy_load")
    own = "" if share is None else f", {_number(share)} of its capacity: {state(share, summary)}"
    return f"load {_number(run['load'])}{own}; time scale {_number(run['time_scale'])}; SLO {run['slo']}"


def state(policy_load: float, summary: Mapping[str, Any]) -> str:
    """``stable``, ``near saturation`` or ``saturated``: more is offered than the policy sustains, or the backlog grew:
    fewer than 98% of what was offered was served while requests arrived, and latency rose from the run's start to its
    end."""
    served, offered = summary["achieved_request_rate"] or 0.0, summary["offered_request_rate"] or 0.0
    if policy_load > 1 or (served < SETTLED * offered and summary["latency_rises"]):
        return STATES[2]
    return STATES[1] if policy_load > NEAR_SATURATION else STATES[0]


def _claim_lines(summary: dict[str, Any], measured: int, done: int) -> list[str]:
    """What the run's length allows to say about its latencies."""
    lines = []
    low, high = summary["request_latency_mean_ci_low_s"], summary["request_latency_mean_ci_high_s"]
    load = highest_load(summary["run"])
    if low is not None:
        lines.append(f"  mean        95% interval {_span(low, high)} s, from blocks of this run")
    elif load is not None:
        needed = values_for_interval(load)
        why = "the load is not below 1" if needed is None else f"{_trace_length(needed):,} requests are needed at this load"
        lines.append(f"  mean        no interval: {why}")
    if not summary["p99_claimable"]:
        needed = requests_for_p99_claim()
        lines.append(
            f"  P99         cannot be claimed from {done} of {measured} measured requests: {needed}, all done, are needed"
            f" (a trace of {_trace_length(needed)})"
        )
    return lines


def _error_lines(run: dict[str, Any]) -> list[str]:
    """What the latencies and the capacity would be if all times of the profile were off."""
    if (error := run.get("profile_error")) is None:
        return []
    latency = "  ".join(f"{name} {_ends(error[f'request_latency_{name}_s'])}" for name in ("mean", "p50", "p99"))
    words = list(dict.fromkeys(word for word in error["state"] if word))
    capacity = f"; capacity {_ends(error['policy_capacity_per_s'])} requests/s" + (f", {' to '.join(words)}" if words else "")
    times = " to ".join(f"{factor:.3g}" for factor in error["times"])
    return [f"  band, s     {latency}{capacity}: all times x {times} ({error['source']})"]


def _ends(values: Sequence[float | None]) -> str:
    low, high = values
    return "-" if low is None or high is None else _span(low, high)


def _busy_lines(summary: dict[str, Any]) -> list[str]:
    """How busy each lane was; of many workers the least and the most."""
    lanes: dict[str, list[float]] = {}
    for name, share in summary.items():
        if name.startswith(UTILISATION):
            lanes.setdefault(name.split("_", 3)[3], []).append(100 * share)
    parts = [  # denoise first
        f"{lane} {min(own):.0f}%" if len(own) == 1 else f"{lane} {min(own):.0f} to {max(own):.0f}% on {len(own)} GPUs"
        for lane, own in sorted(lanes.items(), key=lambda item: (item[0] != "denoise", item[0]))
    ]
    return [f"  lanes busy  {', '.join(parts)}"] if parts else []


def highest_load(run: Mapping[str, Any]) -> float | None:
    """The load, or the rate over what the policy sustains, whichever is higher; None where there is no load."""
    return None if run["load"] is None else max(run["load"], run.get("policy_load") or 0.0)


def _trace_length(measured: int) -> int:
    """Requests of a trace of which so many are measured (``metrics.measured``)."""
    return next(count for count in range(measured, 2 * measured + 2) if measured_count(count) >= measured)


def _span(low: float, high: float) -> str:
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
