"""``synerdiff run`` with adapters, processes beside it, Ctrl-C and torchrun; ``synerdiff profile --adapters``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from profiler.adapter_cells import Session
from real_runner.hardware import Hardware
from synerdiff import cli
from synerdiff.core import InputError
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.controlnet import random_controlnet
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.profile.adapters import QUANTITIES, load_adapters
from synerdiff.profile.folder import write_profile
from synerdiff.results.records import read_requests, read_work
from tests.adapter_world import make_world
from tests.hardware import digits_profile

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
HEADER = "arrival_s,steps,images,guidance_scale,seed,loras,controlnets\n"
FOLDERS = ["--loras", "loras", "--controlnets", "controlnets", "--controlnet-images", "images"]
CLUSTER = """
workers:
  - {denoise_gpu: 0}
strategies: {loras: asynchronous, lora_bound_steps: 1, controlnets: service}
controlnet_services:
  - {gpu: 1, controlnets: [edges]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("world")
    write_profile(root / "p", digits_profile())
    make_world(root, load_model("digits"))
    (root / "t.csv").write_text(HEADER + "0,3,1,4.0,1,ink@0.5,edges@0.8\n0.05,3,1,4.0,2,,edges=first.png\n")
    (root / "loaded.yaml").write_text("workers:\n  - {denoise_gpu: 0}\nstrategies: {loras: asynchronous}\n")
    (root / "c.yaml").write_text(CLUSTER)
    return root


@pytest.fixture
def world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    return folder


def words(*more: str, out: str = "out", trace: str = "t.csv") -> list[str]:
    return ["run", "--profile", "p", "--trace", trace, "--policy", "dynamic", "--out", out, *more]


def test_a_run_without_a_cluster_does_all_itself(world: Any) -> None:
    from PIL import Image

    assert cli.main(words(*FOLDERS, "--images", "made", "--timeline", out="own")) == 0
    assert set(read_requests(world / "own")["status"]) == {"done"}
    work = read_work(world / "own")
    assert set(work["lane"]) == {"denoise", "decode0", "loader"}
    assert {"merge", "restore", "load", "controlnet", "step", "chunk"} == set(work["kind"])
    names = {event["name"] for event in json.loads((world / "own" / "timeline.json").read_text())["traceEvents"]}
    assert {"merge of a LoRA", "restore of weights", "load", "ControlNet of 2 rows"} <= names
    with Image.open(world / "made" / "0.0.png") as image:
        assert (image.text["loras"], image.text["controlnets"]) == ("ink@0.5", "edges@0.8")  # type: ignore[attr-defined]


def test_ctrl_c_ends_the_run_and_all_its_processes(world: Any) -> None:
    rows = "".join(f"{0.2 * i},40,1,4.0,{i % 20},ink,edges\n" for i in range(2000))
    (world / "long.csv").write_text(HEADER + rows)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "synerdiff.cli", *words("--cluster", "c.yaml", *FOLDERS, "--images", "begun",
                                                            out="cut", trace="long.csv")]  # fmt: skip
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, process_group=0) as running:
        until = time.monotonic() + 120
        while not any((world / "begun").glob("*.png")) if (world / "begun").exists() else True:
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        beside = children(running.pid)
        assert len(beside) == 2
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) == 130
        message = running.stderr.read().decode()  # type: ignore[union-attr]
    assert "Stopping: what runs is finished first" in message
    assert "Traceback" not in message
    assert not any(Path(f"/proc/{pid}").exists() for pid in beside)
    status = set(read_requests(world / "cut")["status"])
    assert status == {"done", "unfinished"}
    assert {"controlnet", "loader"} <= set(read_work(world / "cut")["lane"])


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_torchrun_starts_the_same_processes(world: Any) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "synerdiff.cli", *words("--cluster", "loaded.yaml", *FOLDERS, out="torchrun")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert set(read_requests(world / "torchrun")["status"]) == {"done"}
    assert ("loader", "load") in set(zip(*(read_work(world / "torchrun")[c] for c in ("lane", "kind")), strict=True))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--cluster", "c.yaml", "--decode-gpus", "0,0"], "--decode-gpus excludes --cluster"),
        (["--cluster", "slow.yaml"], "link: a run on hardware has the links that it has; leave this out."),
        (FOLDERS[2:], "request 0 asks for LoRAs; give their folder with --loras."),
        (["--cluster", "two.yaml"], "the cluster has 2 workers; a run on hardware has one."),
    ],
)
def test_bad_input_is_one_sentence(world: Any, capsys: pytest.CaptureFixture[str], more: Any, sentence: str) -> None:
    (world / "slow.yaml").write_text("workers:\n  - {denoise_gpu: 0}\nlink: {gb_per_s: 1}\n")
    (world / "two.yaml").write_text("workers:\n  - {denoise_gpu: 0}\n  - {denoise_gpu: 1}\n")
    assert cli.main(words(*more, out="bad")) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ("1,nowhere,", r"request 1: .*nowhere\.safetensors: there is no such LoRA\."),
        ("1,torn,", r"request 1: .*torn\.safetensors: this is not a whole safetensors file"),
        ("1,wide,", r"request 1: LoRA wide: its layer .* changes a weight"),
        ("1,../p/x,", r"request 1: \.\./p/x\.safetensors: this LoRA lies outside the folder of LoRAs"),
        ("77,,nowhere", r"there is no ControlNet 'nowhere'"),
        ("77,,edges", r"request 1: .*77\.png: there is no such conditioning picture\."),
    ],
)
def test_files_are_read_before_the_run(
    world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cells: str, sentence: str
) -> None:
    def warm(*_: object) -> None:
        raise AssertionError("nothing is warmed up")

    monkeypatch.setattr(Hardware, "__init__", warm)
    (world / "ask.csv").write_text(HEADER + f"0,3,1,4.0,1,,\n0.05,3,1,4.0,{cells}\n")
    assert cli.main(words(*FOLDERS, trace="ask.csv", out="ask")) == 2
    printed = capsys.readouterr().err
    assert re.search(sentence, printed)
    assert printed.count("\n") == 1


def test_a_run_in_which_every_request_failed_is_a_failed_check(
    world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(*_: object) -> None:
        raise InputError("it is gone.")

    (world / "lost.csv").write_text(HEADER + "0,3,1,4.0,1,ink,\n0.05,3,1,4.0,2,ink,\n")
    monkeypatch.setattr(MergedWeights, "merge", vanished)
    assert cli.main(words("--loras", "loras", trace="lost.csv", out="lost")) == 1
    assert capsys.readouterr().err == "No request was served: 2 failed.\n"
    assert set(read_requests(world / "lost")["status"]) == {"failed"}


def test_adapters_that_no_request_can_have_fail_the_check_and_are_recorded(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "none.csv").write_text(HEADER + "0,3,1,4.0,1,nowhere,\n0.05,3,1,4.0,2,torn,\n")
    assert cli.main(words("--loras", "loras", trace="none.csv", out="none")) == 1
    printed = capsys.readouterr()
    assert printed.err == "No request was served: 2 failed.\n"
    assert "there is no such LoRA" in printed.out
    assert set(read_requests(world / "none")["status"]) == {"failed"}


def test_a_lora_of_a_kind_that_is_not_merged_fails_its_request_alone(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"unet.x.lora_magnitude_vector": torch.ones(1)}, world / "loras" / "dora.safetensors")
    (world / "kinds.csv").write_text(HEADER + "0,3,1,4.0,1,dora,\n0.05,3,1,4.0,2,ink,\n")
    assert cli.main(words("--loras", "loras", trace="kinds.csv", out="kinds")) == 0
    assert "is one of a DoRA, which cannot be merged here" in capsys.readouterr().out
    assert list(read_requests(world / "kinds")["status"]) == ["failed", "done"]


@contextmanager
def alone(settings: Any, bench: Any) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as name:
        net = random_controlnet("random", bench.model)
        net.net.save_pretrained(str(Path(name) / net.name))
        yield Session(bench, Path(name), net, None)


def test_profile_adapters_writes_every_quantity(
    world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = digits_profile()
    profile.row_buckets = (1, 2)
    profile.steps = {rows: spread for rows, spread in profile.steps.items() if rows <= 2}
    for cells in profile.corun.values():
        cells.update({2: cells.pop(32)})  # type: ignore[attr-defined]
    write_profile(world / "small", profile)
    assert cli.main(["profile", "--model", "digits", "--out", "small", "--adapters", "--quick"]) == 0
    assert "adapters.csv" in capsys.readouterr().out
    found = load_adapters(world / "small")
    assert found is not None
    assert set(found.tables) == set(QUANTITIES)
    assert set(found.tables["controlnet_forward"]) == {1, 2}
    assert len(found.tables["lora_merge"]) == 3
    assert all(spread.n >= 1 for table in found.tables.values() for spread in table.values())
    model = load_model("digits")
    assert found.bytes_of("prediction_bytes", 1) == 4 * 4 * 8 * 8
    assert found.constant("controlnet_bytes") < sum(w.numel() * 4 for w in model.unet.parameters())
    # A machine with one GPU has no place for a second process: what needs one is left out, and that is said.
    monkeypatch.setattr("profiler.adapter_cells.open_session", alone)
    assert cli.main(["profile", "--model", "digits", "--out", "small", "--adapters", "--quick"]) == 0
    assert "not measured, and no service: that needs a second GPU" in capsys.readouterr().out
    fewer = load_adapters(world / "small")
    assert fewer is not None
    missing = set(QUANTITIES) - set(fewer.tables)
    assert missing == {"link_latency", "link_bytes_per_s"} | {name for name in QUANTITIES if name.endswith("_beside")}
    assert cli.main(["profile", "--model", "sdxl", "--out", "small", "--adapters"]) == 2
    assert "was made for the model digits, not for sdxl" in capsys.readouterr().err
