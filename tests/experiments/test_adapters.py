"""The Katz study: predictions from component times alone, the ablation, the trace model, layouts, the grid, figures."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from synerdiff.core import InputError
from synerdiff.experiments.adapter_mix import FITTED, MIXES, adapter_sets, cache_curves, loads_per_request
from synerdiff.experiments.h800 import h800_adapters, h800_profile
from synerdiff.experiments.layouts import SETS, STRATEGIES, Demand, ablation, divide, layout
from synerdiff.experiments.swift_grid import (
    BASELINE,
    Point,
    SwiftStudy,
    load_study,
    points,
    requests_of,
    run_point,
    speedups,
)

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


@pytest.mark.parametrize("name", SETS)
def test_layouts_use_no_more_gpus_than_given(name: str) -> None:
    profile, adapters = h800_profile("katz"), h800_adapters("katz")
    for gpus in (4, 7, 16):
        cluster = layout(gpus, SETS[name], Demand(50, 1.8, 1.9, 0.5), profile, adapters, 380, 0, ("a",))
        assert len(cluster.gpus) <= gpus
        assert max(cluster.gpus) < gpus


def test_every_set_meets_the_same_requests_and_the_grid_is_complete() -> None:
    study = SwiftStudy(gpus=(4,), lora_shares=(0.5,), loads=(0.4,), seeds=(1,), requests=60, steps=5)
    wanted = points(study)
    assert len(wanted) == len(SETS) * 2
    rates = {tuple(requests_of(point, 0.5)) for point in wanted if point.load}
    assert len(rates) == 1
    rows = [run_point(point) for point in wanted]
    ratios = {(row["strategies"], row["load"]): row["speedup"] for row in speedups(rows)}
    assert ratios[BASELINE, 0.4] == ratios[BASELINE, 0.0] == 1.0
    assert ratios["asynchronous LoRAs", 0.4] > 1.0
    saturated = {row.strategies: row for row in rows if row.load == 0.0}
    # Halving the guidance over two GPUs costs throughput: a row alone is less efficient than two together.
    assert saturated["guidance on two GPUs"].gpu_seconds_per_image > saturated[BASELINE].gpu_seconds_per_image
    for row in rows:
        assert row.busy_gpu_seconds_per_image <= row.gpu_seconds_per_image * 1.001


def test_the_baseline_s_capacity_is_its_closed_form() -> None:
    study = SwiftStudy(gpus=(4,), lora_shares=(0.0,), loads=(0.5,), seeds=(1,), requests=400, steps=5)
    row = run_point(Point(study, BASELINE, 4, 0.0, 0.0, 1))
    from synerdiff.experiments.layouts import worker_image_s
    from synerdiff.experiments.swift_grid import demand_of

    expected = worker_image_s((), demand_of(study, 0.0), h800_profile("katz"), h800_adapters("katz"), 380 << 20)
    assert row.gpu_seconds_per_image == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("service: C\n", "service is 'C'; allowed are A and B"),
        ("gpu: [4]\n", "there is no field 'gpu'; known are service, gpus"),
        ("gpus: [2]\n", "gpus\\[0\\] is 2; it must be greater than or equal to 4"),
    ],
)
def test_a_study_s_file_is_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "swift.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_study(path)


def test_the_study_that_ships_is_valid() -> None:
    study = load_study(Path(__file__).resolve().parents[2] / "experiments" / "swift.yaml")
    assert study == SwiftStudy()


def run_command(function, *arguments: str):
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, list(arguments), env={"SYNERDIFF_DATA": None})


def test_the_swift_command_writes_tables_and_figures(tmp_path: Path) -> None:
    from synerdiff.cli.swift import swift

    path = tmp_path / "swift.yaml"
    path.write_text("gpus: [4]\nlora_shares: [0.5]\nloads: [0.4]\nseeds: [1]\nrequests: 50\nsteps: 3\n")
    result = run_command(swift, str(path), "--out", str(tmp_path / "out"), "--jobs", "1")
    assert result.exit_code == 0, result.output
    names = {item.name for item in (tmp_path / "out").iterdir()}
    assert {"runs.csv", "speedups.csv", "ablation.csv", "caches.csv", "swift-where-it-pays.png"} <= names
    assert (tmp_path / "out" / "runs.csv").read_text().count("\n") == 1 + 2 * len(SETS)
    assert asdict(cache_curves(None, 10)[0])["published"] is None
