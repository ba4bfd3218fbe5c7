"""The command line from end to end: what it writes, what it prints, and one sentence for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from synerdiff import __version__, cli
from synerdiff.cli.progress import progress, table_lines
from synerdiff.core import NS_PER_S
from synerdiff.files import MARK, install_hint
from synerdiff.profile.folder import SHIPPED, write_profile
from synerdiff.results.records import read_requests, read_work
from tests.builders import affine_profile

ROOT = Path(__file__).resolve().parents[2]
TRACE = "arrival_s,steps,images\n" + "".join(f"{i * 0.1:.1f},{2 + i % 3},{1 + i % 2}\n" for i in range(40))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small profile ``p`` and a trace ``t.csv``, and the working folder there."""
    write_profile(tmp_path / "p", affine_profile())
    (tmp_path / "t.csv").write_text(TRACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulate(*more: str, policy: str = "continuous-serial", profile: str = "p", trace: str = "t.csv") -> int:
    arguments = ["simulate", "--profile", profile, "--trace", trace, "--policy", policy, "--out", "out", *more]
    return cli.main(arguments)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed to standard error: exactly one line, and nothing to standard output."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.strip()


def test_simulate_writes_records_and_metrics(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate() == 0
    assert sorted(path.name for path in (world / "out").iterdir()) == [
        MARK,
        "requests.parquet",
        "summary.json",
        "work.parquet",
    ]
    requests, work = read_requests(world / "out"), read_work(world / "out")
    assert len(requests) == 40
    assert set(requests["status"]) == {"done"}
    assert (work["kind"] == "chunk").sum() == requests["images"].sum()
    summary = json.loads((world / "out" / "summary.json").read_text())
    kept = requests.iloc[4:38]
    assert summary["request_latency_mean_s"] == pytest.approx(kept["request_latency_s"].mean())
    assert summary["run"]["policy"] == "continuous-serial"
    assert summary["run"]["time_scale"] == 1
    out = capsys.readouterr().out
    assert "continuous-serial on test, t.csv" in out
    assert f"mean {summary['request_latency_mean_s']:.4g}" in out
    assert "0 unfinished, rejected or failed" in out


def test_simulate_at_a_load(world: Path) -> None:
    assert simulate("--load", "0.5") == 0
    slow = json.loads((world / "out" / "summary.json").read_text())
    assert simulate("--time-scale", repr(slow["run"]["time_scale"])) == 0
    again = json.loads((world / "out" / "summary.json").read_text())
    assert slow["run"]["load"] == 0.5
    assert again["run"]["load"] == pytest.approx(0.5)
    assert again["request_latency_p99_s"] == slow["request_latency_p99_s"]
    # 40 requests 0.1 s apart, 60 images: offered over 4 s; the formula is stated in docs/file-formats.md.
    steps = sum((2 + i % 3) * (1 + i % 2) for i in range(40))
    mean = steps / 60
    sustained = 1e9 / (mean * 42_000_000 / 8 + 30_000_000) * mean
    assert slow["run"]["time_scale"] == pytest.approx(steps / 4.0 / sustained / 0.5)


def test_a_window_is_cut_before_it_is_stretched(world: Path) -> None:
    assert simulate("--window", "1:2", "--time-scale", "3") == 0
    requests = read_requests(world / "out")
    assert requests["arrival_s"].tolist() == pytest.approx([0.3 * i for i in range(10)])
    assert requests["steps"].tolist() == [2 + i % 3 for i in range(10, 20)]
    summary = json.loads((world / "out" / "summary.json").read_text())
    assert summary["run"]["window_s"] == [1, 2]


def test_records_of_a_run_are_a_trace_that_ends_at_the_same_instants(world: Path) -> None:
    assert simulate("--load", "0.9") == 0
    shutil.move(world / "out", world / "first")
    assert simulate(trace="first/requests.parquet") == 0
    first, again = read_requests(world / "first"), read_requests(world / "out")
    assert (first["finished_s"] == again["finished_s"]).all()
    assert (first["arrival_s"] == again["arrival_s"]).all()


def test_a_foreign_trace_is_read_by_name_or_by_map_and_it_is_said(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "log.jsonl").write_text('{"t": 7000, "prompt": "a"}\n{"t": 5000, "prompt": "b"}\n{"t": 6000}\n')
    assert simulate("--map", "arrival=t:ms,steps=2", "--sort", trace="log.jsonl") == 0
    assert "read as JSON lines: arrival from t (milliseconds), steps is 2" in capsys.readouterr().out
    assert read_requests(world / "out")["arrival_s"].tolist() == [0, 1, 2]
    assert simulate("--map", "arrival=t:ms", "--sort", trace="log.jsonl") == 2
    assert "(JSON lines): none of its columns says how many denoiser steps a request takes" in sentence(capsys)


def test_set_gives_parameters_in_their_types(world: Path) -> None:
    assert simulate("--set", "batch=2", "--set", "max_wait_s=0.25", policy="static") == 0
    summary = json.loads((world / "out" / "summary.json").read_text())
    assert summary["run"]["parameters"] == {"batch": 2, "max_wait_s": 0.25}
    assert read_work(world / "out")["sample_ids"].str.count(";").max() == 1


def test_dispersion_follows_its_seed(world: Path) -> None:
    shutil.rmtree(world / "p")
    source = SHIPPED / "h200-sd15-estimated"
    shutil.copytree(source, world / "p")
    steps = (world / "p" / "steps.csv").read_text().splitlines()
    spread = [steps[0]]
    for line in steps[1:]:
        rows, median, _, _, n, held_out = line.split(",")
        spread.append(",".join([rows, median, str(int(median) // 2), str(int(median) * 2), n, held_out]))
    (world / "p" / "steps.csv").write_text("\n".join(spread) + "\n")
    found = {}
    for name, flags in {"none": [], "a": ["--dispersion"], "b": ["--dispersion", "--seed", "1"]}.items():
        assert simulate(*flags) == 0
        found[name] = (world / "out" / "work.parquet").read_bytes()
        assert simulate(*flags) == 0
        assert (world / "out" / "work.parquet").read_bytes() == found[name]
    assert len(set(found.values())) == 3


def test_decode_lanes_on_another_gpu(world: Path) -> None:
    assert simulate("--decode-gpus", "1,1", policy="continuous-parallel") == 0
    work = read_work(world / "out")
    assert set(zip(work["gpu"], work["lane"], strict=True)) == {(0, "denoise"), (1, "decode0"), (1, "decode1")}


def test_the_timeline_belongs_to_its_run(world: Path) -> None:
    assert simulate("--timeline") == 0
    events = json.loads((world / "out" / "timeline.json").read_text())["traceEvents"]
    assert sum(event.get("cat") == "step" for event in events) == (read_work(world / "out")["kind"] == "step").sum()
    assert simulate() == 0
    assert not (world / "out" / "timeline.json").exists()


def test_the_resolution_may_be_stated(world: Path) -> None:
    (world / "s.csv").write_text("arrival_s,steps,height,width\n0,2,,\n0,2,512,512\n")
    assert simulate(profile="h200-sd15-estimated", trace="s.csv") == 0
    # Stated or not, both are the same resolution, so they share steps.
    assert read_work(world / "out")["sample_ids"].tolist()[0] == "0.0;1.0"
    assert read_requests(world / "out")["height"].tolist() == [512, 512]


def test_a_policy_of_the_users_own(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (world / "my_rule_cli.py").write_text(
        "from policies.continuous import ContinuousSerial\nclass Mine(ContinuousSerial):\n    NAME = 'mine'\n"
    )
    assert simulate("--set", "batch=3", "--time-scale", "0.1", policy="my_rule_cli:Mine") == 0
    assert read_work(world / "out")["sample_ids"].str.count(";").max() == 2


def test_a_broken_policy_is_a_failed_check(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (world / "my_broken_cli.py").write_text(
        "from synerdiff.core import Decision\n"
        "class Broken:\n"
        "    chunking = 'whole'\n"
        "    def reset(self, worker, profile): pass\n"
        "    def decide(self, view): return Decision(admit=(99,))\n"
    )
    assert simulate(policy="my_broken_cli:Broken") == 1
    assert "Broken" in sentence(capsys)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--load", "0.5", "--time-scale", "2"], "--load and --time-scale exclude each other; give one of them."),
        (["--load", "0"], "--load is 0; a number above 0 and up to 100 is needed."),
        (["--load", "nan"], "--load is nan; a number above 0 and up to 100 is needed."),
        (["--load", "much"], "--load is 'much'; a number is needed."),
        (["--time-scale", "-1"], "The time scale is -1; a finite number above 0 is needed."),
        (["--window", "5"], "--window 5: two numbers of seconds are needed, for example 600:4200."),
        (["--window", "5:3"], "--window 5:3: the start must be at least 0 and the end after it."),
        (["--window", "nan:3"], "--window nan:3: two numbers of seconds are needed"),
        (["--window", "100:200"], "t.csv: no request arrives in the window 100:200 s; "),
        (["--set", "batch"], "--set batch: key=value is needed, for example batch=4."),
        (
            ["--set", "size=4"],
            "policy 'continuous-serial' has no parameter 'size'; it has batch, turn, turn_max_wait_s.",
        ),
        (
            ["--set", "batch=two"],
            "policy 'continuous-serial': batch is 'two'; allowed is a whole number from 1 to 4096.",
        ),
        (["--set", "batch=2.5"], "policy 'continuous-serial': batch is '2.5'; allowed is a whole number from 1 to"),
        (["--set", "batch=-2"], "policy 'continuous-serial': batch is -2; allowed is a whole number from 1 to 4096."),
        (
            ["--set", "batch=17"],
            "policy 'continuous-serial': batch is 17, but the profile's steps have at most 32 rows",
        ),
        (["--set", "batch=2", "--set", "batch=3"], "--set batch is given twice."),
        (["--seed", "-1"], "--seed is -1; a whole number from 0 to 2^63 - 1 is needed."),
        (["--seed", "x"], "--seed is 'x'; a whole number is needed."),
        (["--seed", "1_0"], "--seed is '1_0'; a whole number is needed."),
        (["--load", "\u0663"], "--load is '\u0663'; a number is needed."),
        (["--load", "1e400"], "--load is 1e400; a finite number is needed."),
        (["--slo", "nan"], "The SLO is nan s; a number from 0.000001 to 1000000000 is needed."),
        (["--slo", "0"], "The SLO is 0 s; a number from 0.000001"),
        (["--set", "batch=1_0"], "policy 'continuous-serial': batch is '1_0'; allowed is a whole number"),
        (["--set", "batch= 4"], "policy 'continuous-serial': batch is ' 4'; allowed is a whole number"),
        (["--set", "batch=" + "9" * 5000], "policy 'continuous-serial': batch is '99999"),
        (["--skip-fraction", "1.5"], "--skip-fraction is 1.5; a number from 0 to 1 is needed."),
        (["--skip-fraction", "nan"], "--skip-fraction is nan; a number from 0 to 1 is needed."),
        (["--skip-warmup", "-1"], "--skip-warmup is -1; a whole number from 0 to 10000 is needed."),
        (["--skip-longest-run", "0"], "--skip-longest-run is 0; a whole number from 1 to 10000 is needed."),
        (["--skip-mode", "drop"], "--skip-mode is 'drop'; allowed are reuse and conditional."),
        (["--decode-gpus", "0,x"], "--decode-gpus 0,x: GPU numbers from 0 to 63 are needed, for example 0 or 0,1."),
        (["--decode-gpus", ""], "--decode-gpus : GPU numbers from 0 to 63 are needed"),
        (["--colour", "red"], "No such option: --colour"),
        (["stray"], "Got unexpected extra argument"),
    ],
)
def test_bad_flags(world: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str) -> None:
    assert simulate(*flags) == 2
    assert sentence(capsys).startswith(expected)
    assert not (world / "out" / "summary.json").exists()


def test_names_that_are_not_known(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(policy="fifo") == 2
    message = sentence(capsys)
    assert message.startswith("there is no policy 'fifo'; known are static, dynamic, continuous-serial, ")
    assert simulate(policy="nowhere:Rule") == 2
    assert "the module nowhere cannot be imported" in sentence(capsys)
    assert simulate(profile="h900") == 2
    assert "there is no such profile folder, and the shipped profiles are digits-cpu, h200-" in sentence(capsys)
    assert simulate(trace="none.csv") == 2
    assert sentence(capsys) == "none.csv: there is no such trace."
    assert cli.main(["simluate"]) == 2
    assert sentence(capsys) == f"there is no command 'simluate'; the commands are {', '.join(cli.COMMANDS)}."
    assert cli.main(["simulate", "--profile", "p"]) == 2
    assert sentence(capsys) == "Missing option '--trace'."


def test_a_resolution_that_the_profile_was_not_made_for(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "s.csv").write_text("arrival_s,steps,height,width\n0,2,,\n1,2,768,512\n")
    assert simulate(profile="h200-sd15-estimated", trace="s.csv") == 2
    assert sentence(capsys) == (
        "request 1 asks for 768x512 pixels; profile 'h200-sd15-estimated' was made for 512x512."
    )
    assert simulate(trace="s.csv") == 2
    assert sentence(capsys).endswith("profile 'test' was made for a resolution that it does not name.")


def test_a_profile_of_another_schema(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = world / "p" / "profile.yaml"
    head.write_text(head.read_text().replace("schema_version: 1", "schema_version: 7"))
    assert simulate() == 2
    assert sentence(capsys) == "p/profile.yaml: schema_version is 7; this version of synerdiff reads 1 and 2."


def test_a_profile_without_the_rows_that_a_policy_needs(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corun = (world / "p" / "corun.csv").read_text().splitlines()
    (world / "p" / "corun.csv").write_text(corun[0] + "\n")
    assert simulate(policy="continuous-serial") == 0
    capsys.readouterr()
    assert simulate(policy="continuous-parallel") == 2
    assert "has no co-run slowdowns, which are needed where decodes run beside steps" in sentence(capsys)


def test_requests_that_all_arrive_at_once_have_no_load(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "z.csv").write_text("arrival_s,steps\n0,2\n0,2\n")
    assert simulate("--load", "0.5", trace="z.csv") == 2
    assert "the load is undefined" in sentence(capsys)
    assert simulate(trace="z.csv") == 0
    assert json.loads((world / "out" / "summary.json").read_text())["run"]["load"] is None


def test_other_peoples_files_are_left_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "out").mkdir()
    (world / "out" / "thesis.tex").write_text("mine")
    assert simulate() == 2
    assert sentence(capsys) == "out: this folder holds thesis.tex, which 'simulate' did not write; give another folder."
    assert [path.name for path in (world / "out").iterdir()] == ["thesis.tex"]
    shutil.rmtree(world / "out")
    (world / "out").write_text("a file")
    assert simulate() == 2
    assert sentence(capsys) == "out: the output must be a folder; this is a file."
    assert (world / "out").read_text() == "a file"


def test_a_folder_that_cannot_be_written(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "file").write_text("")
    arguments = ["simulate", "--profile", "p", "--trace", "t.csv", "--policy", "static", "--out", "file/out"]
    assert cli.main(arguments) == 2
    assert sentence(capsys).startswith("file/out: the output folder cannot be written (")


LIMITED = """
import resource, sys
from synerdiff import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_full_disk_keeps_the_run_before(world: Path) -> None:
    assert simulate() == 0
    before = {path.name: path.read_bytes() for path in (world / "out").iterdir()}
    arguments = ["simulate", "--profile", "p", "--trace", "t.csv", "--policy", "static", "--out", "out"]
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "cannot be written" in found.stderr
    assert {path.name: path.read_bytes() for path in (world / "out").iterdir()} == before


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"synerdiff {__version__}\n"
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        for command in cli.COMMANDS:
            assert f"\n  {command} " in out
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert f"Usage: synerdiff {command}" in capsys.readouterr().out


def test_policies_lists_parameters_with_defaults_and_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    from policies.registry import POLICIES

    assert cli.main(["policies"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["policies", "--json"]) == 0
    described = {policy["name"]: policy for policy in json.loads(capsys.readouterr().out)}
    assert list(described) == list(POLICIES)
    for name, policy in POLICIES.items():
        assert f"{name}: " in text
        assert described[name]["summary"]
        assert [p["name"] for p in described[name]["parameters"]] == [p.name for p in policy.PARAMETERS]
    wait = next(p for p in described["static"]["parameters"] if p["name"] == "max_wait_s")
    assert (wait["type"], wait["default"], wait["low"], wait["high"], wait["unit"]) == ("float", 1.0, 0, 3600, "s")
    assert "max_wait_s = 1.0 s: " in text
    assert "a number from 0 to 3600" in text


def test_a_foreign_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "__init__.py").write_text("'''Somebody else's traces.'''\n")
    found = _command(["policies"], {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith(f"the package 'traces' at {tmp_path}/traces/__init__.py is not synerdiff's; ")
    assert found.stderr.count("\n") == 1


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def policies() -> None:
        raise ModuleNotFoundError("No module named 'torch.cuda'", name="torch.cuda")

    monkeypatch.setattr("synerdiff.cli.policies.policies", policies)
    assert cli.main(["policies"]) == 2
    assert sentence(capsys) == f"this needs the library torch; install it with: {install_hint('hardware')}"


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (ModuleNotFoundError("No module named 'synerdiff.nothing'", name="synerdiff.nothing"), "does not expect", 1),
        (ZeroDivisionError("division\nby zero"), "(ZeroDivisionError: division by zero)", 1),
        (RecursionError(), "(RecursionError); synerdiff --debug COMMAND shows where.", 1),
        (SystemExit(0), "does not expect (SystemExit: 0)", 1),
        (OSError(36, "File name too long", "x" * 300), "xxx...: File name too long.", 2),
        (OSError(28, "No space left on device"), "the output cannot be written (No space left on device).", 2),
    ],
)
def test_whatever_goes_wrong_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, said: str, code: int
) -> None:
    def policies() -> None:
        raise error

    monkeypatch.setattr("synerdiff.cli.policies.policies", policies)
    monkeypatch.setattr(sys.modules["synerdiff.cli.main"], "_drop_output", lambda: None)
    assert cli.main(["policies"]) == code
    assert said in sentence(capsys)
    assert cli.main(["--debug", "policies"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "code"), [("/dev/full", 2), ("&-", 0)])
def test_an_output_that_cannot_be_written(target: str, code: int) -> None:
    command = f"{sys.executable} -m synerdiff.cli policies >{target}"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert found.returncode == code
    assert found.stderr == ("the output cannot be written (No space left on device).\n" if code else "")


def test_help_tells_every_command_in_full_and_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.endswith(":") and not line.startswith((" ", "Options"))] == [
        "Simulate:",
        "Inputs:",
        "Hardware:",
        "Studies:",
    ]
    assert "..." not in text.replace("[ARGS]...", "")
    assert text.count("$ synerdiff") == 4
    assert "Replay a trace through a policy on a profile, and write requests, work and metrics." in " ".join(
        text.split()
    )


def test_a_table_never_wraps_inside_a_cell() -> None:
    headers, rows = ("policy", "mean, s", "ratio"), [("static", "1.25", "1.00 (0.98-1.02)"), ("synerdiff", "10", "-")]
    assert table_lines(headers, rows) == [
        "policy     mean, s  ratio",
        "static        1.25  1.00 (0.98-1.02)",
        "synerdiff       10  -",
    ]
    assert table_lines(headers, rows, 20) == [
        "policy     mean, s",
        "static        1.25",
        "synerdiff       10",
        "",
        "policy     ratio",
        "static     1.00 (0.98-1.02)",
        "synerdiff  -",
    ]


def test_without_a_terminal_no_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working", 10) as update:
        update(3, 10, "half way")
    assert capsys.readouterr() == ("", "")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def policies() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("synerdiff.cli.policies.policies", policies)
    assert cli.main(["policies"]) == 130


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m synerdiff.cli policies --json | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stderr == ""
    assert found.stdout.strip() in ("0", "1")


def _command(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from synerdiff.cli import main; sys.exit(main(sys.argv[1:]))",
            *arguments,
        ],
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_times_of_the_trace_come_back_in_seconds(world: Path) -> None:
    (world / "n.csv").write_text("arrival_s,steps,slo_s,seed\n0.123456789,2,1.5,7\n")
    assert simulate(trace="n.csv") == 0
    row = read_requests(world / "out").to_dict("records")[0]
    assert row["arrival_s"] == 123456789 / NS_PER_S
    assert (row["slo_s"], row["seed"]) == (1.5, 7)
    # Two steps of 2 rows (14 ms each), one decode of 30 ms.
    assert row["request_latency_s"] == 0.058


def test_a_cluster_is_simulated_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["scorecard", "--only", "katz", "--out", str(tmp_path / "card")]) == 0
    capsys.readouterr()
    trace = tmp_path / "t.csv"
    trace.write_text(
        "arrival_s,steps,loras,controlnets\n0,4,,canny\n0.5,4,style@0.8,canny;depth\n1,4,style@0.8,rare\n9,4,,\n"
    )
    arguments = ["simulate", "--profile", str(tmp_path / "card" / "h800-sdxl-katz-estimated"), "--trace", str(trace)]
    arguments += ["--cluster", str(ROOT / "experiments" / "cluster.yaml"), "--policy", "continuous-serial"]
    arguments += ["--set", "batch=1", "--out", str(tmp_path / "out"), "--timeline"]
    assert cli.main([*arguments, "--router", "adapter-affinity"]) == 0
    assert "2 LoRAs asked for" in capsys.readouterr().out
    run = json.loads((tmp_path / "out" / "summary.json").read_text())["run"]
    assert (run["gpus"], run["lora_requested"], sum(run["requests_by_worker"])) == (8, 2, 4)
    # "rare" is held nowhere: the service with slots loads it.
    assert run["controlnet_loads"] == 1
    assert {"denoise", "guidance", "controlnet", "loader0", "decode0"} <= set(read_work(tmp_path / "out")["lane"])
    requests = read_requests(tmp_path / "out")
    assert set(requests["status"]) == {"done"}
    assert requests["worker"].value_counts().to_dict() == {
        index: count for index, count in enumerate(run["requests_by_worker"]) if count
    }
    assert cli.main([*arguments, "--router", "nearest"]) == 2
    assert "there is no router 'nearest'" in sentence(capsys)
    assert cli.main([*arguments, "--decode-gpus", "0,0"]) == 2
    assert "--decode-gpus excludes --cluster" in sentence(capsys)
    # A profile without adapters.csv serves only what asks for none.
    arguments[2] = "h200-sdxl-estimated"
    assert cli.main(arguments) == 2
    assert "has no adapters.csv" in sentence(capsys)


def test_a_run_that_serves_nothing_is_a_failed_check(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (world / "my_refusal_cli.py").write_text(
        "from synerdiff.core import Decision\n"
        "class Refusal:\n"
        "    chunking = 'whole'\n"
        "    def reset(self, worker, profile): pass\n"
        "    def decide(self, view): return Decision(reject=tuple(s.id for s in view.waiting))\n"
    )
    assert simulate(policy="my_refusal_cli:Refusal") == 1
    assert capsys.readouterr().err == "No request was served: 40 rejected.\n"
    assert set(read_requests(world / "out")["status"]) == {"rejected"}


def test_rate_and_limit_are_options(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--rate", "2", "--slo", "0.5") == 0
    printed = capsys.readouterr().out
    assert "time scale  5: the trace 5 times as slow" in printed
    assert "SLO         0.5 s: as was asked for" in printed
    run = json.loads((world / "out" / "summary.json").read_text())["run"]
    assert run["rate_per_s"] == pytest.approx(2)
    assert read_requests(world / "out")["slo_s"].tolist() == [0.5] * 40


def test_a_router_needs_a_cluster(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--router", "least-work") == 2
    assert sentence(capsys) == "--router chooses among the workers of --cluster; give both or neither."
