"""The Chrome trace of a tiny run, event by event."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from synerdiff.core import InputError
from synerdiff.results.timeline import trace_events, write_timeline

WORK = pd.DataFrame(
    {
        "gpu": [0, 0, 1],
        "lane": ["denoise", "decode0", "decode1"],
        "kind": ["step", "chunk", "chunk"],
        "start_ns": [0, 1_500, 2_000],
        "end_ns": [1_500, 4_000, 9_000],
        "rows": [3, 0, 0],
        "pad_rows": [1, 0, 0],
        "sample_ids": ["0.0;1.0", "0.0", "1.0"],
        "modes": ["gr", "", ""],
        "chunk": [-1, 0, 2],
        "exclusive": [False, True, False],
        "forced": [False, False, True],
    }
)
REQUESTS = pd.DataFrame(
    {
        "request_id": [0, 1, 2],
        "arrival_s": [0.0, 1.0, 2.0],
        "admitted_s": [1.0, 1.0, None],
        "denoised_s": [3.0, 4.0, None],
        "finished_s": [5.0, 5.0, None],
        "status": ["done", "done", "rejected"],
    }
)


def test_lanes_are_named_threads_of_their_gpu() -> None:
    found = [(e["name"], e["pid"], e["tid"], e["args"]) for e in trace_events(WORK) if e["ph"] == "M"]
    names = [entry for entry in found if entry[0] != "thread_sort_index"]
    assert names == [
        ("process_name", 1, 1, {"name": "GPU 0"}),
        ("thread_name", 1, 1, {"name": "denoise"}),
        ("thread_name", 1, 2, {"name": "decode0"}),
        ("process_name", 2, 1, {"name": "GPU 1"}),
        ("thread_name", 2, 1, {"name": "decode1"}),
    ]


def test_work_is_complete_events_in_microseconds() -> None:
    step, first, second = [event for event in trace_events(WORK) if event["ph"] == "X"]
    assert step == {
        "ph": "X", "name": "step of 3 rows", "cat": "step", "pid": 1, "tid": 1, "ts": 0.0, "dur": 1.5,
        "args": {"samples": "0.0;1.0", "rows": 3, "pad_rows": 1, "modes": "gr"},
    }  # fmt: skip
    assert first["name"] == "0.0 chunk 0"
    assert (first["tid"], first["ts"], first["dur"]) == (2, 1.5, 2.5)
    assert second["args"] == {"samples": "1.0", "chunk": 2, "exclusive": False, "forced": True}
    assert (second["pid"], second["tid"]) == (2, 1)


def test_no_process_or_thread_is_number_zero() -> None:
    assert all(event["pid"] > 0 and event["tid"] > 0 for event in trace_events(WORK, REQUESTS))


def test_a_request_holds_its_stages_one_after_the_other() -> None:
    events = [e for e in trace_events(WORK, REQUESTS) if e["ph"] in "be" and e["id"] == 1]
    assert [(e["ph"], e["name"], e["ts"] / 1e6) for e in sorted(events, key=lambda e: e["ts"])] == [
        ("b", "request 0", 0.0), ("b", "waiting", 0.0), ("e", "waiting", 1.0), ("b", "denoising", 1.0),
        ("e", "denoising", 3.0), ("b", "decoding", 3.0), ("e", "decoding", 5.0), ("e", "request 0", 5.0),
    ]  # fmt: skip
    assert {e["id"] for e in trace_events(WORK, REQUESTS) if e["ph"] == "b"} == {1, 2}, "only those that are done"


def test_a_flow_leads_a_sample_from_its_steps_to_its_chunks() -> None:
    two = pd.concat([WORK.iloc[[0]], WORK.iloc[[0]].assign(start_ns=1_500, end_ns=1_900), WORK.iloc[1:]])
    flows = [e for e in trace_events(two) if e["ph"] in "stf"]
    ways = {name: [(e["ph"], e["pid"], e["tid"], e["ts"]) for e in flows if e["name"] == name] for name in
            ("sample 0.0", "sample 1.0")}  # fmt: skip
    assert ways["sample 0.0"] == [("s", 1, 1, 0.0), ("t", 1, 1, 1.5), ("f", 1, 2, 1.5)]
    assert ways["sample 1.0"] == [("s", 1, 1, 0.0), ("t", 1, 1, 1.5), ("f", 2, 1, 2.0)]
    assert all(e["bp"] == "e" for e in flows if e["ph"] == "f")


def test_counters_count_requests_in_each_phase() -> None:
    counts = [(e["ts"] / 1e6, *e["args"].values()) for e in trace_events(WORK, REQUESTS) if e["ph"] == "C"]
    assert counts == [(0.0, 1, 0, 0), (1.0, 0, 2, 0), (3.0, 0, 1, 1), (4.0, 0, 0, 2), (5.0, 0, 0, 0)]


def test_the_file_is_one_json_document(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "timeline.json"
    write_timeline(path, WORK, REQUESTS)
    document = json.loads(path.read_text())
    assert document["traceEvents"] == trace_events(WORK, REQUESTS)
    with pytest.raises(InputError, match="cannot be written"):
        write_timeline(path / "inside-a-file.json", WORK)


def test_work_of_adapters_has_names_of_its_own() -> None:
    kinds = {
        "merge": "merge of a LoRA",
        "restore": "restore of weights",
        "load": "load",
        "controlnet": "ControlNet of 4 rows",
        "half": "unconditional half of 4 rows",
    }
    work = WORK.iloc[[0] * len(kinds)].assign(
        lane=["denoise", "denoise", "loader", "controlnet", "guidance"],
        kind=list(kinds),
        rows=[0, 0, 0, 4, 4],
        modes="",
    )
    events = {e["cat"]: e for e in trace_events(work) if e["ph"] == "X"}
    assert {kind: event["name"] for kind, event in events.items()} == kinds
    assert events["merge"]["args"] == {"samples": "0.0;1.0"}
    assert events["half"]["args"] == {"samples": "0.0;1.0", "rows": 4}
    assert not any("chunk" in event["name"] for event in events.values())
