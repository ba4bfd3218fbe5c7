"""The quarter of an hour on a GPU: its deadline, what it keeps when it ends early, gates and floors by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import quarter_hour
from benchmarks.gpu.quarter_hour import Options, QuarterStep, StepLedger, allowance, pack_results, run_plan
from benchmarks.gpu.report import beside_floor, card_of, decode_work, gates, read_results, report_text, work_of
from policies.registry import POLICIES
from synerdiff.core import InputError

SCRIPT = Path(quarter_hour.__file__)


def step(name: str, code: str, seconds: float = 10.0, done: tuple[int, ...] = (0,)) -> QuarterStep:
    return QuarterStep(name, (seconds, seconds), lambda options, limit_s: [sys.executable, "-c", code], done)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    made = Options(tmp_path / "work", "digits", "cpu")
    made.work.mkdir()
    (tmp_path / "out").mkdir()
    return made


def run(options: Options, *plan: QuarterStep, seconds: float = 1000.0) -> bool:
    out = options.work.parent / "out"
    return run_plan(plan, options, out, time.monotonic() + seconds, partial(pack_results, plan, options, out))


def test_the_plan_fits_its_deadline_and_names_policies_that_there_are() -> None:
    assert sum(one.seconds[0] for one in quarter_hour.PLAN) + quarter_hour.PACK_S <= 560
    assert sum(one.seconds[1] for one in quarter_hour.PLAN) + quarter_hour.PACK_S <= 130
    assert {*quarter_hour.POLICIES, *quarter_hour.VALIDATED} <= set(POLICIES)
    assert quarter_hour.POLICIES[-2:] == ("dynamic", "static"), "what is cut first comes last"


def test_what_is_spare_goes_to_the_next_step_and_short_time_is_shared() -> None:
    assert allowance([10, 20, 30], 60) == 10
    assert allowance([10, 20, 30], 100) == 50
    assert allowance([20, 10, 30], 30) == 10
    assert allowance([10, 20, 30], 30) == quarter_hour.LEAST_S, "less is of no use"
    assert allowance([10, 20], 3) == 3
    assert allowance([30], 12) == 12


def test_a_finished_step_is_not_run_again_and_a_failed_one_is(options: Options) -> None:
    count, mark = options.work / "count", str(options.work / "mark")
    fails_once = f"import os, sys; s = os.path.exists({mark!r}); open({mark!r}, 'w'); sys.exit(not s)"
    plan = (step("once", f"open({str(count)!r}, 'a').write('x')"), step("twice", fails_once))
    assert not run(options, *plan)
    assert run(options, *plan)
    assert count.read_text() == "x"
    ledger = StepLedger(options.work.parent / "out")
    assert [(one["step"], one["done"]) for one in ledger.entries] == [("once", True), ("twice", False), ("twice", True)]


def test_a_step_that_lacks_what_it_needs_or_its_time_does_not_end_the_others(options: Options) -> None:
    def lacking(options: Options, limit_s: float) -> list[str]:
        raise InputError("there is no profile")

    slow = step("slow", "import time; print('begun', flush=True); time.sleep(100)", 7.0)
    plan = (QuarterStep("lacking", (10, 10), lacking), slow, step("last", "print(1)", 10.0))
    assert not run(options, *plan, seconds=7.0 + 10.0 + 10.0 + quarter_hour.PACK_S - 3.0)
    codes = {one["step"]: one["exit_code"] for one in StepLedger(options.work.parent / "out").entries}
    assert codes == {"lacking": 2, "slow": 130, "last": 0}
    assert "there is no profile" in (options.work / "log-lacking.txt").read_text()
    assert "begun" in (options.work / "log-slow.txt").read_text()


def test_without_time_nothing_is_begun_but_everything_is_packed(options: Options) -> None:
    line = '{"policy": "static", "kind": "load", "batch": 4, "requests": 3}\n'
    (options.work / "runs-small.jsonl").write_text(line + '{"po')
    assert not run(options, step("one", "print(1)"), seconds=1.0)
    out = options.work.parent / "out"
    assert {path.name for path in out.iterdir()} == {"report.md", "results.json", "results.tar.gz"}
    report = (out / "report.md").read_text()
    assert "| one | not begun | - |" in report
    assert "| static | load | 4 | 3 |" in report, "lines that were cut off are left out"
    with tarfile.open(out / "results.tar.gz") as archive:
        assert "runs-small.jsonl" in archive.getnames()
    elsewhere = Options(options.work.parent / "elsewhere", "digits", "cpu")
    quarter_hour.unpack(out / "results.tar.gz", elsewhere, options.work.parent / "new")
    assert len(read_results(elsewhere.work)["runs"]["small"]) == 1


def test_a_terminated_script_leaves_its_archive(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--model", "digits", "--seconds", "100"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("environment: at most")
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "interrupted; what was measured is in results.tar.gz" in rest
    assert tarfile.is_tarfile(out / "results.tar.gz")


def test_a_rehearsal_measures_something_of_everything_that_there_is_time_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--model", "digits", "--seconds", "45"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    files = [path.name for path in out.iterdir()]
    assert len(files) <= quarter_hour.MOST_FILES
    assert {"report.md", "results.json", "results.tar.gz", "steps.jsonl"} <= set(files)
    ran = json.loads((out / "results.json").read_text())["steps"]
    assert ran[0]["step"] == "environment"
    assert all(one["exit_code"] in (0, 1, 2, 5, 130) for one in ran), ran
    report = (out / "report.md").read_text()
    assert all(f"| {one.name} |" in report for one in quarter_hour.PLAN)
    assert "met |" not in report, "a rehearsal says nothing about a gate"


def measured(step_ms: float, tflops: float, decode_ms: float, gap_ms: float, rate: float) -> dict[str, Any]:
    steps = [{"rows": 2, "ms": step_ms}, {"rows": 8, "ms": 100.0, "tflop_per_s": tflops}]
    large = {"steps": steps, "decodes": [{"chunking": "whole", "ms": decode_ms}]}
    run = {"policy": "static", "kind": "saturation", "images_per_s": rate, "gap_s": 0.003, "step_s": 0.1}
    return {
        "environment": {"device": "NVIDIA H200", "device_option": "cuda", "model_instead": None},
        "profiles": {"large": {**large, "overheads_ms": {"step_dispatch": gap_ms}}},
        "runs": {"large": [run]},
        "validation": {"checks": [{"verdict": "passed"}, {"verdict": "unclear"}]},
    }


def test_gates_by_hand() -> None:
    met = [gate.verdict for gate in gates(measured(30.0, 400.0, 40.0, 0.6, 1.4))]
    assert met == ["met"] * 5 + ["MISSED", "met", "MISSED"], "the lane is idle for 3 of 100 ms in the run: 3%"
    missed = [gate.verdict for gate in gates(measured(40.1, 399.0, 40.1, 0.81, 1.39))]
    assert missed == ["MISSED"] * 8
    with_levers = measured(35.0, 400.0, 40.0, 0.6, 1.4)
    assert [gate.verdict for gate in gates(with_levers)][:2] == ["met", "MISSED"]
    times = [
        {"what": "2 rows", "levers": list(levers), "ms": ms}
        for levers, ms in (((), 25.0), (("qkv",), 34.0), (("qkv", "compile"), 29.0), (("float8",), 20.0))
    ]
    with_levers["forward"] = {"times": [*times, {"what": "decode", "levers": ["qkv"], "ms": 9.0}]}
    own = gates(with_levers)[1]
    assert (own.found, own.verdict) == (29.0, "met"), "neither what has no lever, nor 8-bit products, nor a decode"
    rehearsal = measured(1.0, 900.0, 1.0, 0.0, 9.0) | {"environment": {"device_option": "cpu"}}
    assert {gate.verdict for gate in gates(rehearsal)} == {"not measured"}
    assert {gate.verdict for gate in gates({"profiles": {}, "runs": {}})} == {"not measured"}
    assert "| guided step (2 rows) | - ms | <= 40 ms | not measured |  |" in report_text(
        {"profiles": {}, "runs": {}}, [], ["environment"]
    )


def test_floors_by_hand() -> None:
    assert card_of("NVIDIA H200") == "h200"
    assert card_of("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert card_of("Intel(R) Xeon(R) Processor") is None
    row = beside_floor(40e6, *work_of("sdxl", 2), "h200")
    # SDXL, 2 rows: 13.522 TFLOP; in 40 ms that is 338 TFLOP/s, and 17.1 ms at 790 TFLOP/s.
    assert row["tflop_per_s"] == pytest.approx(338.06, abs=0.01)
    assert row["floor_ms"] == pytest.approx(17.117, abs=0.001)
    assert row["of_floor"] == pytest.approx(0.4279, abs=1e-4)
    # SD1.5, 1 row of 0.803 TFLOP: the products take 1.016 ms, reading 1639 MiB at 4.8 TB/s only 0.358 ms.
    assert beside_floor(2e6, *work_of("sd15", 1), "h200")["floor_ms"] == pytest.approx(1.016, abs=0.001)
    assert "floor_ms" not in beside_floor(2e6, *work_of("sd15", 1), None)
    assert decode_work("sdxl")[0] == pytest.approx(10.47e12, rel=0.01)


def test_levers_are_measured_alone_then_together_and_8_bit_products_last() -> None:
    on_gpu = quarter_hour.variants(on_gpu=True)
    assert [name for name, _ in on_gpu] == [
        *("graphs", "channels-last + group-norm", "channels-last", "attention", "qkv", "cudnn-benchmark"),
        *("all but compile", "compile", "compiled", "compiled + float8", "eager"),
    ]
    assert {execution.kind for _, execution in on_gpu[:-1]} == {"graphs"}
    assert "float8" not in on_gpu[-3][1].levers
    assert all("compile" not in execution.levers for _, execution in quarter_hour.variants(on_gpu=False))


def test_what_the_forward_and_the_second_resolution_found_is_in_the_report() -> None:
    row = {"kind": "qkv", "what": "2 rows", "ms": 33.0, "it_per_s": 30.3, "levers": ["qkv"], "image_apart": 0.0123}
    pair = {"step_side": 768, "chunk_side": 512, "rows": 2, "chunking": "c4", "chunk": 1, "s_u": 1.2, "s_v": 1.5}
    pair |= {"predicted_s_u": 1.25, "predicted_s_v": 1.44}
    found = {"profiles": {}, "runs": {}, "forward": {"model": "sdxl", "times": [row]}, "across": [pair]}
    text = report_text(found, [], [])
    assert "| qkv | 2 rows | 33 | 30.3 | - | 0.0123 | - |" in text
    assert "| 768, 2 rows | 512, c4.1 | 1.2 | 1.25 | 1.5 | 1.44 |" in text
