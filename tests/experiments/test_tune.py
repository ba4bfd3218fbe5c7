"""Tuning: what is searched, how trials are scored and judged, and the files that other commands take."""

from __future__ import annotations

import json
from math import exp, inf, log
from pathlib import Path
from typing import Any

import pytest
import yaml

from policies.base import Parameter
from policies.registry import POLICIES, policy_parameters
from synerdiff import cli
from synerdiff.config.experiment import load_experiment
from synerdiff.config.tune import Range, Tuning
from synerdiff.core import InputError
from synerdiff.experiments.compare import MEASURES
from synerdiff.experiments.grid import Grid
from synerdiff.experiments.tune import (
    REFUSED,
    Dimension,
    Search,
    by_seed,
    default_dimension,
    is_better,
    score_of,
    stated_dimension,
)
from synerdiff.profile.folder import write_profile
from synerdiff.results.intervals import PairedRatio
from synerdiff.schema import validated
from tests.builders import affine_profile

MEAN, GOODPUT = MEASURES["mean"], MEASURES["goodput"]
TUNE = """
name: small
profiles: [p]
workload: {name: w, generator: poisson, parameters: {mix: fixed, steps: 4}}
policy: {policy: static, batch: 4}
search: {max_wait_s: {low: 0, high: 2}, batch: [1, 2, 4]}
loads: [0.4]
trials: 9
seeds: [1, 2]
judge_seeds: [11, 12, 13, 14]
requests: 60
"""
PICKY = """
class Picky:
    "Serves everything; with ``lazy`` it refuses what comes when it is idle, the first request excepted."
    def __init__(self, lazy: bool = False):
        from policies.continuous import ContinuousSerial
        self.inner = ContinuousSerial(batch=4)
        self.lazy = lazy
        self.chunking = "whole"
    def reset(self, worker, profile):
        self.inner.reset(worker, profile)
        self.seen = False
    def decide(self, view):
        from synerdiff.core import Decision
        if self.lazy and self.seen and view.waiting and not view.active and not view.decoding:
            return Decision(reject=tuple(sample.id for sample in view.waiting))
        self.seen = True
        return self.inner.decide(view)
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small profile ``p``."""
    write_profile(tmp_path / "p", affine_profile())
    (tmp_path / "t.yaml").write_text(TUNE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tuned(out: str, *more: str) -> dict[str, Any]:
    assert cli.main(["tune", "t.yaml", "--out", out, *more]) == 0
    document: dict[str, Any] = json.loads(Path(out, "tune.json").read_text())
    return document


# What is searched


def test_what_bounds_mean_for_a_search() -> None:
    known = {p.name: p for p in (*policy_parameters("auto"), *policy_parameters("static"))}
    assert default_dimension(known["size_weight"], 2.0) == Dimension("size_weight", float, 0.0, 32.0)
    assert default_dimension(known["skip_queue"], 0) == Dimension("skip_queue", int, 0, 16, log=True)
    assert default_dimension(known["decode_queue"], 3) == Dimension("decode_queue", int, 1, 48, log=True)
    assert default_dimension(known["turn"], "oldest") == Dimension("turn", str, choices=("oldest", "drr", "srtf"))
    penalty = next(p for p in policy_parameters("synerdiff") if p.name == "skip_penalty_s")
    assert default_dimension(penalty, 0.02) == Dimension("skip_penalty_s", float, 0, 0.32)
    narrow = Parameter("share", float, 0.5, 0.0, 1.0)
    assert default_dimension(narrow, 0.5) == Dimension("share", float, 0.0, 1.0)
    assert default_dimension(Parameter("on", bool, True), True) == Dimension("on", bool, choices=(False, True))
    assert default_dimension(Parameter("open", int, 3), 3) is None


def test_every_policy_of_ours_can_be_tuned_by_its_bounds(world: Path) -> None:
    for name in POLICIES:
        own = validated(Tuning, {**yaml.safe_load(TUNE), "policy": name, "search": None, "requests": 5}, "test")
        search = Search(own, world, world / "out")
        names = [dimension.name for dimension in search.dimensions]
        assert names[0] == "batch"
        assert "trail" not in names, "it changes no decision"
        assert set(names) <= {parameter.name for parameter in policy_parameters(name)}
        assert not any(name.startswith("turn") for name in names), "one batch key takes no turns"
        assert search.dimensions[0].high == 16, "32 rows hold 16 guided samples"
        default = search.default_values()
        assert default["batch"] == 8
        assert set(default) == set(names), "the first trial is the default"
        assert ("chunking" in names) == (default.get("chunking") is not None)


def test_a_stated_range_is_checked_by_the_policys_own_bounds() -> None:
    known = {p.name: p for p in policy_parameters("static")}
    wait = known["max_wait_s"]
    assert stated_dimension(wait, Range(low=0, high=2), "static") == Dimension("max_wait_s", float, 0.0, 2.0)
    with pytest.raises(InputError, match=r"max_wait_s is 5000; allowed is a number from 0 to 3600"):
        stated_dimension(wait, Range(low=0, high=5000), "static")
    with pytest.raises(InputError, match="low is 0; by its logarithm only numbers above 0"):
        stated_dimension(wait, Range(low=0, high=2, log=True), "static")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"judge_seeds": [2, 3]}, "seed 2 is in seeds and in judge_seeds; what chooses must not judge"),
        ({"search": {"speed": [1, 2]}}, "search: policy 'static' has no parameter 'speed'; it has batch, max_wait_s"),
        ({"search": {"min_ssim": [0.9]}}, "min_ssim is searched where the file states its floor"),
        ({"search": {"max_wait_s": {"low": 2, "high": 1}}}, "low is 2 and high 1; low must be less"),
        ({"search": {"batch": []}}, "a list of values, or low and high (and log), is needed"),
        ({"policy": {"policy": "static", "batch": "best"}}, "the sizes to try stand under search"),
        ({"workload": {"name": "w", "trace": "t.csv"}}, "a trace needs two windows or more"),
        ({"seeds": [1, 1]}, "two seeds are both '1'"),
        ({"search": {"batch": [4, 4]}}, "search.batch names a value twice"),
        ({"search": {"batch": [4, 1000]}}, "batch is 1000, but the profile's steps have at most 32 rows"),
        ({"policy": "chunked", "search": {"chunking": ["whole", "c9"]}}, "c9"),
        ({"trials": 0}, "trials is 0; it must be greater than or equal to 1"),
    ],
)
def test_what_a_tune_file_may_not_say(
    world: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    (world / "t.yaml").write_text(yaml.safe_dump({**yaml.safe_load(TUNE), **change}))
    assert cli.main(["tune", "t.yaml"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("t.yaml: ")
    assert said in printed
    assert printed.count("\n") == 1
    assert not (world / "results").exists()


# The score and the verdict


def _row(seed: int, value: float | None, undone: int = 0, column: str = MEAN.column) -> dict[str, Any]:
    return {"seed": seed, column: value, "error_request_count": undone}


def test_a_score_is_the_geometric_mean_of_paired_ratios() -> None:
    reference = [_row(1, 2.0), _row(2, 4.0)]
    assert score_of([_row(1, 1.0), _row(2, 4.0)], reference, MEAN) == pytest.approx(0.5**0.5)
    better = [_row(1, 4.0, column=GOODPUT.column), _row(2, 4.0, column=GOODPUT.column)]
    base = [_row(1, 2.0, column=GOODPUT.column), _row(2, 4.0, column=GOODPUT.column)]
    assert score_of(better, base, GOODPUT) == pytest.approx(0.5**0.5), "more is better, so the ratio is turned"
    assert score_of([_row(1, 1.0), _row(2, None)], reference, MEAN) == REFUSED
    assert score_of([_row(1, 1.0, undone=1), _row(2, 1.0)], reference, MEAN) == REFUSED
    assert by_seed([_row(1, 2.0), _row(1, 8.0), _row(2, 3.0)], MEAN) == pytest.approx({1: 4.0, 2: 3.0})


@pytest.mark.parametrize(
    ("low", "high", "seeds", "measure", "better"),
    [
        (0.8, 0.9, 4, "mean", True),
        (0.8, 1.01, 4, "mean", False),
        (1.1, 1.2, 4, "goodput", True),
        (0.9, 1.2, 4, "goodput", False),
        (0.8, 0.9, 4, "goodput", False),
        (0.0, inf, 1, "mean", False),
    ],
)
def test_better_means_the_whole_interval(low: float, high: float, seeds: int, measure: str, better: bool) -> None:
    assert is_better(PairedRatio(0.85, low, high, seeds), MEASURES[measure]) is better


# The command


def test_a_bad_default_is_improved_and_the_files_run(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At low load ``static`` waits a second for a full batch; not waiting is far better, and the search finds it."""
    document = tuned("out", "--jobs", "1")
    assert document["better"] is True
    judged = document["judged"][MEAN.column]
    assert judged["high"] < 0.7
    assert judged["ratio"] == pytest.approx(judged["best"] / judged["default"])
    assert exp(sum(log(v) for v in document["by_seed"].values()) / 4) == pytest.approx(judged["ratio"])
    assert document["default"] == {"batch": 4, "max_wait_s": 1.0}
    printed = capsys.readouterr().out
    assert printed.startswith(document["answer"])
    assert "static with " in document["answer"]
    assert "times the default's on 4 other seeds (on the training seeds" in document["answer"]
    for name in ("figures/tune.png", "figures/tune.pdf", "trials.csv"):
        assert (world / "out" / name).is_file()
    best = document["best"]["values"]
    policy = yaml.safe_load((world / "out/policy.yaml").read_text())
    assert policy == {
        "policy": "static",
        "label": "static, tuned",
        "batch": best["batch"],
        "parameters": {"max_wait_s": best["max_wait_s"]},
    }

    assert cli.main(["trace", "generate", "poisson", "--requests", "20", "--rate", "8", "--out", "tr.csv"]) == 0
    simulate = ["simulate", "--profile", "p", "--trace", "tr.csv", "--out"]
    stated = ["--policy", "static", "--set", f"batch={best['batch']}", "--set", f"max_wait_s={best['max_wait_s']!r}"]
    assert cli.main([*simulate, "a", "--policy", "out/policy.yaml"]) == 0
    assert cli.main([*simulate, "b", *stated]) == 0
    assert (world / "a/requests.parquet").read_bytes() == (world / "b/requests.parquet").read_bytes()
    summaries = [json.loads((world / name / "summary.json").read_text()) for name in "ab"]
    assert summaries[0] == summaries[1]
    assert cli.main([*simulate, "c", "--policy", "out/policy.yaml", "--set", "batch=1"]) == 0
    assert json.loads((world / "c/summary.json").read_text())["run"]["parameters"]["batch"] == 1

    capsys.readouterr()
    assert cli.main(["sweep", "out/sweep.yaml", "--jobs", "1", "--out", "swept"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("static, tuned"))
    assert f" {judged['ratio']:.3f} " in row, "the sweep finds the ratio that was reported"
    sweep = yaml.safe_load((world / "out/sweep.yaml").read_text())
    sweep |= {"name": "named", "profiles": ["p"], "figures": [], "seeds": [11]}
    sweep["policies"] = ["out/policy.yaml", "dynamic.yaml"]
    (world / "dynamic.yaml").write_text("policy: dynamic\n")
    del sweep["baselines"]
    (world / "named.yaml").write_text(yaml.safe_dump(sweep))
    assert cli.main(["sweep", "named.yaml", "--jobs", "1"]) == 0
    assert cli.main(["capacity", "out/capacity.yaml", "--jobs", "1", "--out", "cap"]) == 0
    asked = ["--trace", "tr.csv", "--profile", "p", "--slo", "p99=30s", "--policy", "out/policy.yaml,dynamic"]
    assert cli.main(["capacity", *asked, "--jobs", "1", "--out", "cap2"]) == 0
    assert "static, tuned" in capsys.readouterr().out


def test_the_same_file_gives_the_same_bytes_and_a_search_goes_on(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned("one", "--jobs", "1")
    assert "computed now and 0 found" in capsys.readouterr().out
    tuned("two", "--jobs", "2")
    names = ["tune.json", "trials.csv", "policy.yaml", "sweep.yaml", "capacity.yaml"]
    runs = {path.name for path in (world / "one/runs").iterdir()}
    assert {path.name for path in (world / "two/runs").iterdir()} == runs
    for name in [*names, *(f"runs/{run}" for run in runs)]:
        assert (world / "one" / name).read_bytes() == (world / "two" / name).read_bytes(), name
    for run in sorted(runs)[:3]:
        (world / "one/runs" / run).unlink()
    capsys.readouterr()
    tuned("one", "--jobs", "1")
    assert "3 runs computed now and" in capsys.readouterr().out
    for name in names:
        assert (world / "one" / name).read_bytes() == (world / "two" / name).read_bytes(), name


def test_parameters_that_leave_requests_undone_are_no_improvement(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "mine").mkdir()
    (world / "mine" / "tune_picky.py").write_text(PICKY)
    own = {**yaml.safe_load(TUNE), "policy": "tune_picky:Picky", "search": {"lazy": [False, True]}, "trials": 5}
    own["profiles"] = ["../p"]
    (world / "mine" / "t.yaml").write_text(yaml.safe_dump(own))
    assert cli.main(["tune", "mine/t.yaml", "--jobs", "1", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No trial of tune_picky:Picky beats its default on the training seeds")
    assert "trials are refused: they leave requests undone that the default serves" in printed
    policy = yaml.safe_load((world / "out/policy.yaml").read_text())
    assert policy == {"policy": "tune_picky:Picky", "label": "tune_picky:Picky, default", "folder": "../mine"}
    # The module is found from the written files too, wherever the command is started.
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    (world / "tr.csv").write_text("arrival_s,steps\n0,4\n1,4\n")
    simulate = ["simulate", "--profile", "../p", "--trace", "../tr.csv", "--policy", "../out/policy.yaml"]
    assert cli.main([*simulate, "--out", "a"]) == 0
    grid = Grid(load_experiment(world / "out/sweep.yaml"), world / "out", world / "swept")
    assert {run.spec.base_folder for run in grid.runs({})} == {world / "mine"}


def test_a_floor_on_fidelity_is_kept_and_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the shipped profile and table: the default may skip down to the floor, higher floors are tried too."""
    monkeypatch.chdir(tmp_path)
    own = {
        **yaml.safe_load(TUNE),
        "profiles": ["digits-cpu"],
        "workload": {"name": "w", "generator": "poisson", "parameters": {"mix": "fixed", "steps": 25}},
        "policy": {"policy": "skip-cfg", "batch": 4},
        "search": None,
        "min_ssim": 0.9,
        "requests": 12,
        "trials": 4,
        "judge_seeds": [11, 12],
    }
    search = Search(validated(Tuning, own, "test"), tmp_path, tmp_path / "out")
    floors = next(dimension for dimension in search.dimensions if dimension.name == "min_ssim")
    assert floors.choices[0] == 0.9
    assert len(floors.choices) > 2
    assert all(isinstance(floor, float) and 0.9 <= floor < 1 for floor in floors.choices)
    entry = search.entry({"batch": 2, "min_ssim": floors.choices[-1]})
    loose, tight = (search.runs(each, search.training)[0].spec.budget for each in (search.default, entry))
    assert tight.fraction_ppm < loose.fraction_ppm
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(own))
    document = tuned("out", "--jobs", "1")
    assert 0.9 <= document["ssim"]["default"] < 1
    assert 0.9 <= document["ssim"]["best"] <= 1
    policy = yaml.safe_load((tmp_path / "out/policy.yaml").read_text())
    assert policy["skip_budget"]["min_ssim"] >= 0.9
    assert (
        cli.main(
            [
                "trace",
                "generate",
                "poisson",
                "--requests",
                "5",
                "--rate",
                "1",
                "--steps",
                "25",
                "--mix",
                "fixed",
                "--out",
                "tr.csv",
            ]
        )
        == 0
    )
    assert (
        cli.main(
            ["simulate", "--profile", "digits-cpu", "--trace", "tr.csv", "--policy", "out/policy.yaml", "--out", "a"]
        )
        == 0
    )
    assert json.loads((tmp_path / "a/summary.json").read_text())["run"]["min_ssim"] == policy["skip_budget"]["min_ssim"]
    grid = Grid(load_experiment(tmp_path / "out/sweep.yaml"), tmp_path / "out", tmp_path / "swept")
    assert all(run.spec.budget.eligible_steps for run in grid.runs({}))
