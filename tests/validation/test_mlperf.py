"""MLPerf's SDXL server runs against the replay: three real fleets, one constant per software generation."""

from __future__ import annotations

import csv
from functools import lru_cache
from heapq import heappop, heappush
from math import exp
from pathlib import Path

import pytest

from synerdiff.cli.main import main
from synerdiff.core import InputError
from synerdiff.results.records import read_requests
from synerdiff.validation import mlperf
from synerdiff.validation.mlperf import HOST_S, Replayed, errors_of, latencies_of, read_runs, replay

RUNS = {run.name: run for run in read_runs()}
SMALL = {
    "run": "small-v9.0", "gpu": "H100-SXM-80GB", "gpus": "2", "precision": "fp8", "loadgen_schedule_seed": "7",
    "target_qps": "3.2", "min_duration_s": "40", "min_queries": "0", "batch": "4", "batching_limit_s": "1.0",
    "steps": "5", "guidance_scale": "8.0", "offline_samples_per_s": "4.0", "latency_mean_s": "3.2",
    "latency_p50_s": "3.1", "latency_p99_s": "", "source": "made up",
}  # fmt: skip


@lru_cache
def predicted(name: str) -> Replayed:
    run = RUNS[name]
    return replay(run, *mlperf.host_time(run, list(RUNS.values())), rate=False)


def test_h100_with_its_host_time_is_within_4_percent_and_2_on_average() -> None:
    found = predicted("h100x8-v4.1")
    assert max(map(abs, found.errors.values())) < 0.04
    assert found.mean_error < 0.02


def test_l40s_with_the_host_time_of_h100_is_met_but_for_its_median() -> None:
    """Its published minimum lies below Offline's time per image: a card that was idle is faster than a busy one."""
    found = predicted("l40sx8-v4.0")
    assert (found.host_s, found.fitted_on) == (HOST_S[4], "h100x8-v4.1")
    assert found.mean_error < 0.031
    assert {name for name, error in found.errors.items() if abs(error) >= 0.06} == {"p50"}
    assert max(abs(found.errors[name]) for name in ("p90", "p95", "p97", "p99")) < 0.01
    run = found.run
    assert run.published["min"] < run.gpus / run.images_per_s < found.predicted["min"]


def test_a_card_that_cools_while_it_is_idle_would_explain_the_median_of_l40s() -> None:
    """Eight cards in a plain queue; a cold one takes the published minimum. The constant was chosen on this run."""
    run, host_s, cooling_s = RUNS["l40sx8-v4.0"], HOST_S[4], 20.0
    hot_s, cold_s = run.gpus / run.images_per_s, run.published["min"] - host_s
    cards = [(0.0, card) for card in range(run.gpus)]
    heat, latencies = [0.0] * run.gpus, []
    for request in run.requests():
        arrival_s = request.arrival_ns / 1e9
        free_s, card = heappop(cards)
        start_s = max(arrival_s, free_s)
        warm = heat[card] * exp((free_s - start_s) / cooling_s)
        service_s = cold_s + (hot_s - cold_s) * warm
        heat[card] = 1 - (1 - warm) * exp(-service_s / cooling_s)
        heappush(cards, (start_s + service_s + host_s, card))
        latencies.append(start_s + service_s + host_s - arrival_s)
    latencies.sort()
    at = {name: latencies[int(share * len(latencies))] for name, share in mlperf.PERCENTILES.items()}
    errors = errors_of(run, {"mean": sum(latencies) / len(latencies), **at})
    assert max(map(abs, errors.values())) < 0.025
    assert sum(map(abs, errors.values())) / len(errors) < 0.015


def test_h200_of_the_next_round_is_within_1_percent_with_a_host_time_of_its_own() -> None:
    assert max(map(abs, predicted("h200x8-v5.0").errors.values())) < 0.01


@pytest.mark.parametrize("generation", HOST_S)
def test_the_host_times_are_those_of_least_squared_relative_error(generation: int) -> None:
    run = RUNS[mlperf.FITTED_ON[generation]]

    def squared(errors: dict[str, float]) -> float:
        return sum(error * error for error in errors.values())

    best = squared(predicted(run.name).errors)
    for off_s in (-0.0005, 0.0005):
        assert squared(errors_of(run, latencies_of(run.spec(HOST_S[generation] + off_s)))) > best


def test_a_batch_takes_what_offline_says_plus_the_host_time_of_its_images() -> None:
    run = RUNS["h200x8-v5.0"]
    # The first batch leaves no earlier than its last request came, and nobody is faster than a batch of one.
    service_s = 8 * 8 / run.images_per_s
    profile = run.profile()
    assert (20 * profile.step_ns(16) + 8 * profile.decode_ns()) / 1e9 == pytest.approx(service_s)
    assert predicted(run.name).predicted["min"] > service_s


def write_small(path: Path, **changed: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(SMALL))
        writer.writeheader()
        writer.writerow({**SMALL, **changed})


def test_other_runs_are_replayed_and_their_commands_give_the_same_latencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path / "runs.csv")
    (tmp_path / "published").mkdir()
    write_small(tmp_path / "published" / "mlperf_sdxl_server.csv")  # a folder's table is taken as well
    assert main(["scorecard", "--only", "mlperf", "--data", "published", "--out", "card"]) == 0
    text = capsys.readouterr().out
    assert "fitted on this run" in text
    with (tmp_path / "card" / "mlperf.csv").open() as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["mean", "p50", "rate"]  # no p99 is published
    assert (tmp_path / "card" / "mlperf.png").is_file()
    monkeypatch.chdir(tmp_path / "card")
    commands = [line.split("$ synerdiff ")[1].split() for line in text.splitlines() if "$ synerdiff " in line]
    assert [command[0] for command in commands] == ["profile", "trace", "simulate"]
    for command in commands:
        assert main(command) == 0
    records = read_requests(tmp_path / "card" / "small-v9.0" / "run")
    mean_s = float(records["request_latency_s"].mean())
    assert mean_s == pytest.approx(float(rows["mean"]["predicted"]), rel=1e-5)
    assert set(records["worker"]) == {0, 1}
    # At the sustainable rate the simulated mean is the published one.
    rate_error = float(rows["rate"]["error"])
    run = read_runs(tmp_path / "runs.csv")[0]
    there = latencies_of(run.spec(float(rows["rate"]["host_s"])), 1 / (1 + rate_error))["mean"]
    assert there == pytest.approx(3.2, rel=0.02)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gpus": "0"}, "line 2: gpus is 0; allowed are 1 to 4096"),
        ({"run": "../x"}, "line 2: run is '../x'; a name without slashes is needed"),
        ({"loadgen_schedule_seed": str(2**64)}, "line 2: loadgen_schedule_seed is"),
        ({"latency_mean_s": "fast"}, "line 2: latency_mean_s is 'fast'"),
    ],
)
def test_a_wrong_table_of_runs_names_its_line(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    write_small(tmp_path / "runs.csv", **changed)
    with pytest.raises(InputError, match=message):
        read_runs(tmp_path / "runs.csv")


def test_a_file_of_runs_belongs_to_this_study_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small(tmp_path / "runs.csv")
    assert main(["scorecard", "--data", str(tmp_path / "runs.csv")]) == 2
    assert "is a file, which only --only mlperf takes; give a folder." in capsys.readouterr().err
