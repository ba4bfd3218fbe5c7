"""Metrics of one run: pure functions on the two tables of its records (columns: ``docs/file-formats.md``).

Names follow AIPerf where it has one. Durations end in ``_s``; throughputs and rates are per second. The measured
requests are those left, in order of arrival, after the first 10% (warm-up) and the last 5% (tail) are set aside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from typing import Any

import numpy as np
import pandas as pd

from synerdiff.core import NS_PER_S, InputError, RequestRecord
from synerdiff.results.intervals import (
    Interval,
    blocks_interval,
    p99_upper_bound,
    requests_for_p99_claim,
    rises,
    values_for_interval,
)

WARMUP_PERCENT = 10
TAIL_PERCENT = 5
SLO_FACTOR = 3.0
STAGES = ("queue", "denoise", "decode_wait", "decode")
_STAGE_ENDS = ("arrival_s", "admitted_s", "denoised_s", "decode_started_s", "finished_s")


def measured(requests: pd.DataFrame) -> pd.DataFrame:
    """The requests after warm-up and before the tail, by arrival (ties: request_id).

    The first floor(10%) and the last floor(5%) are set aside.
    """
    ordered = requests.sort_values(["arrival_s", "request_id"], kind="stable")
    start = len(ordered) * WARMUP_PERCENT // 100
    return ordered.iloc[start : start + measured_count(len(ordered))]


def measured_count(count: int) -> int:
    """How many of so many requests are measured."""
    return count - count * WARMUP_PERCENT // 100 - count * TAIL_PERCENT // 100


def latencies_s(records: Iterable[RequestRecord]) -> list[float]:
    """Arrival to finish of the requests that are done; the others have no latency."""
    return [(r.finished_ns - r.request.arrival_ns) / NS_PER_S for r in records if r.status == "done"]


def skip_fraction(requests: pd.DataFrame) -> float:
    """Skipped / guided sample-steps of the requests that are done; 0 where none is guided."""
    guided = requests[(requests["status"] == "done") & (requests["guidance_scale"] > 1)]
    return _ratio(guided["skipped_steps"].sum(), (guided["images"] * guided["steps"]).sum()) or 0.0


def stages(requests: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each request's latency by stage: queue (arrival to admission, text encoding included), denoise,
    decode_wait, decode (to the end of the copy). The four add up to request_latency. Requests that are done only."""
    done = requests[requests["status"] == "done"]
    times = [done[column].astype(float) for column in _STAGE_ENDS]
    return pd.DataFrame({stage: end - start for stage, start, end in zip(STAGES, times, times[1:], strict=False)})


def slo_s(requests: pd.DataFrame, solo_latency_s: Iterable[float]) -> pd.Series[float]:
    """Each request's limit: its own slo_s, else 3 times its solo latency (same order as the rows)."""
    default = pd.Series(list(solo_latency_s), index=requests.index, dtype=float) * SLO_FACTOR
    return requests["slo_s"].astype(float).fillna(default)


def summarize(
    requests: pd.DataFrame, work: pd.DataFrame, solo_latency_s: Iterable[float], load: float | None = None
) -> dict[str, Any]:
    """All metrics of a run, flat and ready for JSON (None where a value does not exist).

    ``solo_latency_s``: per row of ``requests``, its latency alone (``capacity.solo_latency_ns``); a request without
    an SLO of its own is good when it takes at most 3 times that. ``load``: the offered load, where it is defined.

    - trace_request_count, unfinished_count, rejected_count, failed_count, error_request_count (their sum): over the
      whole run, trimmed requests included.
    - measured_request_count; request_count: those of them that are done; warmup_request_count, tail_request_count.
    - request_latency_mean_s / _p50_s / _p90_s / _p99_s over the done ones. request_latency_mean_ci_low_s and
      _ci_high_s (95%): by the means of 10 blocks (``intervals.blocks_interval``); None where the run has too few
      requests for its load, or no load. Percentiles of one run have no interval: latencies are correlated.
    - latency_rises: from the run's start to its end, at 99% (``intervals.rises``).
    - p99_claimable: at least 459 measured requests, all of them done; request_latency_p99_upper_s: the bound that P99
      can be claimed at 99% confidence not to exceed. slo_p99_claimable: "99% of requests meet their SLO" can be.
    - benchmark_duration_s: from the first measured arrival to the last measured finish. request_throughput,
      image_throughput, goodput: requests / images / requests within their SLO that finish in it, whichever they are, per
      second. offered_request_rate, offered_image_rate: over the measured arrivals; achieved_request_rate: requests that
      finish between the first and the last of them, per second of that.
    - good_request_count: measured requests within their SLO; good_fraction: of all measured ones.
    - skip_fraction: skipped / guided sample-steps of the done measured requests.
    - queue, denoise, decode_wait, decode: _mean_s and _p99_s of each stage.
    - lane_utilisation_gpuG_LANE: share of the duration in which the lane works.
    """
    if requests.empty:
        raise InputError("the run has no requests, so it has no metrics.")
    table = requests.assign(limit_s=slo_s(requests, solo_latency_s))
    window = measured(table)
    done = window[window["status"] == "done"]
    summary: dict[str, Any] = _counts(requests, window, done)
    latency = done["request_latency_s"].astype(float)
    summary |= _latency(latency.tolist(), len(window), load)
    good = int((latency <= done["limit_s"]).sum())
    summary["good_request_count"] = good
    summary["good_fraction"] = good / len(window)
    summary["slo_p99_claimable"] = requests_for_p99_claim(len(window) - good) <= len(window)
    start_s = float(window["arrival_s"].min())
    end_s = float(done["finished_s"].max() if len(done) else window["arrival_s"].max())
    summary |= _rates(table, window, start_s, end_s)
    summary["skip_fraction"] = skip_fraction(done)
    for stage, values in stages(window).items():
        summary[f"{stage}_mean_s"] = float(values.mean()) if len(values) else None
        summary[f"{stage}_p99_s"] = float(values.quantile(0.99)) if len(values) else None
    return summary | {f"lane_utilisation_{k}": v for k, v in lane_utilisation(work, start_s, end_s).items()}


def _counts(requests: pd.DataFrame, window: pd.DataFrame, done: pd.DataFrame) -> dict[str, int]:
    count = len(requests)
    statuses = requests["status"].value_counts()
    errors = {f"{name}_count": int(statuses.get(name, 0)) for name in ("unfinished", "rejected", "failed")}
    return {
        "trace_request_count": count,
        "warmup_request_count": count * WARMUP_PERCENT // 100,
        "tail_request_count": count * TAIL_PERCENT // 100,
        "measured_request_count": len(window),
        "request_count": len(done),
        "error_request_count": sum(errors.values()),
        **errors,
    }


def _latency(values: list[float], measured_count: int, load: float | None) -> dict[str, Any]:
    summary: dict[str, Any] = {"request_latency_mean_s": float(np.mean(values)) if values else None}
    summary |= mean_interval(values, load)
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        summary[f"request_latency_{name}_s"] = float(np.quantile(values, quantile)) if values else None
    complete = len(values) == measured_count
    summary["latency_rises"] = rises(values)
    summary["p99_claimable"] = complete and measured_count >= requests_for_p99_claim()
    summary["request_latency_p99_upper_s"] = _finite(p99_upper_bound(values)) if values and complete else None
    return summary


def mean_interval(values: Sequence[float], load: float | None) -> dict[str, float | None]:
    """The interval of the mean of one run's latencies, in order of arrival, under its names."""
    interval = blocks_interval(values, values_for_interval(load)) if values else Interval(0.0, -inf, inf, 0)
    bounds = {"low": interval.low, "high": interval.high}
    return {f"request_latency_mean_ci_{name}_s": _finite(bound) for name, bound in bounds.items()}


def _rates(requests: pd.DataFrame, window: pd.DataFrame, start_s: float, end_s: float) -> dict[str, Any]:
    duration_s = end_s - start_s
    finished = requests[
        (requests["status"] == "done") & (requests["finished_s"] > start_s) & (requests["finished_s"] <= end_s)
    ]
    last_s = float(window["arrival_s"].max())
    span_s = last_s - start_s
    return {
        "benchmark_duration_s": duration_s,
        "request_throughput": _ratio(len(finished), duration_s),
        "image_throughput": _ratio(finished["images"].sum(), duration_s),
        "goodput": _ratio((finished["request_latency_s"] <= finished["limit_s"]).sum(), duration_s),
        "offered_request_rate": _ratio(len(window) - 1, span_s),
        "achieved_request_rate": _ratio((finished["finished_s"] <= last_s).sum(), span_s),
        "offered_image_rate": _ratio(window["images"].sum() * (len(window) - 1) / len(window), span_s),
    }


def lane_utilisation(work: pd.DataFrame, start_s: float, end_s: float) -> dict[str, float]:
    """``gpuG_LANE`` -> share of the time from start to end in which the lane works."""
    if end_s <= start_s:
        return {}
    low, high = start_s * NS_PER_S, end_s * NS_PER_S
    inside = (work["end_ns"].clip(upper=high) - work["start_ns"].clip(lower=low)).clip(lower=0)
    busy = inside.groupby("gpu" + work["gpu"].astype(str) + "_" + work["lane"]).sum()
    return {str(lane): float(total) / (high - low) for lane, total in busy.items()}


def saturation_throughput(work: pd.DataFrame) -> float:
    """Samples a second at saturation: decodes that end while full-batch steps still run, the first fifth dropped.

    A full batch is the largest number of samples that any step has. Decodes come in lumps when a batch ends together,
    so the rate is taken over a whole number of batches. InputError when fewer than two batches are left.
    """
    steps = work[work["kind"] == "step"]
    chunks = work[work["kind"] == "chunk"]
    sizes = steps["sample_ids"].str.count(";") + 1
    batch = int(sizes.max()) if len(steps) else 1
    last_full_ns = steps.loc[sizes == batch, "end_ns"].max() if len(steps) else 0
    ends = np.sort(chunks.loc[chunks["chunk"] == chunks["chunk"].max(), "end_ns"].to_numpy())
    ends = ends[ends <= last_full_ns]
    ends = ends[len(ends) // 5 :]
    decodes = (len(ends) - 1) // batch * batch
    if decodes < batch:
        raise InputError("the run is too short for a saturation throughput: fewer than two full batches were decoded.")
    return decodes * NS_PER_S / float(ends[-1] - ends[-1 - decodes])


def backlog(requests: pd.DataFrame) -> pd.DataFrame:
    """time_s, in_system: how many requests have arrived and not finished, at every change.

    Requests that were rejected are left out; unfinished and failed ones stay in the system.
    """
    accepted = requests[requests["status"] != "rejected"]
    finished = accepted["finished_s"].astype(float)[accepted["status"] == "done"]
    changes = pd.concat([pd.Series(1, index=accepted["arrival_s"].astype(float)), pd.Series(-1, index=finished)])
    at_once = changes.groupby(level=0).sum().sort_index()
    return pd.DataFrame({"time_s": at_once.index.to_numpy(float), "in_system": at_once.cumsum().to_numpy(int)})


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole > 0 else None


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
