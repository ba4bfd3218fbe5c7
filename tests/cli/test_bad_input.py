"""Bad input of every kind is one sentence and exit code 2: what a user (or an accident) may give."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from synerdiff.cli.main import main
from synerdiff.files import MARK
from synerdiff.profile.folder import SHIPPED

EXPERIMENT = "name: y\nprofiles: [digits-cpu]\nworkloads: [{WORKLOAD}]\npolicies: [{policy: dynamic}]\nfigures: []\n"


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command and returns its sentence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("arrival_s,steps\n0,4\n1,4\n")

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(part) for part in arguments]) == code
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0
        assert "does not expect" not in said
        assert len(said) < 700
        return said

    return run


def simulate(**changed: object) -> list[object]:
    flags: dict[str, object] = {"profile": "digits-cpu", "trace": "t.csv", "policy": "dynamic", "out": "out", **changed}
    return ["simulate", *(part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value))]


def test_pipes_and_devices_are_not_read(answer: Callable[..., str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.parquet")
    for trace in ("pipe", "pipe.parquet", "/dev/zero"):
        assert "this is a device or a pipe" in answer(*simulate(trace=trace))
    assert "this is a device or a pipe" in answer("sweep", "pipe")
    assert "this is a device or a pipe" in answer(*simulate(cluster="pipe"))
    for trace in ("pipe", "/dev/zero"):
        (tmp_path / "e.yaml").write_text(EXPERIMENT.replace("WORKLOAD", f"name: w, trace: {trace}"))
        assert "this is a device or a pipe" in answer("sweep", "e.yaml")


@pytest.mark.parametrize("table", ["profile.yaml", "steps.csv", "corun.csv", "adapters.csv"])
def test_a_profile_with_a_pipe_among_its_tables(answer: Callable[..., str], tmp_path: Path, table: str) -> None:
    shutil.copytree(SHIPPED / "digits-cpu", tmp_path / "p")
    (tmp_path / "p" / table).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "p" / table)
    (tmp_path / "c.yaml").write_text("workers: [{denoise_gpu: 0}]\n")
    assert answer(*simulate(profile="p", cluster="c.yaml"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: Path(path).write_bytes(b"\xff\xfe" * 4000)])
def test_a_mark_that_is_none_is_refused(
    answer: Callable[..., str], tmp_path: Path, make: Callable[[Path], object]
) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / MARK)
    assert "give another folder" in answer(*simulate())


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        ("name: w, generator: nope", "kind is 'nope'"),
        ("name: w, trace: nope.csv", "there is no such"),
        ("name: w, generator: gamma, parameters: {cv: -1}", "cv is -1"),
        ("name: w, generator: mmpp, parameters: {burst_s: 1.0e-300}", "burst_s is 1e-300"),
        ("name: w, generator: mmpp, parameters: {burst_s: 0.001}, requests: 100000", "too many bursts"),
    ],
)
def test_errors_after_validation_name_the_file(
    answer: Callable[..., str], tmp_path: Path, workload: str, words: str
) -> None:
    (tmp_path / "e.yaml").write_text(EXPERIMENT.replace("WORKLOAD", workload))
    said = answer("sweep", "e.yaml")
    assert said.startswith("e.yaml: ")
    assert words in said


@pytest.mark.parametrize("option", ["loras", "controlnets", "controlnet-images"])
def test_folders_of_adapters_exist_before_anything_is_loaded(answer: Callable[..., str], option: str) -> None:
    flags = simulate()[1:]
    assert answer("run", *flags, f"--{option}", "nowhere") == f"--{option} nowhere: there is no such folder."


def test_text_of_a_parquet_trace_is_utf8(answer: Callable[..., str], tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    offsets, letters = (pyarrow.py_buffer(data) for data in (b"\0\0\0\0\1\0\0\0\2\0\0\0", b"\xff\xfe"))
    names = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, letters])
    parquet.write_table(
        pyarrow.table({"arrival_s": [0.0, 1.0], "steps": [4, 4], "base_model": names}), tmp_path / "t.parquet"
    )
    assert "not a complete parquet file" in answer(*simulate(trace="t.parquet"))


@pytest.mark.parametrize("scale", ["1_0", "\u0663", "nan", "x", ""])
def test_a_lora_s_scale_is_a_number(answer: Callable[..., str], tmp_path: Path, scale: str) -> None:
    (tmp_path / "t.csv").write_text(f"arrival_s,steps,loras\n0,4,a@{scale}\n", encoding="utf-8")
    assert "after the @ a number is needed" in answer(*simulate())


@pytest.mark.parametrize("declared", ["3", "('a',)", "None, 1"])
def test_declared_parameters_of_a_policy_are_parameters(
    answer: Callable[..., str], tmp_path: Path, declared: str
) -> None:
    name = f"declares{abs(hash(declared))}"
    (tmp_path / f"{name}.py").write_text(
        f"class P:\n    PARAMETERS = {declared}\n    def reset(self, w, p): ...\n    def decide(self, v): ...\n"
    )
    assert "a tuple of Parameter is needed" in answer(*simulate(policy=f"{name}:P"))
