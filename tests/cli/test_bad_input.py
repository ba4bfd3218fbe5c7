"""Bad input of every kind is one sentence and exit code 2: what a user (or an accident) may give."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from synerdiff.cli.main import main
from synerdiff.files import MARK, read_yaml, write_yaml
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


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("dtype: float7", "dtype is 'float7'"),
        ("cuts: {whole: [1]}", "cuts of whole are [1]; for 1 chunks 0 rising places are needed"),
        ("cuts: {c4: [8, 4, 10]}", "cuts of c4 are [8, 4, 10]"),
        ("cuts: {c4: [4, 4, 10]}", "cuts of c4 are [4, 4, 10]"),
        ("cuts: {c9: [1]}", "cuts names the chunking c9; chunks.csv has whole, c4, c8"),
    ],
)
def test_a_head_fits_its_tables(answer: Callable[..., str], tmp_path: Path, field: str, words: str) -> None:
    shutil.copytree(SHIPPED / "digits-cpu", tmp_path / "p")
    head = tmp_path / "p" / "profile.yaml"
    data = read_yaml(head, "profile")
    name, _, value = field.partition(": ")
    data.pop(name)
    write_yaml(head, data)
    head.write_text(head.read_text() + f"{name}: {value}\n")
    assert words in answer(*simulate(profile="p"))


def test_a_list_of_a_number_is_no_number(answer: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"arrival_s": 0, "steps": [4]}\n')
    said = answer(*simulate(trace="t.jsonl"))
    assert said.startswith("t.jsonl")
    assert "steps" in said


def test_numbers_that_would_become_nought_are_refused(answer: Callable[..., str]) -> None:
    assert "is 1e-400, which is too near 0 to be told from it" in answer(*simulate(skip_fraction="1e-400"))


def test_a_list_of_batch_sizes_names_each_once(answer: Callable[..., str], tmp_path: Path) -> None:
    workload = EXPERIMENT.replace("WORKLOAD", "name: w, generator: poisson")
    (tmp_path / "e.yaml").write_text(workload.replace("{policy: dynamic}", "{policy: dynamic, batch: [2, 4, 2]}"))
    assert "[2, 4, 2] names a size twice" in answer("sweep", "e.yaml")


def test_a_capacity_question_names_each_seed_once(answer: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "name: c\nprofiles: [digits-cpu]\nworkload: {name: w, generator: poisson, parameters: {rate_per_s: 2.0}}\n"
        "policies: [{policy: dynamic}]\nslo: p99=5s\ngpus: 1..3\nseeds: [1, 1, 2]\nrequests: 60\n"
    )
    assert "two seeds are both '1'" in answer("capacity", "c.yaml", "--out", "o")


def test_a_throughput_of_nearly_nothing_is_refused(answer: Callable[..., str]) -> None:
    flags = ("--gpus", 8, "--batch", 8, "--steps", 20, "--out", "o")
    said = answer("profile", "import", "throughput", "--images-per-s", "1e-300", *flags)
    assert said == "--images-per-s is 1e-300; allowed is a number from 1e-06 to 1000000."


CAPACITY = {"trace": "t.csv", "profile": "digits-cpu", "slo": "p99=5s", "gpus": "1..2", "policy": "static", "out": "o"}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("batch", "²", "'²' is not a batch size"),
        ("batch", "٣", "'٣' is not a batch size"),
        ("gpus", "1..٣", "gpus is '1..٣'"),
        ("slo", "p99=٣s", "is no SLO"),
        ("slo", "goodput=٩٩%", "is no SLO"),
        ("slo", "p99.9999999999=3s", "a percentile lies between 0 and 100"),
        ("slo", "p50=0.0000001ms", "a latency limit is 1e-06 to 1e+09 s, as p99=10s"),
        ("slo", "p50=99999999999s", "a latency limit is 1e-06 to 1e+09 s, as p99=10s"),
        ("slo", f"p50={'9' * 400}s", "a latency limit is 1e-06 to 1e+09 s, as p99=10s"),
        ("stages", "decode,decode", "stages names a layout twice"),
    ],
)
def test_what_a_capacity_question_may_not_say(answer: Callable[..., str], option: str, value: str, words: str) -> None:
    asked = {**CAPACITY, "link": "100", option: value}
    assert words in answer("capacity", *(part for name, text in asked.items() for part in (f"--{name}", text)))


@pytest.mark.parametrize("text", ["9" * 5000, "1x" + "9" * 5000, "٣", "064x064", "8x8x8", "x", ""])
def test_numbers_of_any_length_are_one_sentence(answer: Callable[..., str], tmp_path: Path, text: str) -> None:
    """Python reads no integer of more than 4,300 digits, and reads those of other scripts."""
    (tmp_path / "f.csv").write_text("kind,milliseconds,rows\nstep,5,2\n")
    assert "--resolution is" in answer("profile", "import", "table", "f.csv", "--resolution", text, "--out", "o")
    assert "--decode-gpus" in answer(*simulate(decode_gpus=text))
    assert "--rows" in answer("profile", "--model", "digits", "--rows", text, "--out", "o")
    if text != "٣":
        assert "resolution" in answer("profile", "--model", "digits", "--resolution", text, "--out", "o")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("step,5,2,1x1,", "line 2: resolution is '1x1'"),
        ("step,5,2,,\ndecode,1,,,2", "line 3: degree is '2' of a decode"),
        ("step,5,2,,\ndecode,1,,,\ndecode,9,,,", "line 3: the decode of 1 images is given twice"),
    ],
)
def test_a_table_of_times_is_not_read_in_two_ways(
    answer: Callable[..., str], tmp_path: Path, rows: str, words: str
) -> None:
    (tmp_path / "f.csv").write_text(f"kind,milliseconds,rows,resolution,degree\n{rows}\n")
    assert words in answer("profile", "import", "table", "f.csv", "--out", "o")


def test_what_is_imported_can_be_read_again(answer: Callable[..., str], tmp_path: Path) -> None:
    flags = ("throughput", "--gpus", 1_000_000, "--batch", 4096, "--steps", 1, "--out", "o")
    assert "a profile holds at most 1,000,000 s" in answer("profile", "import", *flags, "--images-per-s", "1e-6")
    (tmp_path / "f.csv").write_text("kind,milliseconds,rows\nstep,5,2\n")
    alone = answer("profile", "import", "table", "f.csv", "--contention", "low", "--out", "o")
    assert "--contention is that of --estimate, which is missing" in alone
