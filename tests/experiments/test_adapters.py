"""The Katz study: predictions from component times alone, the ablation, the trace model, layouts, the grid, figures."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from synerdiff.config.experiment import load_experiment
from synerdiff.core import InputError
from synerdiff.experiments.adapter_mix import (
    FITTED,
    MIXES,
    AdapterTrace,
    adapter_requests,
    adapter_sets,
    cache_curves,
    loads_per_request,
)
from synerdiff.experiments.compare import compare
from synerdiff.experiments.grid import Grid
from synerdiff.experiments.h800 import h800_adapters, h800_profile
from synerdiff.experiments.layouts import STRATEGIES, Demand, ablation, divide, layout, worker_image_s
from synerdiff.experiments.report import publish
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.sweep import run_sweep
from tests.golden.tables import Here

DATA = os.environ.get("SYNERDIFF_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="SYNERDIFF_DATA names no folder with the published latencies")


def test_latency_and_gpu_seconds_of_every_strategy() -> None:
    cases = {case.name: case for case in ablation(3, 2)}
    full, base, old = cases["all three"], cases["compiled denoiser, direct merge"], cases["diffusers"]
    assert (full.latency_s, old.latency_s) == pytest.approx((2.017, 14.500), abs=1e-3)
    assert (full.gpus, base.gpus, old.gpus) == (8, 1, 1)
    # Each strategy shortens the latency when it is added to nothing and lengthens it when it is taken away.
    for name in ("ControlNet service", "asynchronous LoRAs", "guidance on two GPUs"):
        assert cases[f"+ {name}"].latency_s < base.latency_s
        assert cases[f"all but {name}"].latency_s > full.latency_s
    # The published finding: seven times as fast as diffusers, and more GPU-seconds than it.
    assert old.latency_s / full.latency_s > 7
    assert full.gpu_seconds > old.gpu_seconds > base.gpu_seconds


def test_estimated_profiles_say_so_and_come_back_from_their_folder(tmp_path: Path) -> None:
    from synerdiff.profile.adapters import load_adapters, write_adapters
    from synerdiff.profile.folder import load_profile, write_profile

    for system in ("diffusers", "katz"):
        profile, adapters = h800_profile(system), h800_adapters(system)
        folder = tmp_path / system
        write_profile(folder, profile)
        write_adapters(folder, adapters)
        again = load_profile(folder)
        assert again.estimated
        assert {rows: again.step_ns(rows) for rows in (1, 2, 16)} == {r: profile.step_ns(r) for r in (1, 2, 16)}
        assert all(part["source"] for part in again.head.notes["assumptions"].values())
        assert load_adapters(folder, profile.name) == adapters


@pytest.mark.parametrize(("service", "kind"), MIXES)
def test_adapter_sets_keep_their_number_and_their_popularity(service: str, kind: str) -> None:
    asked = list(islice(adapter_sets(service, kind, 4), 20_000))
    assert asked == list(islice(adapter_sets(service, kind, 4), 20_000))
    assert all(len(set(names)) == len(names) for names in asked)
    uses = [name for names in asked for name in names]
    assert len(uses) / len(asked) == pytest.approx(MIXES[service, kind].per_request, rel=0.02)
    top_share = MIXES[service, kind].popularity()[0]
    # Without one twice in a request the first rank is a little less popular than alone.
    assert 0.6 * top_share < uses.count(f"{kind}1") / len(uses) < 1.4 * top_share


def test_an_unknown_mix_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="no adapter mix 'C lora'; known are A lora, B lora"):
        next(adapter_sets("C", "lora", 0))


def test_more_room_never_means_more_loads_under_lru() -> None:
    found = [loads_per_request("A", "lora", "lru", size, 3000) for size in range(1, 8)]
    assert found == sorted(found, reverse=True)


@needs_data
def test_the_trace_model_predicts_the_published_cache_curves() -> None:
    curves = cache_curves(Path(str(DATA)), 10_000)
    predicted = [point for point in curves if not point.fitted and point.kind == "lora" and point.error is not None]
    assert len(predicted) == 2 * (10 - len(FITTED[1]) + 10)
    # Loads per request, of 1.9 (A) and 0.9 (B) at size 1: LRU within 0.1, LFU, which is noisier, within 0.12.
    assert max(abs(point.error or 0) for point in predicted if point.rule == "lru") < 0.1
    assert max(abs(point.error or 0) for point in predicted if point.rule == "lfu") < 0.12


def test_gpus_are_divided_for_the_highest_throughput() -> None:
    # Eight GPUs, a worker needs 3 s an image, a service 1 s: 6 workers (2/s) keep 2 services (2/s) busy.
    assert divide(8, ("service",), 3.0, 1.0) == (6, 2)
    assert divide(8, (), 3.0, 1.0) == (8, 0)
    assert divide(9, ("two-gpus",), 3.0, 1.0) == (4, 0)
    assert divide(4, STRATEGIES, 3.0, 1.0) == (1, 1)
    with pytest.raises(InputError, match="a ControlNet service beside a worker of 2 GPUs needs 3; 2 were given"):
        divide(2, STRATEGIES, 1.0, 1.0)


@pytest.mark.parametrize("strategies", [(), ("service",), ("two-gpus",), STRATEGIES])
def test_layouts_use_no_more_gpus_than_given(strategies: tuple[str, ...]) -> None:
    profile, adapters = h800_profile("katz"), h800_adapters("katz")
    for gpus in (4, 7, 16):
        cluster = layout(gpus, strategies, Demand(50, 1.8, 1.9, 0.5), profile, adapters, 380, 0, ("a",))
        assert len(cluster.gpus) <= gpus
        assert max(cluster.gpus) < gpus


STUDY = """
name: study
report: adapters
profiles: h800-sdxl-katz
fleets:
  - {name: base, strategies: [], gpus: 4, host_cache_mib: 15200}
  - {name: asynchronous, strategies: [asynchronous], gpus: 4, host_cache_mib: 15200}
  - {name: halves, strategies: [two-gpus], gpus: 4, host_cache_mib: 15200}
  - {name: pair, cluster: {workers: [{denoise_gpu: 0}, {denoise_gpu: 1}]}, router: least-work}
baselines: base
workloads:
  - {name: service, generator: adapters, parameters: {service: A, steps: 5}, lora_share: [0.0, 0.5]}
policies: [{policy: continuous-serial, batch: 1}]
loads: 0.4
saturation: 200
seeds: 1
requests: 60
"""


def study(folder: Path, *changes: tuple[str, str]) -> Grid:
    text = STUDY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "study.yaml").write_text(text)
    return Grid(load_experiment(folder / "study.yaml"), folder, folder / "out")


def test_a_grid_of_fleets_from_file_to_figures(tmp_path: Path) -> None:
    made = study(tmp_path)
    assert made.size == 4 * 2 * 2
    results = run_sweep(made, Here())
    rows = {(row["fleet"], row["lora_share"], row["load"]): row for row in results.rows}
    assert len(rows) == 16
    paired = compare(results.rows, by="fleet")
    cell = next(cell for cell in paired.values if (cell.lora_share, cell.gpus) == (0.5, 4))
    gains = {at: paired.gain(cell, at, "asynchronous", "base") for at in (("mean", 0.4), ("cost", None))}
    assert all(gain is not None and gain.ratio > 1 for gain in gains.values())
    # Halving the guidance over two GPUs costs throughput: a row alone is less efficient than two together.
    cost = "gpu_seconds_per_image"
    assert rows["halves", 0.0, None][cost] > rows["base", 0.0, None][cost]
    for row in results.rows:
        assert row["busy_gpu_seconds_per_image"] <= row[cost] * 1.001
    profile, adapters = h800_profile("katz"), h800_adapters("katz")
    alone_s = worker_image_s((), Demand.of("A", 5, 0.0), profile, adapters, 380 << 20)
    assert rows["base", 0.0, None][cost] == pytest.approx(alone_s, rel=0.03)
    rows_shown: Any = publish(made.experiment, results)[0][1]
    shown = {row[:4]: row[4] for row in rows_shown}
    assert shown["asynchronous", "4", "service, 50% with LoRAs", "0.4"].startswith("1.")
    assert shown["base", "4", "service, 50% with LoRAs", "all wait"] == "1x"
    names = {path.name for path in (tmp_path / "out").rglob("*.*")}
    assert {"runs.parquet", "speedups.csv", "alone.csv", "caches.csv", "caches.png", "strategies-alone.png"} <= names


def test_every_fleet_of_so_many_gpus_meets_the_same_requests(tmp_path: Path) -> None:
    runs = [run for run in study(tmp_path).runs({}) if run.load and run.cell.lora_share == 0.5]
    asked = {run.cell.fleet: arrivals(run.source).requests for run in runs}
    assert asked["base"] == asked["asynchronous"] == asked["halves"]
    assert {len(request.loras) > 0 for request in asked["base"]} == {True, False}
    at = {run.cell.fleet: run.spec.load for run in runs}
    assert (at["base"], at["pair"]) == (None, 0.4), "a cluster of its own is stretched to the load as elsewhere"


def test_another_rate_or_share_leaves_the_rest_of_the_requests() -> None:
    base = AdapterTrace(lora_share=0.5, requests=50, seed=3)
    fast, all_of_them = base.model_copy(update={"rate_per_s": 2.0}), base.model_copy(update={"lora_share": 1.0})
    requests = adapter_requests(base)
    for one, other in zip(requests, adapter_requests(fast), strict=True):
        assert other.arrival_ns == pytest.approx(one.arrival_ns / 2, abs=1)
        assert (one.loras, one.controlnets) == (other.loras, other.controlnets)
    assert [r.controlnets for r in requests] == [r.controlnets for r in adapter_requests(all_of_them)]
    assert all(r.loras for r in adapter_requests(all_of_them))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("service: A", "service: C", "workload 'service': service is 'C'; it must be 'A' or 'B'"),
        ("steps: 5", "steps: 0", "workload 'service': steps is 0; it must be greater than or equal to 1"),
        ("steps: 5", "shape: 5", "workload 'service': there is no field 'shape'; known are service, lora_share, steps"),
        ("lora_share: [0.0, 0.5]", "lora_share: 2", r"lora_share\[0\] is 2; it must be less than or equal to 1"),
        (", lora_share: [0.0, 0.5]", "", r"workloads\[0\]: lora_share and the generator adapters belong together"),
        ("gpus: 4", "gpus: 2", "fleet 'base': strategies divide gpus, at least 4 of them"),
        (", strategies: [], gpus: 4", "", r"fleets\[0\]: fleet 'base' needs exactly one of gpus, kinds, cluster"),
        (", gpus: 4", "", "fleet 'base': strategies divide gpus, at least 4 of them"),
        ("router: least-work", "gpus: 2", "fleet 'pair': gpus excludes cluster, which has its own"),
        ("router: least-work", "degree: 2", "fleet 'pair': degree, stages and link belong to gpus and kinds"),
        ("denoise_gpu: 1", "denoise_gpu: 0", "fleet 'pair': GPU 0 belongs to workers"),
        ("router: least-work", "router: nearest", "there is no router 'nearest'"),
        (
            "profiles: h800-sdxl-katz",
            "profiles: digits-cpu",
            "strategies need workloads of the generator adapters, and",
        ),
        ("baselines: base", "baselines: bass", "baselines: 'bass' is none of base, asynchronous, halves, pair"),
        ("name: halves", "name: base", "two fleets are both 'base'"),
    ],
)
def test_a_grid_of_fleets_is_checked(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        study(tmp_path, (old, new)).runs({})
