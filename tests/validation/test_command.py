"""``synerdiff validate`` from end to end on the embedded model: what it measures varies, what it writes does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from synerdiff import cli
from synerdiff.profile.folder import load_profile, write_profile
from tests.builders import affine_profile, make_profile
from tests.hardware import digits_profile

torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small profile ``p`` of the embedded model, a trace ``t.csv``, and the working folder there."""
    small = make_profile(
        {1: 7_000_000, 2: 9_000_000, 4: 13_000_000},
        {"whole": [4_000_000]},
        {1: (1_300_000, 1_300_000), 4: (1_200_000, 1_200_000)},
    )
    small.head = digits_profile().head.model_copy(update={"cuts": {}})
    write_profile(tmp_path / "p", small)
    rows = "".join(f"{i * 0.1:.1f},{1 + i % 3},3.0\n" for i in range(12))
    (tmp_path / "t.csv").write_text("arrival_s,steps,guidance_scale\n" + rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def validate(*more: str) -> int:
    return cli.main(["validate", "--profile", "p", "--trace", "t.csv", "--out", "o", *more])


def test_a_validation_measures_predicts_and_judges(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    policies = ["--policy", "continuous-serial", "--policy", "continuous-parallel"]
    code = validate(*policies, "--load", "0.5", "--repeats", "1")
    data = json.loads((world / "o" / "validation.json").read_text())
    assert code == int(bool(data["cells_not_measured"]) or any(c["verdict"] == "failed" for c in data["checks"]))
    assert data["repeats"] == 1
    assert data["loads"] == ["0.5", "saturation"]
    assert data["tolerance"]["name"] == "cpu"
    assert (data["execution"], data["not_as_measured"]) == ("eager", None)
    assert len(data["cases"]) == 4
    for case in data["cases"]:
        assert case["faults"] == 0
        assert case["metrics"]["step_time_s"]["measured"] > 0
        assert len(case["metrics"]["step_time_s"]["repeats"]) == 1
    refreshed = load_profile(world / "o" / "profile")
    assert refreshed.head.execution == "eager"
    assert refreshed.steps[2].n >= 6 * 3, "three plain steps in two passes before the first run and one after each"
    assert refreshed.steps[2].median != 9_000_000
    assert refreshed.corun["whole", 0][2].chunk.n >= 1
    printed = capsys.readouterr().out
    assert printed == (world / "o" / "report.md").read_text()
    assert printed.startswith("# Prediction against hardware: ")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--tolerance", "loose"], "--tolerance is 'loose'; allowed are strict and cpu."),
        (["--repeats", "0"], "--repeats is 0; at least 1 is needed."),
        (["--load", "9"], "--load is 9; a number above 0 and up to 2 is needed."),
        (["--profile", "h200-sdxl-estimated"], "is estimated; only a measured one can be validated."),
        (["--profile", "nameless"], "does not say for which model it was made; give --model."),
        (["--policy", "best"], "there is no policy 'best'"),
        (["--out", "p"], "which 'validate' did not write; give another folder."),
    ],
)
def test_bad_input_is_one_sentence(
    world: Any, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    write_profile(world / "nameless", affine_profile())
    assert validate(*more) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.strip().count("\n") == 0
