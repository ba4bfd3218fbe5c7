"""Two results side by side: what is paired, the numbers, and what cannot be paired."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from synerdiff import cli
from synerdiff.experiments.pairs import compare_results, compare_runs, compare_sweeps, difference
from synerdiff.profile.folder import write_profile
from synerdiff.results.intervals import blocks_interval
from synerdiff.results.metrics import measured
from synerdiff.results.records import read_requests
from tests.builders import affine_profile

SWEEP = """
name: small
profiles: [{profile}]
requests: 40
seeds: [1, 2]
loads: [0.5]
workloads:
  - {{name: w, generator: poisson, parameters: {{mix: fixed, steps: 4}}}}
policies: [{{policy: continuous-serial, batch: 4}}, {{policy: dynamic, batch: 4}}]
figures: []
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_profile(tmp_path / "p", affine_profile())
    write_profile(tmp_path / "slow", affine_profile(base_ms=20, per_row_ms=4, decode_ms=60))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulated(out: str, *more: str, trace: str = "t.csv") -> None:
    if not Path(trace).exists():
        assert cli.main(["trace", "generate", "poisson", "--requests", "60", "--rate", "8", "--out", trace]) == 0
    assert cli.main(["simulate", "--profile", "p", "--trace", trace, "--out", out, *more]) == 0


def test_runs_are_paired_by_request(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated("a", "--policy", "static")
    simulated("b", "--policy", "continuous-serial")
    capsys.readouterr()
    assert cli.main(["compare", "a", "b", "--out", "c"]) == 0
    lines = capsys.readouterr().out.splitlines()
    means = [measured(read_requests(world / name))["request_latency_s"].mean() for name in ("a", "b")]
    mean = next(line for line in lines if line.startswith("latency, mean")).split()
    assert [float(part) for part in mean[2:4]] == pytest.approx(means, rel=1e-3)
    assert float(mean[4]) == pytest.approx(means[1] / means[0], abs=1e-3)
    assert float(mean[5]) == pytest.approx(means[1] - means[0], rel=1e-2)
    assert "51 of 51 measured requests" in lines[0]
    assert "No interval" in lines[0]
    assert (world / "c" / "compare.png").stat().st_size > 10_000


def test_a_run_beside_itself_does_not_differ(world: Path) -> None:
    simulated("a", "--policy", "static")
    sentence = compare_runs(world / "a", world / "a")[0][0]
    assert isinstance(sentence, str)
    assert sentence.startswith("B's mean latency is 100.0% of A's: +0 s")


def test_differences_have_the_interval_of_their_blocks() -> None:
    a = [float(i % 7) for i in range(1000)]
    b = [value + 0.1 * (i % 3) for i, value in enumerate(a)]
    own = difference(a, b, 0.5)
    expected = blocks_interval([y - x for x, y in zip(a, b, strict=True)], 1000)
    assert (own.value, own.low, own.high) == (expected.value, expected.low, expected.high)
    assert difference(a[:150], b[:150], 0.5).low == float("-inf")
    assert difference(a, b, 1.0).low == float("-inf")


def test_sweeps_are_paired_by_seed_and_what_is_one_on_each_side_may_differ(world: Path) -> None:
    for name in ("p", "slow"):
        (world / f"{name}.yaml").write_text(SWEEP.format(profile=name).replace("name: small", f"name: {name}-sweep"))
    # Profiles are named by their heads, which are alike here: the cells are the same two.
    for name in ("p", "slow"):
        assert cli.main(["sweep", f"{name}.yaml", "--out", f"out-{name}", "--jobs", "1"]) == 0
    parts = compare_sweeps(world / "out-p", world / "out-slow")[0]
    assert not isinstance(parts[-1], str)
    headers, rows = parts[-1]
    assert list(headers) == ["cell", "seeds", "mean latency", "P99 latency", "requests/s"]
    assert [row[0] for row in rows] == ["continuous-serial", "dynamic"]
    # Twice the times at the same load: twice the latency, half the rate.
    for row in rows:
        assert str(row[2]).startswith("2.000")
        assert str(row[4]).startswith("0.500")
    assert len(compare_results(world / "out-p", world / "out-slow", world / "c")) == len(parts) + 1


def test_runs_say_whether_they_were_measured_and_at_which_pace(world: Path) -> None:
    simulated("a", "--policy", "static")
    simulated("b", "--policy", "static", "--load", "0.2")
    summary = json.loads((world / "b/summary.json").read_text())
    summary["run"]["device"] = "a card"  # as the hardware's engine says
    (world / "b/summary.json").write_text(json.dumps(summary))
    parts = compare_runs(world / "a", world / "b")[0]
    assert "t.csv, simulated, load " in str(parts[1])
    assert "t.csv, measured on a card, load 0.2, 0.2069 of its capacity: stable; time scale " in str(parts[2])
    rates = [json.loads((world / name / "summary.json").read_text())["run"]["rate_per_s"] for name in "ab"]
    assert parts[3] == f"The requests came at another pace: {rates[0]:.4g} a second in A, {rates[1]:.4g} in B."
    assert not any("pace" in str(part) for part in compare_runs(world / "a", world / "a")[0])


@pytest.mark.parametrize(
    ("change", "cells", "headers"),
    [
        ("max_concurrency: [2]", ["continuous-serial", "dynamic"], ["mean latency", "P99 latency", "requests/s"]),
        (
            "loads: [0.5]\nsaturation: 40",
            [
                "continuous-serial, load 0.5",
                "continuous-serial, saturation",
                "dynamic, load 0.5",
                "dynamic, saturation",
            ],
            ["mean latency", "P99 latency", "requests/s", "images/s at saturation"],
        ),
    ],
)
def test_closed_loops_and_saturation_are_compared(
    world: Path, change: str, cells: list[str], headers: list[str]
) -> None:
    for name in ("p", "slow"):
        text = SWEEP.format(profile=name).replace("loads: [0.5]", change)
        (world / f"{name}.yaml").write_text(text)
        assert cli.main(["sweep", f"{name}.yaml", "--out", f"out-{name}", "--jobs", "1"]) == 0
    parts = compare_sweeps(world / "out-p", world / "out-slow")[0]
    assert not isinstance(parts[-1], str)
    found, rows = parts[-1]
    assert list(found) == ["cell", "seeds", *headers]
    assert sorted(str(row[0]) for row in rows) == cells
    for row in rows:
        # Twice the times: twice the latency in a closed loop and at a load, half the rate.
        expected = ["-", "-", "-", "0.500"] if "saturation" in str(row[0]) else ["2.000", "2.000", "0.500", "-"]
        assert [str(cell).split()[0] for cell in row[2:]] == expected[: len(headers)]


def test_what_cannot_be_paired_is_one_sentence(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated("a", "--policy", "static")
    simulated("b", "--policy", "static")
    text = (world / "t.csv").read_text().splitlines()
    (world / "u.csv").write_text("\n".join(text[:30]) + "\n")
    simulated("other", "--policy", "static", trace="u.csv")
    (world / "empty").mkdir()
    (world / "b" / "summary.json").write_text(json.dumps([1]))
    cases = (
        (["a", "other"], "other requests"),
        (["a", "empty"], "neither the folder of a run nor"),
        (["a", "b"], "no run's summary"),
        (["a", "a", "--out", "a"], "give another folder"),
    )
    capsys.readouterr()
    for folders, said in cases:
        assert cli.main(["compare", *folders]) == 2
        assert said in capsys.readouterr().err
