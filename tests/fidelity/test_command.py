"""``synerdiff fidelity`` and ``--min-ssim`` from end to end, and one sentence for every bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synerdiff import cli
from synerdiff.core import InputError
from synerdiff.experiments.fidelity_tradeoff import FEWER_STEPS, trade_off, variants
from synerdiff.fidelity.table import read_fidelity, write_fidelity
from synerdiff.profile.folder import write_profile
from synerdiff.profile.tables import Head
from synerdiff.results.records import read_requests, read_table
from tests.builders import affine_profile
from tests.fidelity.test_floor import ROWS, TABLE
from tests.fidelity.test_table import HEAD

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly so on a busy machine


def profile_of_digits() -> Any:
    profile = affine_profile()
    profile.head = Head(model="digits", resolutions=((32, 32),))
    return profile


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile ``p`` of digits with a fidelity table beside it, a trace, and the working folder there."""
    write_profile(tmp_path / "p", profile_of_digits())
    write_fidelity(tmp_path / "p", HEAD, ROWS)
    lines = [f"{i * 0.02:.2f},6,4.0\n" for i in range(40)]
    (tmp_path / "t.csv").write_text("arrival_s,steps,guidance_scale\n" + "".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulate(*more: str) -> int:
    arguments = ["--profile", "p", "--trace", "t.csv", "--policy", "load-skip", "--set", "skip_queue=0", "--out", "out"]
    return cli.main(["simulate", *arguments, *more])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error: a sweep's bar may stand above it."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


def test_a_floor_instead_of_a_fraction(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--min-ssim", "0.965") == 0
    assert "6 steps: reuse-(1, 2, 4)-6, 75% of the rows, SSIM 0.970" in capsys.readouterr().out
    modes = set(read_requests(world / "out")["modes"])
    assert modes == {"grrgrg"}
    run = json.loads((world / "out" / "summary.json").read_text())["run"]
    assert (run["min_ssim"], run["skip_fraction_allowed"]) == (0.965, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-ssim", "0.999"], "no rule for 6 steps reaches an SSIM of 0.999"),
        (["--min-ssim", "1.5"], "the fidelity floor is 1.5; an SSIM above 0 and below 1 is needed."),
        (["--min-ssim", "0.9", "--skip-fraction", "0.5"], "--min-ssim chooses which steps may be skipped"),
        (["--min-ssim", "0.9", "--skip-mode", "conditional"], "so it excludes the options --skip-..."),
        (["--fidelity", "p"], "--fidelity names the table that --min-ssim looks up; give both or neither."),
        (["--min-ssim", "0.9", "--fidelity", "nowhere"], "nowhere: this folder holds no fidelity.yaml"),
    ],
)
def test_bad_floors(world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert simulate(*arguments) == 2
    assert message in sentence(capsys)


def test_a_table_of_another_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fidelity(world / "other", {**HEAD, "model": "sd15"}, ROWS)
    assert simulate("--min-ssim", "0.9", "--fidelity", "other") == 2
    assert "other: this fidelity table is of model 'sd15'; the profile is of 'digits'." in sentence(capsys)


EXPERIMENT = """
name: floor
profiles: [p]
requests: 30
loads: [0.8]
seeds: [1]
skip_budget: {%s}
workloads:
  - name: w
    generator: poisson
    parameters: {mix: fixed, steps: 6, guidance_scale: 4.0}
policies:
  - policy: load-skip
    parameters: {skip_queue: 0}
    batch: 2
figures: [tradeoff]
"""


def sweep(world: Path, budget: str) -> int:
    (world / "e.yaml").write_text(EXPERIMENT % budget)
    return cli.main(["sweep", "e.yaml", "--out", "results", "--jobs", "1"])


def test_a_sweep_with_a_floor(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(world, "min_ssim: 0.965") == 0
    runs = sorted((world / "results").rglob("runs/*.parquet"))
    assert {modes for path in runs for modes in read_requests(path)["modes"]} == {"grrgrg"}
    # Another floor is another run; the same floor is not run again.
    assert sweep(world, "min_ssim: 0.98, fidelity: p") == 0
    assert len(sorted((world / "results").rglob("runs/*.parquet"))) == 2 * len(runs)
    capsys.readouterr()


def test_the_trade_off_has_fidelity_as_its_third_axis(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a floor every run of the grid has its SSIM; fewer steps stand beside skipping, at full guidance."""
    fewer = "\n  - {policy: load-skip, label: fewer steps, steps_scale: 0.67, batch: 2}\nfigures"
    text = (EXPERIMENT % "min_ssim: 0.965").replace("\nfigures", fewer)
    (world / "e.yaml").write_text(text)
    assert cli.main(["sweep", "e.yaml", "--out", "results", "--jobs", "1"]) == 0
    runs = read_table(world / "results" / "runs.parquet", {})[0].to_pandas().set_index("policy")
    assert runs["ssim"].to_dict() == pytest.approx({"load-skip": 0.97, "fewer steps": 0.972})
    assert runs["skip_fraction"].to_dict() == pytest.approx({"load-skip": 0.5, "fewer steps": 0.0})
    steps = {
        row["modes"]
        for path in (world / "results" / "runs").glob("*.parquet")
        for row in read_table(path, {})[0].to_pylist()
    }
    assert steps == {"grrgrg", "gggg"}
    assert (world / "results" / "figures" / "tradeoff.png").is_file()
    # The arrivals and deadlines are those of all steps.
    assert runs["offered_request_rate"].nunique() == 1
    capsys.readouterr()
    (world / "e.yaml").write_text(text.replace("0.67", "0.34"))
    assert cli.main(["sweep", "e.yaml", "--out", "results", "--jobs", "1"]) == 2
    assert "no rule that covers full guidance in 2 steps against 6 at guidance scale 4" in sentence(capsys)


def test_a_sweep_on_the_table_of_another_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where no policy skips."""
    write_fidelity(world / "other", {**HEAD, "resolution": 64}, ROWS)
    assert sweep(world, "min_ssim: 0.9, fidelity: other") == 2
    assert "other: this fidelity table is for 64x64 pixels; the profile is for 32x32." in sentence(capsys)
    (world / "e.yaml").write_text((EXPERIMENT % "min_ssim: 0.9, fidelity: other").replace("batch: 2", "skip: false"))
    assert cli.main(["sweep", "e.yaml", "--out", "other-results", "--jobs", "1"]) == 2
    assert "the profile is for 32x32" in sentence(capsys)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "min_ssim: 0.9, fraction: 0.5",
            "skip_budget: min_ssim chooses which steps may be skipped, so it excludes fraction",
        ),
        ("fidelity: p", "skip_budget: fidelity names the table that min_ssim looks up; min_ssim is missing"),
        ("min_ssim: 1.0", "skip_budget.min_ssim is 1.0; it must be less than 1"),
        ("min_ssim: 0.999", "no rule for 6 steps reaches an SSIM of 0.999"),
    ],
)
def test_bad_floors_in_an_experiment(
    world: Path, capsys: pytest.CaptureFixture[str], budget: str, message: str
) -> None:
    assert sweep(world, budget) == 2
    assert message in sentence(capsys)


def fidelity(*more: str, model: str = "digits") -> int:
    return cli.main(["fidelity", "--model", model, "--out", "f", *more])


def test_the_command_writes_table_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("3\n\n7\n")
    write_profile(tmp_path / "p", profile_of_digits())
    arguments = ["--steps", "5", "--guidance-scale", "3", "--samples", "4", "--batch", "4", "--rules", "core"]
    assert fidelity(*arguments, "--prompts", "prompts.txt", "--profile", "p") == 0
    printed = capsys.readouterr().out
    assert "DDIMScheduler, 5 steps, guidance 3: against full guidance" in printed
    table = read_fidelity(tmp_path / "f")
    assert table.head["versions"]["torch"] == torch.__version__
    assert {"conditional-last-2of5", "reuse-spread-2of5", "full-4"} <= {row.rule for row in table.rows}
    for name in ("fidelity-rows", "fidelity-sheet-DDIM-5-3", "fidelity-steps-DDIM-5-3", "fidelity-latency-DDIM-5-3"):
        for kind in ("png", "pdf"):
            assert (tmp_path / "f" / f"{name}.{kind}").stat().st_size > 5000
        assert f"f/{name}.png" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "--steps is 2; 5 to 1000 is allowed."),
        (["--samples", "1"], "--samples is 1; 4 to 1000000 is allowed."),
        (["--batch", "0"], "--batch is 0; 1 to 4096 is allowed."),
        (["--seed", "-1"], "--seed is -1;"),
        (["--guidance-scale", "1"], "--guidance-scale is 1; above 1"),
        (["--guidance-scale", "nan"], "--guidance-scale is nan; above 1"),
        (["--rules", "some"], "--rules is 'some'; allowed are all and core."),
        (["--prompts", "none.txt"], "none.txt: there is no such file of prompts."),
        (["--dtype", "int8"], "--dtype is 'int8'; allowed are float32, bfloat16, float16."),
        (["--scheduler", "often"], "There is no scheduler often"),
        (["--profile", "nowhere"], "nowhere: there is no such profile folder"),
        (["--profile", "h200-sdxl-estimated"], "'h200-sdxl-estimated' is of model 'sdxl'; the study is of 'digits'."),
        (["--profile", "large"], "--profile: 'test' is for 64x64 pixels; the study is of 32x32."),
    ],
)
def test_bad_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    large = profile_of_digits()
    large.head = Head(model="digits", resolutions=((64, 64),))
    write_profile(tmp_path / "large", large)
    assert fidelity(*arguments) == 2
    assert message in sentence(capsys)


def test_a_folder_of_something_else_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "profile.yaml").write_text("mine")
    monkeypatch.setattr("synerdiff.experiments.levers.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert fidelity("--steps", "5") == 2
    assert "f: this folder holds profile.yaml, which 'fidelity' did not write" in sentence(capsys)


def test_bad_prompts_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("3\n")
    assert fidelity("--prompts", "one.txt") == 2
    assert "one.txt: at least 2 prompts are needed, one a line; found 1." in sentence(capsys)
    assert fidelity(model="nothing") == 2
    assert "There is no model nothing" in sentence(capsys)


def test_what_skips_and_fewer_steps_buy() -> None:
    """More skips and fewer steps serve more, at lower fidelity; skipping under load only is closer than always."""
    profile = profile_of_digits()
    rows = tuple(row for row in ROWS if row.guidance_scale == 4.0)
    table = replace(TABLE, rows=rows)
    names = {(variant.policy, variant.name) for variant in variants(table, 6, 4.0, profile)}
    assert {
        (FEWER_STEPS, "6 steps"),
        (FEWER_STEPS, "5 steps"),
        (FEWER_STEPS, "4 steps"),
        (FEWER_STEPS, "3 steps"),
    } <= names
    frame = trade_off(profile, table, 6, 4.0, loads=(1.2,), seeds=(1,), requests=150).set_index(["policy", "variant"])
    full, fewer = frame.loc[(FEWER_STEPS, "6 steps")], frame.loc[(FEWER_STEPS, "4 steps")]
    assert full["ssim"] == 1.0  # type: ignore[call-overload, index]
    assert fewer["ssim"] == pytest.approx(0.972)  # type: ignore[call-overload, index]
    assert fewer["request_latency_mean_s"] < full["request_latency_mean_s"]  # type: ignore[call-overload, index]
    always = frame.loc[("skip always", "reuse-(1, 2, 4)-6")]
    loaded = frame.loc[("skip while samples wait", "reuse-(1, 2, 4)-6")]
    assert always["ssim"] == pytest.approx(0.97)  # type: ignore[call-overload, index]
    assert 0.97 < loaded["ssim"] < 1.0  # type: ignore[call-overload, index, operator]
    assert always["request_latency_mean_s"] <= loaded["request_latency_mean_s"] < full["request_latency_mean_s"]  # type: ignore[call-overload, index]
    with pytest.raises(InputError, match="does not cover 9 steps"):
        trade_off(profile, table, 9, 4.0)
