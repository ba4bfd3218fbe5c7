"""The three mechanisms of SwiftDiffusion on a CPU: predicted latency of one request against the measured one.

``python -m benchmarks.swift_on_cpu --out FILE.csv``. In one process: profile and adapters.csv are measured, then every
way of serving takes its turn again and again with one request alone, then both are measured once more. The simulator
gets the means of the two measurements. Processes beside the worker are the runner's own.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from policies.registry import build_policy
from profiler.adapter_cells import measure_adapters
from profiler.measure import measure_profile
from profiler.settings import make_settings
from real_runner.adapters.opening import open_serving
from real_runner.adapters.serving import Folders, Serving
from real_runner.engine import run_real
from real_runner.hardware import Hardware, open_hardware
from simulator import simulate_cluster
from synerdiff.adapters import Adapters
from synerdiff.cluster import MIB, Cluster, cluster_of
from synerdiff.core import NS_PER_S, Request, RunResult
from synerdiff.diffusion.controlnet import random_controlnet
from synerdiff.diffusion.loading import load_model
from synerdiff.diffusion.lora import random_lora, save_lora
from synerdiff.profile import Profile, Spread

BOUND = 5
RANK = 16
NET, LORA = ("net",), ("style",)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "plain": ({}, (), ()),
    "ControlNet inline": ({}, NET, ()),
    "ControlNet as a service": ({"controlnets": "service"}, NET, ()),
    "LoRA synchronous": ({}, (), LORA),
    "LoRA asynchronous": ({"loras": "asynchronous", "lora_bound_steps": BOUND}, (), LORA),
    "guidance in two processes": ({"guidance": "two-gpus"}, (), ()),
    "ControlNet and LoRA, all in one process": ({}, NET, LORA),
    "ControlNet and LoRA, service and asynchronous": (
        {"controlnets": "service", "loras": "asynchronous", "lora_bound_steps": BOUND},
        NET,
        LORA,
    ),
}
"""Name -> strategies, ControlNets and LoRAs of the request."""


def cluster_for(strategies: dict[str, Any], lora_bytes: int) -> Cluster:
    worker: dict[str, Any] = {"denoise_gpu": 0}
    if strategies.get("guidance") == "two-gpus":
        worker["guidance_gpu"] = 1
    services = [{"gpu": 2, "controlnets": list(NET)}] if strategies.get("controlnets") == "service" else []
    fields = {"workers": [worker], "strategies": strategies, "controlnet_services": services}
    return cluster_of({**fields, "loras": {"mib": lora_bytes / MIB}})


def make_folders(root: Path) -> tuple[Folders, int]:
    """A LoRA, a ControlNet and a conditioning image; and the LoRA's bytes."""
    model = load_model("digits")
    for name in ("loras", "controlnets", "images"):
        (root / name).mkdir()
    size = save_lora(random_lora(model.unet, LORA[0], RANK), root / "loras" / f"{LORA[0]}.safetensors").size_bytes
    random_controlnet(NET[0], model).net.save_pretrained(str(root / "controlnets" / NET[0]))
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(root / "images" / "1.png")
    return Folders(root / "loras", root / "controlnets", root / "images"), size


def measured_tables(folder: Path) -> tuple[Profile, Adapters]:
    profile = measure_profile(make_settings("digits", "cpu", rows="1,2", quick=True), folder)
    return profile, measure_adapters(profile, torch.device("cpu"))


def mean_of(first: tuple[Profile, Adapters], second: tuple[Profile, Adapters]) -> tuple[Profile, Adapters]:
    """Means of the medians of two measurements."""

    def mean(a: Spread, b: Spread) -> Spread:
        value = (a.median + b.median) // 2
        return Spread(value, value, value, a.n + b.n)

    (profile, adapters), (later, later_adapters) = first, second
    steps = {rows: mean(spread, later.steps[rows]) for rows, spread in profile.steps.items()}
    chunks = {
        name: tuple(mean(a, b) for a, b in zip(spreads, later.chunks[name], strict=True))
        for name, spreads in profile.chunks.items()
        if name in later.chunks and len(later.chunks[name]) == len(spreads)
    }
    overheads = {name: mean(spread, later.overheads[name]) for name, spread in profile.overheads.items()}
    tables = {
        name: {at: mean(spread, later_adapters.tables[name][at]) for at, spread in table.items()}
        for name, table in adapters.tables.items()
    }
    corun = {key: cells for key, cells in profile.corun.items() if key[0] in chunks}
    memos: dict[str, Any] = {"_bucket_memo": {}, "_step_memo": {}, "_slowdown_memo": {}}
    means = replace(profile, steps=steps, chunks=chunks, corun=corun, overheads=overheads, **memos)
    return means, Adapters("mean", tables)


def latency_s(result: RunResult) -> float:
    record = result.requests[0]
    assert record.status == "done", record
    return (record.finished_ns - record.request.arrival_ns) / NS_PER_S


def serve_all(
    cases: dict[str, tuple[Serving, Request]], profile: Profile, hardware: Hardware, repeats: int
) -> tuple[dict[str, list[float]], dict[tuple[str, str], list[int]]]:
    """Seconds of each run, and the durations (ns) of each case's pieces by kind; cases take turns in going first."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    pieces: dict[tuple[str, str], list[int]] = {}
    names = list(cases)
    for repeat in range(-1, repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            serving, request = cases[name]
            policy = build_policy("continuous-serial", {"batch": 1})
            run = run_real([request], policy, profile, hardware, serving=serving)
            assert run.error is None, name
            assert not run.faults, (name, run.faults)
            if repeat >= 0:
                found[name].append(latency_s(run.result))
                for work in run.result.work:
                    pieces.setdefault((name, work.kind), []).append(work.end_ns - work.start_ns)
    return found, pieces


def compare(steps: int, repeats: int, out: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        root = Path(name)
        folders, lora_bytes = make_folders(root)
        before = measured_tables(root / "before")
        profile = before[0]
        hardware = stack.enter_context(open_hardware("digits", "cpu", profile))
        cases = {}
        clusters = {}
        for case, (strategies, controlnets, loras) in CASES.items():
            request = Request(0, 0, steps, guidance_scale=4.0, seed=1, controlnets=controlnets, loras=loras)
            clusters[case] = cluster_for(strategies, lora_bytes)
            serving = stack.enter_context(open_serving(hardware, clusters[case], [request], folders))
            cases[case] = serving, request
        measured, pieces = serve_all(cases, profile, hardware, repeats)
        after = measured_tables(root / "after")
        times, adapters = mean_of(before, after)
        rows = []
        for case, (_, request) in cases.items():
            simulated = simulate_cluster(
                [request],
                lambda: build_policy("continuous-serial", {"batch": 1}),
                times,
                clusters[case],
                adapters=adapters,
            )
            predicted = latency_s(simulated.run)
            middle = median(measured[case])
            rows.append(
                [case, len(measured[case]), predicted, middle, min(measured[case]), max(measured[case]),
                 middle / predicted - 1]
            )  # fmt: skip
            say(
                f"{case:<48} predicted {predicted * 1e3:7.1f} ms  measured {middle * 1e3:7.1f} ms "
                f"({min(measured[case]) * 1e3:.1f} to {max(measured[case]) * 1e3:.1f})  {middle / predicted - 1:+.1%}"
            )
    say("medians of pieces, ms: " + ", ".join(
        f"{case}, {kind} {median(spent) / 1e6:.2f}" for (case, kind), spent in pieces.items()
    ))  # fmt: skip
    alone = {name: adapters.tables[name] for name in ("controlnet_forward", "denoise_encoder", "denoise_decoder")}
    say("alone, ms by rows: " + ", ".join(
        f"{name} {at}: {spread.median / 1e6:.2f}" for name, table in alone.items() for at, spread in table.items()
    ))  # fmt: skip
    say(f"steps alone, ms: {[(rows, spread.median / 1e6) for rows, spread in times.steps.items()]}")
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "runs", "predicted_s", "measured_s", "least_s", "largest_s", "error"])
        writer.writerows([[*row[:2], *(f"{value:.5f}" for value in row[2:])] for row in rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    compare(given.steps, given.repeats, given.out, print)
