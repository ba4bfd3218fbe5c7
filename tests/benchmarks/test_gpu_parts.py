"""The GPU measurement scripts: which commands a part runs, what a time means, and when a gate is met."""

from __future__ import annotations

import shutil
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import parts, report
from benchmarks.gpu.floors import beside_floor, decode_work, gpu_key, work_of
from benchmarks.gpu.headline import LATENCY, SATURATION, best_batch, conclude
from policies.registry import POLICIES, build_policy
from profiler.settings import make_settings
from synerdiff.core import Decision, InputError, Request, View, WorkerInfo
from synerdiff.experiments.run import RunSpec, prepare
from synerdiff.profile.folder import find_profile
from synerdiff.profile.tables import Profile
from tests.builders import affine_profile


@pytest.fixture
def options(tmp_path: Path) -> parts.Options:
    """A work folder in which part 1 is done for digits."""
    made = parts.Options(tmp_path / "work", "digits", "cpu", quick=True)
    shutil.copytree(find_profile("digits-cpu"), made.profile("digits"))
    return made


def words(step: parts.Step, option: str) -> list[str]:
    return [step.command[i + 1] for i, word in enumerate(step.command) if word == option]


def test_six_parts_fit_into_half_an_hour_and_ten_minutes_each() -> None:
    assert list(parts.PARTS) == [1, 2, 3, 4, 5, 6]
    assert sum(part.minutes for part in parts.PARTS.values()) <= 30
    assert all(part.minutes <= 10 for part in parts.PARTS.values())
    assert {*parts.HEADLINE, *parts.VALIDATED, *parts.SDXL_POLICIES} <= set(POLICIES)


def test_profiles_are_measured_in_bf16_at_the_models_own_resolution(tmp_path: Path) -> None:
    sd15, sdxl = parts.profile_steps(parts.Options(tmp_path))
    assert words(sd15, "--resolution") == ["512"]
    assert words(sdxl, "--resolution") == ["1024"]
    for step in (sd15, sdxl):
        assert words(step, "--dtype") == ["bfloat16"]
        assert words(step, "--device") == ["cuda"]
        settings = make_settings("sd15", "cuda", rows=words(step, "--rows")[0])
        assert {1, 2, 8, 16} <= set(settings.rows)
        assert "--quick" not in step.command


def test_commands_of_later_parts_name_the_profile_the_policies_and_the_loads(options: parts.Options) -> None:
    full = replace(options, quick=False)
    trace, validate = parts.validate_steps(full)
    assert words(validate, "--policy") == list(parts.VALIDATED)
    assert words(validate, "--load") == ["0.5", "0.8", "0.95"]
    assert words(validate, "--trace") == words(trace, "--out")
    assert words(validate, "--profile") == [str(options.profile("digits"))]
    assert validate.done_codes == (0, 1)
    sdxl = parts.sdxl_steps(full)
    assert int(words(sdxl[0], "--requests")[0]) * 0.85 >= 100
    assert words(sdxl[0], "--steps") == ["20"]
    headline = parts.sd15_steps(full)
    assert len(headline) == 4
    assert words(headline[-1], "--policy") == list(parts.HEADLINE)
    assert len(words(headline[-1], "--trace")) == 3
    enough = parts.sd15_steps(replace(full, requests=180))
    assert [words(step, "--requests") for step in enough[:3]] == [["180"]] * 3
    assert "--quick" in parts.PARTS[5].steps(options)[0].command
    assert "--quick" not in parts.PARTS[6].steps(full)[0].command


def test_a_part_without_the_profile_it_needs_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run part 1 first"):
        parts.validate_steps(parts.Options(tmp_path))


def test_requests_fill_the_time() -> None:
    # 10 images/s; two runs at load 0.5 and two at load 1 of n requests last 2 * (n / 5 + n / 10) s.
    assert parts.requests_within(60, 10, (0.5, 1.0), 2, 1000) == 100
    assert parts.requests_within(60, 10, (0.5, 1.0), 2, 70) == 70
    assert parts.requests_within(1, 0.1, (0.5,), 10, 70) == 12


def fake_part(options: parts.Options, *steps: parts.Step) -> parts.Part:
    return parts.Part("fake", 1, lambda _: list(steps), lambda _: {"value": 1})


def python(name: str, code: str) -> parts.Step:
    return parts.Step(name, (sys.executable, "-c", code))


def test_a_finished_command_is_not_run_again_and_a_failed_one_is(
    options: parts.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = options.folder(6)
    count = f"open({str(folder / 'count')!r}, 'a').write('x')"
    fails_once = (
        f"import pathlib, sys; p = pathlib.Path({str(folder / 'seen')!r}); s = p.exists(); p.touch(); sys.exit(not s)"
    )
    monkeypatch.setitem(parts.PARTS, 6, fake_part(options, python("a", count), python("b", fails_once)))
    ran, complete = parts.run_part(6, options, time.monotonic() + 100)
    assert not complete
    assert [(one["name"], one["done"]) for one in ran] == [("a", True), ("b", False)]
    ran, complete = parts.run_part(6, options, time.monotonic() + 100)
    assert complete
    assert (folder / "count").read_text() == "x"


def test_a_command_is_recognised_on_another_machine(options: parts.Options, tmp_path: Path) -> None:
    elsewhere = replace(options, work=tmp_path / "elsewhere")
    here, there = (parts.profile_steps(one)[0] for one in (options, elsewhere))
    assert here.command != there.command
    assert parts.portable(here, options) == parts.portable(there, elsewhere)
    assert parts.portable(here, options) != parts.portable(
        parts.profile_steps(replace(options, quick=False))[0], options
    )


def test_a_slow_command_is_interrupted_and_not_done(tmp_path: Path) -> None:
    begun = (
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(0)); "
        "print('begun', flush=True); time.sleep(60)"
    )
    log = tmp_path / "log.txt"
    assert parts.run_command(python("slow", begun), log, 1.5) == 130
    assert "begun" in log.read_text()


def test_packed_parts_come_back_and_are_found_elsewhere(options: parts.Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = parts.pack(1, options, out, {"part": 1})
    assert len(files) <= parts.MOST_FILES
    assert {path.name for path in files} >= {"part1.json", "part1.tar.gz"}
    with tarfile.open(out / "part1.tar.gz") as archive:
        assert "part1/digits/profile.yaml" in archive.getnames()
    parts.unpack_earlier(out, tmp_path / "elsewhere")
    found = parts.profile_results(replace(options, work=tmp_path / "elsewhere"))
    assert found["digits"]["steps"][0]["rows"] == 1
    assert found["digits"]["corun"]
    assert "floor_ms" not in found["digits"]["steps"][0]


def test_floors_by_hand() -> None:
    assert gpu_key("NVIDIA H200") == "h200"
    assert gpu_key("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert gpu_key("Intel(R) Xeon(R) Processor") is None
    # SDXL, 2 rows: 13.522 TFLOP; in 40 ms that is 338 TFLOP/s, and 17.1 ms at 790 TFLOP/s.
    row = beside_floor(40e6, *work_of("sdxl", 2), "h200")
    assert row["tflop_per_s"] == pytest.approx(338.06, abs=0.01)
    assert row["floor_ms"] == pytest.approx(17.117, abs=0.001)
    assert row["of_floor"] == pytest.approx(0.4279, abs=1e-4)
    # SD1.5, 1 row of 0.803 TFLOP: the products take 1.016 ms, reading 1639 MiB at 4.8 TB/s only 0.358 ms.
    assert beside_floor(2e6, *work_of("sd15", 1), "h200")["floor_ms"] == pytest.approx(1.016, abs=0.001)
    assert "floor_ms" not in beside_floor(2e6, *work_of("sd15", 1), None)
    assert decode_work("sdxl")[0] == pytest.approx(10.47e12, rel=0.01)


def measured(
    step_ms: float, tflops: float, decode_ms: float, gap_ms: float, rate: float, skipped: float = 0.0
) -> report.Parts:
    steps = [{"rows": 2, "ms": step_ms, "tflop_per_s": 300.0}]
    steps += [{"rows": 8, "ms": 100.0, "tflop_per_s": 500.0}, {"rows": 16, "ms": 200.0, "tflop_per_s": tflops}]
    sdxl = {
        "steps": steps,
        "decodes": [{"chunking": "whole", "ms": decode_ms}],
        "overheads_ms": {"step_dispatch": gap_ms},
    }
    run = {"policy": "static", "kind": "saturation", "step_median_s": 0.1, "summary": {"skip_fraction": skipped}}
    run["dispatch"] = {"step_dispatch": {"count": 5, "p50_s": 0.003}}
    policies = {"static": {"saturation_images_per_s": {"value": rate, "low": None, "high": None, "n": 1}}}
    return {1: {"results": {"sdxl": sdxl}}, 3: {"results": {"policies": policies, "runs": [run]}}}


def verdicts(found: report.Parts) -> list[str]:
    return [gate.verdict for gate in report.gates(found)]


def test_gates_by_hand() -> None:
    # In the run the lane is idle for 3 of 100 ms: 3%, missed. Part 4 was not measured.
    met = ["met", "met", "met", "met", "MISSED", "not measured", "met"]
    assert verdicts(measured(40.0, 400.0, 40.0, 0.8, 1.4)) == met
    missed = verdicts(measured(40.1, 399.0, 40.1, 0.81, 1.39))
    assert missed == ["MISSED"] * 5 + ["not measured", "MISSED"]
    assert set(verdicts({})) == {"not measured"}
    dry = {n: {**part, "provenance": {"quick": True}} for n, part in measured(1.0, 900.0, 1.0, 0.0, 9.0).items()}
    assert set(verdicts(dry)) == {"not measured"}
    # A rate reached by skipping guidance is no answer to a gate on full guidance.
    assert verdicts(measured(40.0, 400.0, 40.0, 0.8, 9.0, skipped=0.2))[-1] == "not measured"


def case(policy: str, trace: int, rate: float | None, latencies: list[float]) -> dict[str, object]:
    head = {"policy": policy, "trace": trace, "batch": 8, "load": 0.8, "images_per_s": rate, "latencies_s": latencies}
    summary = {"skip_fraction": 0.0, **{f"{s}_mean_s": 0.0 for s in ("queue", "denoise", "decode_wait", "decode")}}
    return {
        **head,
        "kind": "latency" if latencies else "saturation",
        "measured_requests": len(latencies),
        "summary": summary,
    }


def test_conclusions_pool_traces_and_pair_policies() -> None:
    cases = [case(p, n, rate * (1 + n / 10), []) for p, rate in (("auto", 3.0), ("static", 2.0)) for n in range(3)]
    cases += [case("auto", n, None, [1.0] * 152 + [2.0]) for n in range(3)]
    cases += [case("static", 0, None, [4.0] * 153)]
    found = conclude(cases)
    auto = found["policies"]["auto"]
    assert auto["saturation_images_per_s"]["value"] == pytest.approx(3.3)
    assert auto["measured_requests"] == 459
    assert auto["p99_claim_s"] == 2.0
    assert found["policies"]["static"]["p99_claim_s"] is None
    ratios = found["paired_ratios"]["auto / static"]
    assert ratios["saturation"]["ratio"] == pytest.approx(1.5)
    assert ratios["saturation"]["traces"] == 3
    assert ratios["mean_latency"]["ratio"] == pytest.approx((1 + 1 / 153) / 4)
    assert ratios["mean_latency"]["low"] is None


class RejectsBatch4:
    """Serves one sample at a time, and nothing at all with the batch of 4, which therefore loses."""

    chunking = "whole"

    def __init__(self, batch: int = 8) -> None:
        self.batch = batch

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.one = build_policy("continuous-serial", {"batch": 1})
        self.one.reset(worker, profile)

    def decide(self, view: View) -> Decision:
        if self.batch == 4:
            return Decision(reject=tuple(sample.id for sample in view.waiting))
        return self.one.decide(view)


@pytest.mark.parametrize("kind", [LATENCY, SATURATION])
def test_a_batch_at_which_nothing_is_served_is_not_the_best(kind: str) -> None:
    spec = RunSpec(
        profile=affine_profile(),
        source=tuple(Request(i, i * 10**9, 4) for i in range(5)),
        policy=f"{__name__}:RejectsBatch4",
    )
    assert best_batch(prepare(spec), kind) == 8
