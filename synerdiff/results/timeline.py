"""Records of a run as Chrome trace events: open the file at ui.perfetto.dev or chrome://tracing.

Every GPU is a process and every lane a thread, both numbered from 1 (Perfetto takes 0 for none); a piece of work is a
complete event in microseconds. A request is an asynchronous slice that holds its stages, and a flow leads each sample
from its first step over its last one through its chunks. How many requests wait, are denoised and are decoded is a
counter track. Standard library only, besides the frames that come in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
_REQUESTS_PROCESS = 1_000_000
"""Requests have a process of their own, after those of all GPUs."""


def trace_events(work: pandas.DataFrame, requests: pandas.DataFrame | None = None) -> list[dict[str, Any]]:
    """Events in the Trace Event Format: names of lanes, one complete event per piece of work, flows, then requests.

    ``work``: columns of work.parquet; ``requests``: columns of requests.parquet, of which only requests that are done
    are shown (the others have no times).
    """
    events: list[dict[str, Any]] = []
    places: dict[tuple[int, str], dict[str, int]] = {}
    lanes = {(int(gpu), str(lane)) for gpu, lane in zip(work["gpu"], work["lane"], strict=True)}
    for gpu, lane in sorted(lanes, key=lambda key: (key[0], key[1] != "denoise", key[1])):
        thread = 1 + sum(key[0] == gpu for key in places)
        place = places[gpu, lane] = {"pid": gpu + 1, "tid": thread}
        if thread == 1:
            events.append(_metadata("process_name", place, {"name": f"GPU {gpu}"}))
        events.append(_metadata("thread_name", place, {"name": lane}))
        events.append(_metadata("thread_sort_index", place, {"sort_index": thread}))
    records = [(row, places[int(row["gpu"]), str(row["lane"])]) for row in work.to_dict("records")]
    events += [_work_event(row, place) for row, place in records]
    events += _flows(records)
    return events if requests is None else events + _requests(requests)


def write_timeline(path: Path, work: pandas.DataFrame, requests: pandas.DataFrame | None = None) -> None:
    """Write the events as one JSON file, in one step; InputError when it cannot be written."""
    document = {"displayTimeUnit": "ms", "traceEvents": trace_events(work, requests)}
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _metadata(name: str, place: dict[str, int], content: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, **place, "args": content}


def _work_event(row: Any, place: dict[str, int]) -> dict[str, Any]:
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
    times = {"ts": start_ns / _NS_PER_US, "dur": (int(row["end_ns"]) - start_ns) / _NS_PER_US}
    return {"ph": "X", "name": name, "cat": str(row["kind"]), **place, **times, "args": content}


def _flows(records: Sequence[tuple[Any, dict[str, int]]]) -> list[dict[str, Any]]:
    """Per sample an arrow from the first step to the last one and on through the chunks, bound to their slices."""
    stops: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for row, place in sorted(records, key=lambda record: int(record[0]["start_ns"])):
        if row["kind"] in ("step", "chunk"):
            for sample in str(row["sample_ids"]).split(";"):
                steps, chunks = stops.setdefault(sample, ([], []))
                (steps if row["kind"] == "step" else chunks).append({**place, "ts": int(row["start_ns"]) / _NS_PER_US})
    events = []
    for number, (sample, (steps, chunks)) in enumerate(stops.items(), start=1):
        way = steps[:1] + steps[1:][-1:] + chunks
        marks = ["s", *["t"] * (len(way) - 2), "f"] if len(way) > 1 else []
        for mark, stop in zip(marks, way, strict=False):
            bound = {"bp": "e"} if mark == "f" else {}
            events.append({"ph": mark, "name": f"sample {sample}", "cat": "sample", "id": number, **bound, **stop})
    return events


def _requests(requests: pandas.DataFrame) -> list[dict[str, Any]]:
    """A slice per request that holds its stages (of its last-finishing image), and counters of requests by stage."""
    place = {"pid": _REQUESTS_PROCESS, "tid": 1}
    events = [_metadata("process_name", place, {"name": "requests"})]
    changes: dict[int, list[tuple[str, int]]] = {}
    for row in requests[requests["status"] == "done"].to_dict("records"):
        # Slices of one id nest in the order in which they are written.
        whole = (f"request {int(row['request_id'])}", "arrival_s", "finished_s")
        inside = [mark for name, begin, end in _PHASES for mark in (("b", name, begin, 1), ("e", name, end, -1))]
        for mark, name, column, change in [("b", *whole[:2], 1), *inside, ("e", whole[0], whole[2], -1)]:
            at_ns = round(float(row[column]) * NS_PER_S)
            both = {"name": name, "cat": "request", "id": int(row["request_id"]) + 1, **place}
            events.append({"ph": mark, **both, "ts": at_ns / _NS_PER_US})
            if name != whole[0]:
                changes.setdefault(at_ns, []).append((name, change))
    levels = {phase: 0 for phase, _, _ in _PHASES}
    for at_ns in sorted(changes):
        for phase, change in changes[at_ns]:
            levels[phase] += change
        events.append({"ph": "C", "name": "requests", **place, "ts": at_ns / _NS_PER_US, "args": dict(levels)})
    return events
