"""``synerdiff run`` from end to end on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synerdiff import cli
from synerdiff.profile.folder import write_profile
from synerdiff.profile.tables import Head
from synerdiff.results.records import read_requests, read_work
from tests.builders import affine_profile
from tests.hardware import digits_profile

torch.set_num_threads(1)

TRACE = "arrival_s,steps,images,guidance_scale,seed\n0,4,1,4.0,31\n0.01,6,2,4.0,\n0.02,3,1,1.0,33\n0.05,5,1,4.0,34\n"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a profile ``p`` of the embedded model and a trace ``t.csv``, and the working folder there."""
    write_profile(tmp_path / "p", digits_profile())
    (tmp_path / "t.csv").write_text(TRACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*more: str, policy: str = "continuous-parallel") -> int:
    return cli.main(["run", "--profile", "p", "--trace", "t.csv", "--policy", policy, "--out", "out", *more])


def test_a_run_writes_what_a_simulated_one_does_and_its_images(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lanes = ["--decode-gpus", "0,0"]
    assert run("--model", "digits", "--images", "made", "--timeline", *lanes) == 0
    same = ["--profile", "p", "--trace", "t.csv", "--policy", "continuous-parallel", *lanes]
    assert cli.main(["simulate", *same, "--out", "sim"]) == 0
    requests, simulated = read_requests(world / "out"), read_requests(world / "sim")
    assert list(requests.columns) == list(simulated.columns)
    assert set(requests["status"]) == {"done"}
    own = ["arrival_s", "steps", "images", "seed", "guidance_scale", "modes"]
    assert requests[own].equals(simulated[own])
    stages = requests[["arrival_s", "admitted_s", "denoised_s", "decode_started_s", "finished_s"]].to_numpy(float)
    assert (np.diff(stages, axis=1) >= 0).all()
    work = read_work(world / "out")
    assert list(work.columns) == list(read_work(world / "sim").columns)
    assert (work["kind"] == "chunk").sum() == 5
    assert (work["end_ns"] > work["start_ns"]).all()
    assert json.loads((world / "out" / "timeline.json").read_text())["traceEvents"]
    summary = json.loads((world / "out" / "summary.json").read_text())
    assert summary["run"]["model"] == "digits"
    assert summary["run"]["warm_up_s"] > 0
    assert summary["run"]["faults"] == []
    assert summary["run"]["dispatch"]["step_dispatch"]["count"] == (work["kind"] == "step").sum()
    assert summary["run"]["dispatch"]["sender_lag"]["count"] == 4
    other = json.loads((world / "sim" / "summary.json").read_text())
    assert set(summary) - set(other) <= {"lane_utilisation_gpu0_decode1"}, "whether both lanes are needed is chance"
    printed = capsys.readouterr().out
    assert "weights     trained" in printed
    assert "lanes idle between pieces" in printed
    assert "sender behind its schedule" in printed
    _check_images(world / "made")


def test_a_run_takes_its_profiles_levers_and_says_when_it_does_not(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = digits_profile()
    profile.provenance = "measured"
    profile.head = profile.head.model_copy(update={"execution": "eager", "levers": ("channels-last", "qkv")})
    write_profile(world / "fused", profile)
    more = ["--trace", "t.csv", "--policy", "static"]
    assert cli.main(["run", "--profile", "fused", "--out", "one", *more]) == 0
    facts = json.loads((world / "one" / "summary.json").read_text())["run"]
    assert (facts["execution"], facts["levers"]) == ("eager", ["channels-last", "qkv"])
    assert facts["memory_format"] == "channels_last"
    assert facts["not_as_measured"] is None
    assert "execution   eager (channels-last, qkv)" in capsys.readouterr().out
    profile.head = profile.head.model_copy(update={"execution": "compiled"})
    write_profile(world / "compiled", profile)
    assert cli.main(["run", "--profile", "compiled", "--execution", "eager", "--out", "two", *more]) == 0
    facts = json.loads((world / "two" / "summary.json").read_text())["run"]
    assert (facts["execution"], facts["levers"]) == ("eager", [])
    said = "profile 'test' was measured compiled (channels-last, qkv), this runs eager: its times are not"
    assert facts["not_as_measured"].startswith(said)
    assert said in capsys.readouterr().out


def test_a_closed_loop_sends_one_when_the_one_before_has_ended(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max-concurrency", "1", policy="continuous-serial") == 0
    table = read_requests(world / "out")
    assert set(table["status"]) == {"done"}
    assert (table["arrival_s"].to_numpy()[1:] >= table["finished_s"].to_numpy()[:-1]).all()
    assert table["intended_arrival_s"].tolist() == [0.0, 0.01, 0.02, 0.05]
    assert "closed loop 1 requests in the system at a time" in capsys.readouterr().out


def _check_images(folder: Path) -> None:
    from PIL import Image

    from synerdiff.diffusion.checkpoint import load_model
    from synerdiff.diffusion.stages import finished_picture

    assert sorted(path.name for path in folder.iterdir()) == ["0.0.png", "1.0.png", "1.1.png", "2.0.png", "3.0.png"]
    with Image.open(folder / "1.1.png") as image:
        assert image.size == (32, 32)
        assert image.text == {  # type: ignore[attr-defined]
            "software": "synerdiff",
            "model": "digits",
            "policy": "continuous-parallel",
            "scheduler": "DDIMScheduler",
            "weights": "trained",
            "request": "1",
            "image": "1",
            "prompt": "1",
            "seed": image.text["seed"],  # type: ignore[attr-defined]
            "steps": "6",
            "guidance_scale": "4",
            "modes": "gggggg",
        }
        pixels, seed = np.asarray(image).astype(int), int(image.text["seed"])  # type: ignore[attr-defined]
    model = load_model("digits")
    state = model.start(seed, 6, 4.0, "1")
    while not state.done:
        model.step([state])
    again = np.asarray(finished_picture(model.decode(state.latent))).astype(int)
    assert np.abs(pixels - again).max() <= 1, "the parameters in the file make the image again"


INTERRUPTING = """
import os, signal
from policies.continuous import ContinuousSerial

class Interrupting(ContinuousSerial):
    NAME = "interrupting"
    def decide(self, view):
        if view.gone:
            os.kill(os.getpid(), signal.SIGINT)
        return super().decide(view)

class Broken(ContinuousSerial):
    NAME = "broken"
    def decide(self, view):
        if view.gone:
            raise KeyError("a bug of the user's")
        return super().decide(view)
"""


def test_an_interrupted_run_writes_what_was_finished(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "halting_policies.py").write_text(INTERRUPTING)
    (world / "t.csv").write_text("arrival_s,steps\n0,2\n30,2\n60,2\n")
    assert run(policy="halting_policies:Interrupting") == 130
    assert list(read_requests(world / "out")["status"]) == ["done", "unfinished", "unfinished"]
    summary = json.loads((world / "out" / "summary.json").read_text())
    assert summary["unfinished_count"] == 2
    assert [fault["kind"] for fault in summary["run"]["faults"]] == ["stopped"]
    printed = capsys.readouterr().err
    assert "Stopping: what runs is finished first" in printed
    assert "Interrupted: 2 requests are unfinished; what was finished is written." in printed


def test_a_policy_that_breaks_loses_nothing(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "halting_policies.py").write_text(INTERRUPTING)
    (world / "t.csv").write_text("arrival_s,steps\n0,2\n0.5,2\n")
    assert run(policy="halting_policies:Broken") == 1
    assert "a bug of the user's" in capsys.readouterr().err
    assert list(read_requests(world / "out")["status"]) == ["done", "unfinished"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--decode-gpus", "0,1"], "--decode-gpus 0,1: a run uses one GPU, so every decode lane is on GPU 0."),
        (["--watchdog", "0"], "--watchdog is 0; a number of seconds above 0 and below a million is needed."),
        (["--images", "p"], "p: the folder for images holds "),
        (["--model", "sdxl"], "profile 'test' was made for the model digits, not for sdxl."),
        (["--device", "tpu"], "There is no device tpu; use cpu, cuda or cuda:N."),
        (["--dtype", "int8"], "the dtype is 'int8'; allowed are float32, bfloat16, float16."),
        (["--profile", "nameless"], "profile 'test' does not say for which model it was made; give --model."),
        (["--profile", "uncut", "--policy", "chunked"], "does not say where its chunking c4 cuts the decode"),
    ],
)
def test_bad_input_is_one_sentence(
    world: Any, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    write_profile(world / "nameless", affine_profile())
    uncut = digits_profile()
    uncut.head = Head(model="digits")
    write_profile(world / "uncut", uncut)
    assert run(*more) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert not (world / "out" / "requests.parquet").exists()
