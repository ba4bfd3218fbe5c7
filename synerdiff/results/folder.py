"""What ``simulate`` and ``run`` share: the folder of a run, how its files are written, and the progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    import pyarrow

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
    from synerdiff.results import records
    from synerdiff.files import atomic
    from synerdiff.results.timeline import write_timeline

    with ExitStack() as stack:
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        stack.enter_context(atomic(out / "summary.json")).write_text(text, encoding="utf-8")
        if timeline:
            write_timeline(stack.enter_context(atomic(out / "timeline.json")), frames[1], frames[0])
        records.store(stack.enter_context(atomic(out / "work.parquet")), tables[1])
        records.store(stack.enter_context(atomic(out / "requests.parquet")), tables[0])
    if not timeline:
        (out / "timeline.json").unlink(missing_ok=True)


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
    lost = summary["error_request_count"]
    lines = [
        f"  requests    {summary['trace_request_count']}, of which {summary['measured_request_count']} measured"
        f" and {lost} unfinished, rejected or failed",
        f"  load        {_number(run['load'])}",
        f"  latency, s  {latency}",
        f"  stages, s   {stages}",
        f"  throughput  {_number(summary['request_throughput'])} requests/s, "
        f"{_number(summary['image_throughput'])} images/s",
        f"  goodput     {_number(summary['goodput'])} requests/s within their SLO "
        f"({_number(100 * summary['good_fraction'])}% of them)",
        f"  skipped     {_number(100 * summary['skip_fraction'])}% of guided steps",
    ]
    if "gpus" in run:
        lines += [
            f"  GPU-seconds {_number(run['gpu_seconds_per_image'])} an image held, "
            f"{_number(run['busy_gpu_seconds_per_image'])} busy",
            f"  adapters    {run['lora_requested']} LoRAs asked for, {run['lora_reads']} read, {run['lora_copies']} "
            f"copied; {run['controlnet_loads']} ControlNets loaded",
        ]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
