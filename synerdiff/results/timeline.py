"""Records of a run as Chrome trace events: open the file at ui.perfetto.dev or chrome://tracing.

Every GPU is a process and every lane a thread; a piece of work is a complete event in microseconds; how many requests
wait, are denoised and are decoded is a counter track. Standard library only, besides the frames that come in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.core import NS_PER_S
from synerdiff.files import atomic

if TYPE_CHECKING:
    import pandas

_NS_PER_US = 1000
_PHASES = (
    ("waiting", "arrival_s", "admitted_s"),
    ("denoising", "admitted_s", "denoised_s"),
    ("decoding", "denoised_s", "finished_s"),
)
_ADAPTER_WORK = {
    "merge": "merge of a LoRA",
    "restore": "restore of weights",
    "load": "load",
    "controlnet": "ControlNet",
    "half": "unconditional half",
}
"""Kind -> how its events are called; ControlNets and halves say their rows too."""
_COUNTER_PROCESS = 1_000_000
"""Counters have a process of their own, after those of all GPUs."""


def trace_events(work: pandas.DataFrame, requests: pandas.DataFrame | None = None) -> list[dict[str, Any]]:
    """Events in the Trace Event Format: names of lanes, one complete event per piece of work, then counters.

    ``work``: columns of work.parquet; ``requests``: columns of requests.parquet, of which only requests that are done
    are counted (the others have no times).
    """
    events: list[dict[str, Any]] = []
    threads: dict[tuple[int, str], int] = {}
    lanes = {(int(gpu), str(lane)) for gpu, lane in zip(work["gpu"], work["lane"], strict=True)}
    for gpu, lane in sorted(lanes, key=lambda key: (key[0], key[1] != "denoise", key[1])):
        thread = threads[gpu, lane] = sum(1 for key in threads if key[0] == gpu)
        if thread == 0:
            events.append(_metadata("process_name", gpu, 0, {"name": f"GPU {gpu}"}))
        events.append(_metadata("thread_name", gpu, thread, {"name": lane}))
        events.append(_metadata("thread_sort_index", gpu, thread, {"sort_index": thread}))
    for row in work.to_dict("records"):
        events.append(_work_event(row, threads))
    return events if requests is None else events + _counters(requests)


def write_timeline(path: Path, work: pandas.DataFrame, requests: pandas.DataFrame | None = None) -> None:
    """Write the events as one JSON file, in one step; InputError when it cannot be written."""
    document = {"displayTimeUnit": "ms", "traceEvents": trace_events(work, requests)}
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _metadata(name: str, process: int, thread: int, content: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": content}


def _work_event(row: Any, threads: dict[tuple[int, str], int]) -> dict[str, Any]:
    gpu, lane = int(row["gpu"]), str(row["lane"])
    samples = str(row["sample_ids"])
    content: dict[str, Any] = {"samples": samples}
    if row["kind"] == "step":
        name = f"step of {int(row['rows'])} rows"
        content |= {"rows": int(row["rows"]), "pad_rows": int(row["pad_rows"]), "modes": str(row["modes"])}
    elif row["kind"] in _ADAPTER_WORK:
        name = _ADAPTER_WORK[str(row["kind"])]
        rows = int(row["rows"])
        if rows:
            name += f" of {rows} rows"
            content |= {"rows": rows}
    else:
        name = f"{samples} chunk {int(row['chunk'])}"
        content |= {"chunk": int(row["chunk"]), "exclusive": bool(row["exclusive"]), "forced": bool(row["forced"])}
    start_ns = int(row["start_ns"])
    return {
        "ph": "X",
        "name": name,
        "cat": str(row["kind"]),
        "pid": gpu,
        "tid": threads[gpu, lane],
        "ts": start_ns / _NS_PER_US,
        "dur": (int(row["end_ns"]) - start_ns) / _NS_PER_US,
        "args": content,
    }


def _counters(requests: pandas.DataFrame) -> list[dict[str, Any]]:
    """Requests in each phase (of their last-finishing image), at every change."""
    done = requests[requests["status"] == "done"]
    changes: dict[int, dict[str, int]] = {}
    for phase, begin, end in _PHASES:
        for column, change in ((begin, 1), (end, -1)):
            for seconds in done[column]:
                at_ns = round(float(seconds) * NS_PER_S)
                at_once = changes.setdefault(at_ns, {})
                at_once[phase] = at_once.get(phase, 0) + change
    levels = {phase: 0 for phase, _, _ in _PHASES}
    events = [_metadata("process_name", _COUNTER_PROCESS, 0, {"name": "requests"})]
    for at_ns in sorted(changes):
        for phase, change in changes[at_ns].items():
            levels[phase] += change
        time_us = at_ns / _NS_PER_US
        events.append(
            {"ph": "C", "name": "requests", "pid": _COUNTER_PROCESS, "tid": 0, "ts": time_us, "args": dict(levels)}
        )
    return events
