"""A sweep: what it computes, that it resumes, that nothing stale is used, and what it says when something is wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profiler.estimate import estimate_profiles
from synerdiff import cli
from synerdiff.config.experiment import load_experiment
from synerdiff.core import ContractError, InputError, SkipBudget
from synerdiff.experiments import run as run_module
from synerdiff.experiments import store
from synerdiff.experiments.backends import LokyBackend
from synerdiff.experiments.compare import GridCell
from synerdiff.experiments.grid import Grid, Place, best_batch, nearest
from synerdiff.experiments.report import publish
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.sweep import Results, run_sweep
from synerdiff.files import install_hint
from synerdiff.profile.folder import write_profile
from synerdiff.results.records import read_table
from tests.builders import affine_profile

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
name: small
profiles: [p]
requests: 30
seeds: [1, 2]
loads: [0.5, 0.9]
workloads:
  - {name: w, generator: poisson, parameters: {mix: fixed, steps: 4, images: 2}}
policies:
  - {policy: continuous-serial, batch: 4}
  - {policy: static, label: hurried, batch: 4, parameters: {max_wait_s: 0.1}}
figures: []
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small profile ``p``, an experiment ``e.yaml``, and the working folder there."""
    write_profile(tmp_path / "p", affine_profile())
    (tmp_path / "e.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def small(world: Path, *changes: tuple[str, str], out: str = "out") -> Grid:
    """The grid of the experiment with parts of its text replaced."""
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (world / "e.yaml").write_text(text)
    return Grid(load_experiment(world / "e.yaml"), world, world / out)


def swept(grid: Grid, jobs: int = 1) -> Results:
    return run_sweep(grid, LokyBackend(jobs))


def keys(grid: Grid) -> set[str]:
    return {run.key for run in grid.runs({})}


def table(path: Path) -> list[dict[str, Any]]:
    return read_table(path, {})[0].to_pylist()  # type: ignore[no-any-return]


def test_every_run_of_the_grid_is_a_row(world: Path) -> None:
    results = swept(small(world))
    assert (results.computed, results.reused) == (8, 0)
    rows = table(world / "out" / "runs.parquet")
    found = [(row["policy"], row["policy_name"], row["batch"], row["load"], row["seed"]) for row in rows]
    named = (("continuous-serial", "continuous-serial"), ("hurried", "static"))
    in_order = [(*name, 4, load, seed) for name in named for load in (0.5, 0.9) for seed in (1, 2)]
    assert found == in_order, "rows come in the order of the experiment"
    assert {row["parameters"] for row in rows} == {"{}", '{"max_wait_s": 0.1}'}
    assert all(row["profile"] == "test" and row["workload"] == "w" and not row["estimated"] for row in rows)
    requests = table(world / "out" / "requests.parquet")
    assert [request["run"] for request in requests] == [row["key"] for row in rows for _ in range(30)]
    manifest = json.loads((world / "out" / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["runs"] == [row["key"] for row in rows]
    assert manifest["config"]["seeds"] == [1, 2]
    assert set(manifest["versions"]) >= {"synerdiff", "python", "numpy"}


def test_a_closed_loop_ends_at_the_policys_limit(world: Path) -> None:
    changes = (
        ("loads: [0.5, 0.9]", "max_concurrency: [1, 16]\nsaturation: 200"),
        ("requests: 30", "requests: 400"),
        ("images: 2", "images: 1"),
        ("figures: []", "figures: [concurrency]"),
    )
    grid = small(world, *changes)
    assert grid.size == 2 * 3 * 2
    printed = publish(grid.experiment, swept(grid))
    rows = [row for row in table(world / "out" / "runs.parquet") if row["policy"] == "continuous-serial"]
    assert all(row["load"] is None for row in rows)
    # 4 steps at 8 rows (26 ms) for 4 samples, and a decode of 30 ms each.
    capacity = 1 / (4 * 0.026 / 4 + 0.030)
    full = [row["image_throughput"] for row in rows if row["max_concurrency"] == 16]
    assert full == pytest.approx([capacity] * 2, rel=0.01)
    assert [row["saturation_throughput"] for row in rows if row["max_concurrency"] is None] == pytest.approx(
        [capacity] * 2, rel=0.01
    )
    alone = [row for row in rows if row["max_concurrency"] == 1]
    # One at a time: 4 steps at 2 rows (14 ms), then the decode.
    assert [row["request_latency_mean_s"] for row in alone] == pytest.approx([0.086] * 2)
    (shown,) = [part for part in printed if not isinstance(part, str)]
    assert [line[1] for line in shown[1]] == ["1 at once", "16 at once", "all wait"] * 2
    assert (world / "out" / "figures" / "concurrency.png").is_file()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([], "max_concurrency and loads exclude each other"),
        ([("loads: [0.5, 0.9]", "batch: best"), ("4}", "best}")], "needs batch sizes that are stated"),
        ([("loads: [0.5, 0.9]", "report: map\nbaselines: hurried")], "reported by curves only"),
    ],
)
def test_what_a_closed_loop_excludes_is_said(world: Path, changes: list[tuple[str, str]], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        small(world, ("name: small", "name: small\nmax_concurrency: 4"), *changes)


def test_latency_is_told_by_resolution(world: Path) -> None:
    write_profile(world / "p", estimate_profiles("512x512,1024x1024", "h200", "sdxl"))
    shapes = "shapes: [{steps: 4, height: 512, width: 512}, {steps: 4, height: 1024, width: 1024}]"
    grid = small(
        world,
        ("mix: fixed, steps: 4, images: 2", shapes),
        ("figures: []", "figures: [sizes]"),
        ("loads: [0.5, 0.9]", "loads: [0.3, 0.8]"),
    )
    publish(grid.experiment, swept(grid))
    with (world / "out" / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["policy"], row["size"], row["seed"], row["load"]) for row in rows} == {
        (policy, size, seed, "0.8")
        for policy in ("continuous-serial", "hurried")
        for size in ("512x512", "1024x1024")
        for seed in "12"
    }
    assert sum(int(row["requests"]) for row in rows if row["policy"] == "hurried" and row["seed"] == "1") == 26
    assert (world / "out" / "figures" / "sizes.png").is_file()


def test_policies_see_the_same_arrivals_and_loads_only_stretch_them(world: Path) -> None:
    swept(small(world))
    rows = {row["key"]: row for row in table(world / "out" / "runs.parquet")}
    arrivals: dict[tuple[int, float], set[tuple[float, ...]]] = {}
    for key, row in rows.items():
        times = [request["arrival_s"] for request in table(world / "out" / "runs" / f"{key}.parquet")]
        arrivals.setdefault((row["seed"], row["load"]), set()).add(tuple(times))
        # The load as stated: sample-steps over the span / what continuous-serial sustains at batch 8 (42 ms a step).
        sustained = 4 / (4 * 0.042 / 8 + 0.030)
        assert 30 * 2 * 4 / times[-1] / sustained == pytest.approx(row["load"])
    assert all(len(found) == 1 for found in arrivals.values())
    for seed in (1, 2):
        (slow,), (fast,) = arrivals[seed, 0.5], arrivals[seed, 0.9]
        assert [value * 0.5 / 0.9 for value in slow] == pytest.approx(list(fast), abs=2e-9)
    assert arrivals[1, 0.5] != arrivals[2, 0.5]


def test_a_row_is_what_simulate_finds(world: Path) -> None:
    from traces.native import write_trace

    grid = small(world)
    swept(grid)
    row = table(world / "out" / "runs.parquet")[0]
    run = next(run for run in grid.runs({}) if run.key == row["key"])
    write_trace(world / "t.csv", arrivals(run.source).requests)
    settings = [f"--set={name}={value}" for name, value in run.spec.parameters.items()]
    flags = ["--policy", run.spec.policy, *settings, "--time-scale", repr(row["time_scale"]), "--out", "one"]
    assert cli.main(["simulate", "--profile", "p", "--trace", "t.csv", *flags]) == 0
    summary = json.loads((world / "one" / "summary.json").read_text())
    del summary["run"]
    assert summary == {name: row[name] for name in summary}


def test_a_second_time_computes_nothing_and_gives_the_same_bytes(world: Path) -> None:
    swept(small(world))
    names = ("runs.parquet", "requests.parquet", "manifest.json")
    before = [(world / "out" / name).read_bytes() for name in names]
    results = swept(small(world))
    assert (results.computed, results.reused) == (0, 8)
    assert [(world / "out" / name).read_bytes() for name in names] == before


def test_missing_and_broken_runs_are_computed_again(world: Path) -> None:
    swept(small(world))
    before = (world / "out" / "requests.parquet").read_bytes()
    runs = sorted((world / "out" / "runs").iterdir())
    runs[0].unlink()
    runs[1].write_bytes(runs[1].read_bytes()[:-30])
    runs[2].write_bytes(runs[3].read_bytes())
    results = swept(small(world))
    assert (results.computed, results.reused) == (3, 5)
    assert (world / "out" / "requests.parquet").read_bytes() == before


def test_the_number_of_processes_changes_no_byte(world: Path) -> None:
    swept(small(world, out="one"))
    swept(small(world, out="two"), jobs=2)
    one = {path.name: path.read_bytes() for path in (world / "one").rglob("*.parquet")}
    two = {path.name: path.read_bytes() for path in (world / "two").rglob("*.parquet")}
    assert len(one) == 10
    assert one == two


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("requests: 30", "requests: 31"),
        ("seeds: [1, 2]", "seeds: [3, 4]"),
        ("loads: [0.5, 0.9]", "loads: [0.51, 0.91]"),
        ("steps: 4", "steps: 5"),
        ("batch: 4}", "batch: 5}"),
        ("batch: 4, parameters: {max_wait_s: 0.1}", "batch: 3, parameters: {max_wait_s: 0.1}"),
        ("max_wait_s: 0.1", "max_wait_s: 0.2"),
        ("figures: []", "figures: []\nskip_budget: {fraction: 0.1}"),
        ("figures: []", "figures: []\nslo: {seconds: 5}"),
        ("figures: []", "figures: []\ndecode_gpus: [1]"),
        ("figures: []", "figures: []\ndispersion: true"),
    ],
)
def test_what_changes_a_run_changes_its_key(world: Path, old: str, new: str) -> None:
    assert not keys(small(world)) <= keys(small(world, (old, new)))


def test_what_does_not_change_a_run_leaves_its_key(world: Path) -> None:
    before = keys(small(world))
    assert keys(small(world, ("figures: []", "figures: [stages]\njobs: 3"))) == before
    assert keys(small(world, ("seeds: [1, 2]", "seeds: [1, 2, 3]"))) > before
    assert keys(small(world, out="elsewhere")) == before


def test_another_profile_content_is_another_run(world: Path) -> None:
    before = keys(small(world))
    steps = world / "p" / "steps.csv"
    steps.write_text(steps.read_text().replace("12000000", "12000001"))
    assert keys(small(world)).isdisjoint(before)


def test_another_engine_source_is_another_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(small(world))
    monkeypatch.setattr(store, "code_hash", lambda: "another")
    assert keys(small(world)).isdisjoint(before)


@pytest.mark.parametrize("library", store.LIBRARIES)
def test_another_version_of_a_library_is_another_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    before = keys(small(world))
    found = store.library_versions()
    assert set(found) == {"numpy", "pandas", "pyarrow", "simpy"}
    monkeypatch.setattr(store, "library_versions", lambda: {**found, library: "0.0"})
    assert keys(small(world)).isdisjoint(before)


def test_the_code_in_a_key_is_all_that_a_run_loads(world: Path) -> None:
    """A sweep is run in a process of its own; every module of ours that it has loaded then is hashed."""
    probe = (
        "import sys; from pathlib import Path; from synerdiff.config.experiment import load_experiment;"
        "from synerdiff.experiments.grid import Grid; from synerdiff.experiments.sweep import compute;"
        "compute(Grid(load_experiment(Path('e.yaml')), Path(), Path('probe')).runs({})[0]);"
        "print('\\n'.join(sorted(getattr(m, '__file__', None) or '' for m in sys.modules.values())))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    ours = {Path(line) for line in done.stdout.splitlines() if line.startswith(f"{ROOT}/") and ".venv" not in line}
    assert len(ours) > 30
    allowed = {f"synerdiff/experiments/{name}.py" for name in ("backends", "compare", "parcel")}
    assert {str(path.relative_to(ROOT)) for path in ours - set(store.code_files())} <= allowed


def test_a_changed_trace_file_is_another_run(world: Path) -> None:
    trace = world / "t.csv"
    change = ("{name: w, generator: poisson, parameters: {mix: fixed, steps: 4, images: 2}}", "{name: w, trace: t.csv}")
    seeds = ("seeds: [1, 2]", "seeds: [1]")
    found = []
    for steps in (3, 3, 4):
        trace.write_text(f"arrival_s,steps\n0,{steps}\n1,3\n")
        found.append(keys(small(world, change, seeds)))
    assert found[0] == found[1]
    assert found[0].isdisjoint(found[2])


RULE = """
from policies.continuous import ContinuousSerial
{helper}

class Mine(ContinuousSerial):
    NAME = NAME_OF_RULE
{more}"""
POLICY = "policy: continuous-serial"
HELPERS = {
    "a module beside it": ("from rule_name import NAME_OF_RULE", "rule.py", "rule_name.py"),
    "relatively, in a nested package": (
        "from ..names.deep import NAME_OF_RULE",
        "pack/rules/rule.py",
        "pack/names/deep.py",
    ),
    "a namespace package": ("from bare.inner.names import NAME_OF_RULE", "rule.py", "bare/inner/names.py"),
    "elsewhere on PYTHONPATH": ("from far_names import NAME_OF_RULE", "rule.py", "elsewhere/far_names.py"),
    "importlib": (
        "import importlib\nNAME_OF_RULE = importlib.import_module('late_' + 'names').NAME_OF_RULE",
        "rule.py",
        "late_names.py",
    ),
    "importlib, from a path": (
        "import importlib.util, pathlib\n"
        "spec = importlib.util.spec_from_file_location('x', pathlib.Path(__file__).with_name('unnamed.py'))\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "NAME_OF_RULE = module.NAME_OF_RULE",
        "rule.py",
        "unnamed.py",
    ),
    "data read at import": (
        "import pathlib\nNAME_OF_RULE = pathlib.Path(__file__).with_name('name.txt').read_text()[:4]",
        "rule.py",
        "name.txt",
    ),
}


@pytest.mark.parametrize("way", HELPERS)
def test_what_a_policy_is_made_of_counts_however_it_is_imported(
    world: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    helper, rule, other = HELPERS[way]
    for name, text in ((rule, RULE.format(helper=helper, more="")), (other, "NAME_OF_RULE = 'mine'\n")):
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_text(text)
    for package in ("pack", "pack/rules", "pack/names"):
        if (world / package).is_dir():
            (world / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(world / "elsewhere")
    module = rule.removesuffix(".py").replace("/", ".")
    change = (POLICY, f"policy: '{module}:Mine', label: mine")
    before = set(sys.modules)
    known = keys(small(world, change))
    assert keys(small(world, change)) == known
    for changed in (rule, other):
        file = world / changed
        file.write_text(file.read_text() + "# changed\n")
        after = keys(small(world, change))
        assert len(after - known) == 4, f"only the runs of that policy are stale after {changed}"
        known = after
    for name in set(sys.modules) - before:
        monkeypatch.delitem(sys.modules, name)


def test_an_installed_package_and_declared_data_count(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed: below the folder of site-packages, which lies inside that of the standard library."""
    site = world / "lib" / "site-packages"
    (site / "rules").mkdir(parents=True)
    (site / "rules" / "__init__.py").write_text("NAME_OF_RULE = 'mine'\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(
        store.sysconfig,  # type: ignore[attr-defined]
        "get_paths",
        lambda: (
            dict.fromkeys(("stdlib", "platstdlib"), str(world / "lib"))
            | dict.fromkeys(("purelib", "platlib"), str(site))
        ),
    )
    assert store._counts(str(site / "rules" / "__init__.py"))
    (world / "lib" / "json.py").touch()
    assert not store._counts(str(world / "lib" / "json.py"))
    assert not store._counts("/proc/self/status")
    monkeypatch.undo()
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    more = "    DATA_FILES = ('weights.csv',)\n"
    (world / "data_rule.py").write_text(RULE.format(helper="from rules import NAME_OF_RULE", more=more))
    change = (POLICY, "policy: 'data_rule:Mine', label: mine")
    with pytest.raises(
        InputError, match=r"policy 'data_rule:Mine': there is no file .*weights.csv, which its DATA_FILES"
    ):
        small(world, change)
    (world / "weights.csv").write_text("1\n")
    known = keys(small(world, change))
    for name in ("weights.csv", "lib/site-packages/rules/__init__.py"):
        (world / name).write_text((world / name).read_text() + "#2\n")
        after = keys(small(world, change))
        assert len(after - known) == 4
        known = after
    for name in ("rules", "data_rule"):
        monkeypatch.delitem(sys.modules, name)


def test_a_policy_of_the_users_own_runs_in_workers(world: Path) -> None:
    (world / "sweep_rule.py").write_text(RULE.format(helper="from sweep_rule_name import NAME_OF_RULE", more=""))
    (world / "sweep_rule_name.py").write_text("NAME_OF_RULE = 'mine'\n")
    change = (POLICY, "policy: 'sweep_rule:Mine', label: mine")
    results = swept(small(world, change), jobs=2)
    assert results.computed == 8
    assert {row["policy"] for row in results.rows} == {"mine", "hurried"}
    assert keys(small(world, change)) == {row["key"] for row in results.rows}


def test_a_policy_that_writes_to_its_profile_is_refused_before_any_run(world: Path) -> None:
    more = "    def reset(self, worker, profile):\n        profile.steps.clear()\n"
    (world / "clearing.py").write_text(RULE.format(helper="NAME_OF_RULE = 'mine'", more=more))
    with pytest.raises(ContractError, match=r"policy 'mine': reset wrote steps of its profile, which it may only read"):
        small(world, (POLICY, "policy: 'clearing:Mine', label: mine"))
    assert small(world).devices


def test_the_best_batch_is_searched_and_recorded(world: Path) -> None:
    searched = "batch_search: {batches: [1, 2, 8, 64], loads: [0.5, 0.9], seed: 7, requests: 40}"
    grid = small(
        world,
        ("figures: []", f"figures: []\n{searched}"),
        ("continuous-serial, batch: 4", "continuous-serial, batch: best"),
    )
    results = swept(grid)
    assert [place["load"] for place in results.batches] == [0.5, 0.9]
    rows = table(world / "out" / "runs.parquet")
    for place in results.batches:
        assert sorted(place["request_latency_mean_s"]) == [1, 2, 8], "64 samples do not fit the profile's 32 rows"
        assert place["best_batch"] == min(place["request_latency_mean_s"], key=place["request_latency_mean_s"].get)
        used = {
            row["batch"]
            for row in rows
            if row["purpose"] == "grid" and row["policy"] == "continuous-serial" and row["load"] == place["load"]
        }
        assert used == {place["best_batch"]}
        tried = {
            row["batch"]: row["request_latency_mean_s"]
            for row in rows
            if row["purpose"] == "search" and row["load"] == place["load"]
        }
        assert tried == place["request_latency_mean_s"]
    assert json.loads((world / "out" / "manifest.json").read_text())["batches"][0]["best_batch"] in (1, 2, 8)
    assert {row["seed"] for row in rows if row["purpose"] == "search"} == {7}
    assert len(table(world / "out" / "requests.parquet")) == 8 * 30, "requests of the search are left out"


def test_a_list_of_batches_is_the_search_of_that_policy(world: Path) -> None:
    grid = small(world, ("continuous-serial, batch: 4", "continuous-serial, batch: [2, 3]"))
    (first, *_) = grid.searches.items()
    assert first[0] == Place(GridCell("test", 1, 1, "0", "", 1, "w", None), "continuous-serial", 0.6)
    assert sorted(first[1]) == [2, 3]


def test_the_best_batch_of_another_workload(world: Path) -> None:
    calm = "{name: calm, generator: poisson, parameters: {mix: fixed, steps: 2}, loads: [0.4], batch_from: w}"
    other = f"\n  - {calm}\npolicies:"
    grid = small(world, ("\npolicies:", other), ("continuous-serial, batch: 4", "continuous-serial, batch: best"))
    assert {place.cell.workload for place in grid.searches} == {"w"}
    best = {place: 2 if place.load == 0.6 else 8 for place in grid.searches}
    runs = [run for run in grid.runs(best) if run.label == "continuous-serial"]
    assert {run.spec.parameters["batch"] for run in runs if run.cell.workload == "calm"} == {2}


def test_ties_between_batches_and_between_loads() -> None:
    assert best_batch({4: 2.0, 2: 2.0, 8: 3.0}) == 2
    assert best_batch({4: None, 8: 3.0}) == 8
    assert [nearest(load, (0.6, 0.9)) for load in (0.3, 0.7, 0.75, 0.8, 2.0)] == [0.6, 0.6, 0.9, 0.9, 0.9]


def test_windows_are_replicates(world: Path) -> None:
    lines = "".join(f"{i},2\n" for i in range(100))
    (world / "t.csv").write_text(f"arrival_s,steps\n{lines}")
    windows = "{name: w, trace: t.csv, requests: 15, windows: [{start_s: 10, end_s: 20}, {start_s: 50, end_s: 90}]}"
    grid = small(world, ("{name: w, generator: poisson, parameters: {mix: fixed, steps: 4, images: 2}}", windows))
    results = swept(grid)
    sizes = {row["seed"]: row["trace_request_count"] for row in results.rows}
    assert sizes == {0: 10, 1: 15}
    first = next(row for row in results.rows if row["seed"] == 0 and row["load"] == 0.5)
    sustained = 2 / (2 * 0.042 / 8 + 0.030)
    assert 20 / (10 * first["time_scale"]) / sustained == pytest.approx(0.5)


def test_deadlines_reach_the_records_only_when_asked_for(world: Path) -> None:
    swept(small(world))
    assert {request["slo_s"] for request in table(world / "out" / "requests.parquet")} == {None}
    swept(small(world, ("figures: []", "figures: []\nslo: {solo_multiple: 2}")))
    # Alone: two images in four steps of 4 rows (18 ms), then two decodes of 30 ms.
    assert {request["slo_s"] for request in table(world / "out" / "requests.parquet")} == {2 * 0.132}


def test_the_skip_budget_reaches_the_runs(world: Path) -> None:
    change = ("figures: []", "figures: []\nskip_budget: {fraction: 0.5, warmup_steps: 1, longest_run: 2}")
    assert {run.spec.budget for run in small(world, change).runs({})} == {SkipBudget(500_000, 1, 2)}


def test_figures_come_after_the_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backlog = (
        "\n  - {name: burst, generator: gentd26-like, requests: 40, loads: [0.5], seeds: [1], backlog: true}\npolicies:"
    )
    small(world, ("figures: []\n", ""), ("\npolicies:", backlog))
    assert cli.main(["sweep", "e.yaml", "--jobs", "1", "--out", "out"]) == 0
    pictures = {path.name for path in (world / "out" / "figures").iterdir()}
    names = (
        "latency-load",
        "comparison",
        "throughput-load",
        "tradeoff",
        "stages",
        "lanes-test",
        "backlog-burst-test-load0.5-1",
    )
    assert pictures == {f"{name}.{kind}" for name in names for kind in ("png", "pdf", "svg")}
    assert all((world / "out" / "figures" / name).stat().st_size > 5000 for name in pictures)
    out = capsys.readouterr().out
    assert "w on test, means over 2 runs" in out
    assert "burst on test, means over 1 run" in out
    assert "out: 10 runs, 10 computed now and 0 found" in out


def test_a_failing_picture_loses_no_data(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr("synerdiff.experiments.report.latency_against_load", fail)
    small(world, ("figures: []\n", ""))
    assert cli.main(["sweep", "e.yaml", "--jobs", "1", "--out", "out"]) == 1
    assert len(table(world / "out" / "runs.parquet")) == 8


def test_results_go_to_a_folder_of_the_experiments_name(world: Path) -> None:
    assert cli.main(["sweep", "e.yaml", "--jobs", "1"]) == 0
    assert (world / "results" / "small" / "runs.parquet").is_file()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("policy: static", "policy: fifo"), "there is no policy 'fifo'; known are static, dynamic, "),
        (("max_wait_s: 0.1", "max_wait: 1"), "policy 'static' has no parameter 'max_wait'; it has batch, max_wait_s."),
        (
            ("max_wait_s: 0.1", "max_wait_s: -1"),
            "policy 'static': max_wait_s is -1; allowed is a number from 0 to 3600.",
        ),
        (
            ("max_wait_s: 0.1", "max_wait_s: soon"),
            "policy 'static': max_wait_s is 'soon'; allowed is a number from 0 to",
        ),
        (
            ("continuous-serial, batch: 4", "continuous-serial, batch: 17"),
            "policy 'continuous-serial': batch is 17, but ",
        ),
        (
            ("continuous-serial, batch: 4", "continuous-serial, batch: [20, 30]"),
            "policy 'continuous-serial': the steps of profile 'test' have at most 16 samples, which is less than any",
        ),
        (("generator: poisson", "generator: chaos"), "workload 'w': kind is 'chaos'; it must be 'poisson', "),
        (("images: 2", "images: 0"), "workload 'w': images is 0; it must be greater than or equal to 1."),
        (("images: 2", "seed: 2"), "workload 'w': seed is not among its parameters; give seeds beside them."),
        (("images: 2", "colour: 2"), "workload 'w': there is no field 'colour'; known are kind, seed, requests, "),
        (("profiles: [p]", "profiles: [q]"), "q: there is no such profile folder, and the shipped profiles are "),
        (("profiles: [p]", "profiles: [p, ./p]"), "profiles: ./p and another one are both named 'test'."),
        (
            ("generator: poisson, parameters: {mix: fixed, steps: 4, images: 2}", "trace: none.csv"),
            "{world}/none.csv: there is no such file.",
        ),
        (
            ("generator: poisson, parameters: {mix: fixed, steps: 4, images: 2}", "trace: $NO_SUCH_VARIABLE/t.csv"),
            "workload 'w': the environment variable NO_SUCH_VARIABLE of its trace is not set.",
        ),
        (
            ("generator: poisson, parameters: {mix: fixed, steps: 4, images: 2}", "trace: e.yaml"),
            "{world}/e.yaml (CSV): none of its columns says when requests arrive",
        ),
        (("requests: 30", "requests: 1"), ""),
    ],
)
def test_bad_experiments(
    world: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], expected: str
) -> None:
    (world / "e.yaml").write_text(SMALL.replace(*change))
    code = cli.main(["sweep", "e.yaml", "--jobs", "1", "--out", "out"])
    error = capsys.readouterr().err
    if not expected:
        assert code == 0
        return
    assert code == 2
    assert error.count("\n") == 1
    named = "" if expected.startswith("{world}/e.yaml") else "e.yaml: "
    assert error.startswith(named + expected.replace("{world}", str(world))), error
    assert not (world / "out" / "runs").exists(), "nothing was computed"


def test_a_policy_without_a_batch_has_none_to_search(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "sweep_bare.py").write_text(
        "class Bare:\n    chunking = 'whole'\n    def reset(self, worker, profile): pass\n"
        "    def decide(self, view): pass\n"
    )
    (world / "e.yaml").write_text(SMALL.replace("policy: continuous-serial", "policy: 'sweep_bare:Bare', label: bare"))
    assert cli.main(["sweep", "e.yaml", "--out", "out"]) == 2
    assert capsys.readouterr().err == "e.yaml: policies[0].batch: policy 'sweep_bare:Bare' has no parameter 'batch'.\n"


def test_flags(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["sweep", "e.yaml", "--jobs", "0"]) == 2
    assert capsys.readouterr().err == "--jobs is 0; a whole number from 1 to 4096 is needed.\n"
    assert cli.main(["sweep", "e.yaml", "--backend", "slurm"]) == 2
    assert capsys.readouterr().err == "There is no backend 'slurm'; known are loky, ray.\n"
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["sweep", "e.yaml", "--backend", "ray"]) == 2
    assert f"install it with: {install_hint('cluster')}" in capsys.readouterr().err
    assert cli.main(["sweep"]) == 2
    assert capsys.readouterr().err == "Missing argument 'file'.\n"
    assert not (world / "results").exists()


def test_folders_that_are_not_this_experiments(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(out: str) -> str:
        assert cli.main(["sweep", "e.yaml", "--jobs", "1", "--out", out]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        return printed.err

    assert "this folder holds e.yaml, which 'sweep small' did not write; give another folder." in refused(".")
    (world / "file").write_text("")
    assert "the output must be a folder; this is a file." in refused("file")
    assert "the output folder cannot be written" in refused("file/below")
    swept(small(world))
    (world / "e.yaml").write_text(SMALL.replace("name: small", "name: other"))
    assert "this folder holds what 'sweep small' wrote, not 'sweep other'; give another folder." in refused("out")


def test_a_broken_policy_ends_the_sweep_and_keeps_what_is_done(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "sweep_broken.py").write_text(
        "from synerdiff.core import Decision\n"
        "class Broken:\n"
        "    chunking = 'whole'\n"
        "    def reset(self, worker, profile): pass\n"
        "    def decide(self, view): return Decision(admit=(10**6,))\n"
    )
    good, bad = "{policy: continuous-serial, batch: 4}", "{policy: 'sweep_broken:Broken', label: broken}"
    (world / "e.yaml").write_text(SMALL.replace(f"  - {good}\n", f"  - {good}\n  - {bad}\n"))
    assert cli.main(["sweep", "e.yaml", "--jobs", "2", "--out", "out"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Broken" in error
    assert not (world / "out" / "runs.parquet").exists()
    assert json.loads((world / "out" / "manifest.json").read_text())["complete"] is False
    kept = len(list((world / "out" / "runs").glob("*.parquet")))
    results = swept(small(world))
    assert results.reused >= min(kept, 1)


LONG = SMALL.replace("requests: 30", "requests: 200").replace("seeds: [1, 2]", "seeds: [1, 2, 3, 4, 5, 6, 7, 8]")
START = "import sys; from synerdiff.cli import main; sys.exit(main(sys.argv[1:]))"


def _started(world: Path, code: str = START, jobs: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, "sweep", "e.yaml", "--jobs", str(jobs), "--out", "out"],
        cwd=world,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_interrupting_keeps_finished_runs(world: Path) -> None:
    (world / "e.yaml").write_text(LONG)
    process = _started(world)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list((world / "out").glob("runs/*.parquet"))) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and its workers
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "Interrupted.", error
    kept = {path.name: path.stat().st_mtime_ns for path in (world / "out" / "runs").glob("[!.]*.parquet")}
    assert 3 <= len(kept) < 32
    assert not (world / "out" / "runs.parquet").exists()
    process = _started(world)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert f"32 runs, {32 - len(kept)} computed now and {len(kept)} found" in out
    for name, written in kept.items():
        assert (world / "out" / "runs" / name).stat().st_mtime_ns == written
    assert list((world / "out" / "runs").glob("*.part")) == []


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))\n" + START


def test_a_full_disk_ends_the_sweep_and_keeps_what_is_done(world: Path) -> None:
    large = "\n  - {name: large, generator: poisson, requests: 400, loads: [0.5], seeds: [1]}\npolicies:"
    (world / "e.yaml").write_text(SMALL.replace("\npolicies:", large))
    # One process, so that it is certain which runs are done when the large one fails; the large ones come first.
    (world / "out").mkdir()
    swept(small(world))
    kept = sorted((world / "out" / "runs").glob("*.parquet"))
    (world / "e.yaml").write_text(SMALL.replace("\npolicies:", large))
    process = _started(world, FULL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot be written" in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert sorted((world / "out" / "runs").glob("*.parquet")) == kept


LEFTOVER = """
from joblib.externals.loky.backend import resource_tracker
from synerdiff.experiments.backends import LokyBackend
list(LokyBackend(1).run_unordered(abs, [1]))
resource_tracker.register("no-such-folder", "folder")
"""


def test_nothing_is_said_below_the_last_sentence_about_leftovers_that_are_gone(tmp_path: Path) -> None:
    # The tracker outlives the command and holds its standard error open: reading to the end waits for it.
    process = subprocess.run(
        [sys.executable, "-c", LEFTOVER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (0, "")


def _die_once(item: tuple[str, int]) -> int:
    folder, number = item
    marker = Path(folder) / str(number)
    if number == 5 and not marker.exists():
        marker.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def _die(item: int) -> int:
    os._exit(3)


def _refuse(item: int) -> int:
    if item == 3:
        raise InputError("three is not allowed.")
    return item


def _ignores_interrupts(item: int) -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_workers_leave_interrupts_to_the_command() -> None:
    assert list(LokyBackend(2).run_unordered(_ignores_interrupts, range(4))) == [True] * 4
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_work_of_a_dead_worker_is_given_out_again(tmp_path: Path) -> None:
    items = [(str(tmp_path), number) for number in range(12)]
    found = list(LokyBackend(2).run_unordered(_die_once, items))
    assert sorted(found) == [number * number for number in range(12)]
    assert (tmp_path / "5").exists()


def test_workers_that_always_die_end_the_sweep() -> None:
    with pytest.raises(InputError, match="Worker processes died 3 times in a row"):
        list(LokyBackend(2).run_unordered(_die, [1, 2]))


def test_an_error_in_a_worker_arrives_as_itself() -> None:
    with pytest.raises(InputError, match=r"^three is not allowed\.$"):
        list(LokyBackend(2).run_unordered(_refuse, range(20)))


def test_a_profile_that_changes_under_a_running_sweep_is_noticed(world: Path) -> None:
    run = small(world).runs({})[0]
    with pytest.raises(InputError, match="the profile changed while the sweep ran; start the sweep again"):
        run_module.profile_as_it_was(run.spec.profile, "something else")


@pytest.mark.skipif("SYNERDIFF_DATA" not in os.environ, reason="SYNERDIFF_DATA names no folder with GenTD26's files")
def test_the_experiment_on_gentd26_replays_its_requests(tmp_path: Path) -> None:

    path = ROOT / "experiments" / "gentd26.yaml"
    grid = Grid(load_experiment(path), path.parent, tmp_path / "out")
    windows = [arrivals(source) for source in grid.sources["gentd26-windows", None]]
    (whole,) = (arrivals(source) for source in grid.sources["gentd26-whole", None])
    assert whole.dropped == {"image-to-image": 2199, "inpainting": 186, "steps or images missing": 25}
    assert len(whole.requests) == 26_823 - sum(whole.dropped.values())
    assert [len(window.requests) for window in windows] == [1165, 1032, 943]
    assert {request.batch_key for request in whole.requests} == {("", None, None, ())}
    assert {run.cell.workload for runs in grid.searches.values() for run in runs.values()} == {"gentd26-windows"}


FLEETS = """
fleets:
  - {name: pool, gpus: [2, 3], router: [round-robin, declared-cost]}
  - name: split
    gpus: [2, 3]
    degree: [1, 2]
    stages: [null, {decode: 1, latent_bytes: 0, embedding_bytes: 0}]
    link: {gb_per_s: 25}
  - {name: mixed, kinds: {p: 1, q: 2}}
report: fleets
baselines: "pool, round-robin"
figures: [latency-load]
"""


def test_fleets_of_every_size_router_degree_stages_and_kind(world: Path) -> None:
    profile = affine_profile()
    steps = {rows: spread._replace(median=spread.median // 2, p10=1) for rows, spread in profile.steps.items()}
    write_profile(world / "p", replace(profile, degrees={2: steps}))
    write_profile(world / "q", affine_profile(base_ms=30))
    hurried = "  - {policy: static, label: hurried, batch: 4, parameters: {max_wait_s: 0.1}}"
    changes = ("figures: []", FLEETS), (hurried, "")
    grid = small(world, *changes)
    fleets = {(run.cell.fleet, run.cell.gpus): run.spec.cluster for run in grid.runs({})}
    assert list(fleets) == [
        ("pool, round-robin", 2), ("pool, declared-cost", 2), ("pool, round-robin", 3), ("pool, declared-cost", 3),
        ("split, degree 1, together", 2), ("split, degree 1, 1 decode", 2), ("split, degree 2, together", 2),
        ("split, degree 1, together", 3), ("split, degree 1, 1 decode", 3), ("split, degree 2, 1 decode", 3),
        ("mixed", 3),
    ]  # fmt: skip
    of = {name: [(w.degree, w.profile) for w in cluster.workers] for name, cluster in fleets.items() if cluster}
    assert of["split, degree 1, 1 decode", 3] == [(1, None)] * 2
    assert of["split, degree 2, 1 decode", 3] == [(2, None)]
    assert of["mixed", 3] == [(1, "p"), (1, "q"), (1, "q")]
    results = swept(grid)
    first = [row for row in results.rows if (row["load"], row["seed"]) == (0.5, 1)]
    scale = {(row["fleet"], row["gpus"]): row["time_scale"] for row in first}
    assert len({scale[place] for place in scale if place[1] == 2}) == 1, "as many GPUs, the same arrivals"
    assert scale["mixed", 3] > scale["pool, round-robin", 3], "slower cards are offered less"
    parts: Any = publish(grid.experiment, results)[0]
    shown = {line[:4]: line[4:] for line in parts[1]}
    assert shown["pool, round-robin", "2", "w", "0.5"][3] == "-"
    assert shown["split, degree 2, together", "2", "w", "0.5"][3].endswith("]")
    assert (world / "out" / "figures" / "fleets.png").is_file()
    again = small(world, *changes)
    write_profile(world / "q", affine_profile(base_ms=31))
    changed = small(world, *changes)
    assert len(keys(again) - keys(changed)) == 4, "the runs of the fleet that names the profile that changed"


def test_a_fleet_of_no_size_is_refused(world: Path) -> None:
    with pytest.raises(InputError, match="fleet 'pool': no number of GPUs can be divided by its degrees and stages"):
        small(world, ("figures: []", "fleets: [{name: pool, gpus: [2, 3], degree: 4}]"))
    with pytest.raises(InputError, match=r"degree\[0\] is 3"):
        small(world, ("figures: []", "fleets: [{name: pool, gpus: 3, degree: 3}]"))
