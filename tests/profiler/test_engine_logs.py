"""Profiles from engines' logs: each format from a small synthetic file of its shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from profiler.engine_logs import batches_of, engine_profile, filled, sglang_times, vllm_omni_times
from profiler.estimate import estimate_profile
from synerdiff.cli.main import main
from synerdiff.core import InputError
from synerdiff.profile.folder import load_profile

SIZE = (1024, 1024)


def dump(path: Path, steps_ms: list[Any], **stages_ms: Any) -> Path:
    content = {
        "denoise_steps_ms": [{"step": i, "duration_ms": ms} for i, ms in enumerate(steps_ms)],
        "steps": [{"name": name, "duration_ms": ms} for name, ms in stages_ms.items()],
        "commit": "abc",
    }
    path.write_text(json.dumps(content))
    return path


def dumps(tmp_path: Path) -> list[Path]:
    one = dump(tmp_path / "1.json", [900, 50, 52, 54], TextEncodingStage=8, DenoisingStage=1060, DecodingStage=30)
    four = dump(
        tmp_path / "4.json", [1000, 150, 170], TextEncodingStage=16, DenoisingStage=9000, DecodingStage=100, Other=1
    )
    return [one, four]


def test_sglang_dumps_give_steps_decode_and_encode(tmp_path: Path) -> None:
    times = sglang_times(dumps(tmp_path), batches_of("1,4", 2), guided=True)
    profile = engine_profile(times, "mine", "SGLang", "sdxl", SIZE)
    assert {rows: (spread.median, spread.n) for rows, spread in profile.steps.items()} == {
        2: (52_000_000, 3),
        8: (160_000_000, 2),
    }
    assert (profile.steps[8].p10, profile.steps[8].p90) == (152_000_000, 168_000_000)
    assert (profile.decode_ns(), profile.overhead_ns("text_encode")) == (27_500_000, 6_000_000)
    assert (profile.provenance, profile.corun, profile.head.size) == ("imported", {}, SIZE)
    said = "\n".join(times.facts)
    assert "4.json: its steps add up to 15% of DenoisingStage" in said
    assert "4.json: so its steps measure launches" in said
    assert "1.json: so its steps" not in said
    assert "4.json: stages not read: Other" in said
    assert "synchronised profiling measures how long steps take to launch" in said
    assert list(sglang_times(dumps(tmp_path), [1, 1], guided=False).steps) == [1]


LOG = """INFO start
12:00 [DiffusionBatchProfiler] batch_size=1 request_compute_units=4096 total_compute_units=4096 denoise_step_time=9.5
12:01 [DiffusionBatchProfiler] batch_size=1 request_compute_units=4096 total_compute_units=4096 denoise_step_time=5
12:01 [DiffusionBatchProfiler] batch_size=1 request_compute_units=4096 total_compute_units=4096 denoise_step_time=7
12:02 [DiffusionBatchProfiler] batch_size=2 request_compute_units=1024 total_compute_units=2048 denoise_step_time=1
12:03 [DiffusionBatchProfiler] batch_size=2 request_compute_units=4096 total_compute_units=5120 denoise_step_time=1
12:04 [DiffusionBatchProfiler] batch_size=2 request_compute_units=4096 total_compute_units=8192 denoise_step_time=8
[DiffusionBatchProfiler] batch_size=2, request_compute_units=4096, total_compute_units=8192, denoise_step_time=8ms
"""


def test_vllm_omni_lines_of_one_resolution_count(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(LOG)
    times = vllm_omni_times([log], SIZE, "ms", guided=False)
    assert dict(times.steps) == {1: [5e6, 7e6], 2: [8e6]}
    assert "of 1024 compute units a request: 1, of several resolutions in one batch: 1" in times.facts[0]
    profile = engine_profile(times, "mine", "vllm-omni", "", SIZE)
    assert (profile.step_ns(1), profile.decode_ns()) == (6_000_000, 1)
    with pytest.raises(InputError, match=r"line 2: denoise_step_time=9.5 has no unit; give --unit s or --unit ms"):
        vllm_omni_times([log], SIZE, None, guided=False)
    with pytest.raises(InputError, match=r"no step of 768x768 pixels \(2304 compute units\) is left"):
        vllm_omni_times([log], (768, 768), "ms", guided=False)
    log.write_text(LOG.replace("total_compute_units=2048 ", ""))
    with pytest.raises(InputError, match="line 5: total_compute_units= is missing"):
        vllm_omni_times([log], SIZE, "ms", guided=False)


@pytest.mark.parametrize(
    ("part", "instead", "message"),
    [
        ("time=8", "time=8m", "denoise_step_time is '8m'"),
        ("time=8", "time=8 min", "denoise_step_time is '8 min'"),
        ("time=8", "time=8 sec", "denoise_step_time is '8 sec'"),
        ("time=8", "time=1,234.5", "denoise_step_time is '1,234.5'"),
        ("time=8", "time=8%", "denoise_step_time is '8%'"),
        ("time=8", "time=1e-400", "denoise_step_time is"),
        ("size=2", "size=2.7", "batch_size is '2.7'; a whole number is needed"),
        ("size=2", "size=2 batch_size=4", "batch_size= is given twice"),
    ],
)
def test_no_part_of_a_line_is_left_unread(tmp_path: Path, part: str, instead: str, message: str) -> None:
    log = tmp_path / "server.log"
    log.write_text(LOG.splitlines()[-2].replace(part, instead))
    with pytest.raises(InputError, match=message):
        vllm_omni_times([log], SIZE, "ms", guided=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "this is not JSON"),
        ("[]", "a performance dump is a JSON object; this is a list"),
        ("{}", "denoise_steps_ms is missing or no list of objects"),
        ('{"denoise_steps_ms": [{"step": 0, "duration_ms": 1}]}', "it has 1 steps, of which 1 are warm-up"),
        ('{"denoise_steps_ms": [{"step": 0, "duration_ms": "x"}]}', "duration_ms 'x'; a number from 1e-06"),
        (f'{{"denoise_steps_ms": [{{"step": 0, "duration_ms": 1{"0" * 400}}}]}}', "a number from 1e-06"),
        ('{"denoise_steps_ms": [{"duration_ms": 1, "duration_ms": 9}]}', "an object names a field twice"),
        ('{"denoise_steps_ms": [{"step": 0, "duration_ms": NaN}]}', "duration_ms nan; a number from 1e-06"),
    ],
)
def test_a_wrong_dump_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "dump.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        sglang_times([path], [1], guided=True)


def test_what_is_missing_is_estimated_and_marked(tmp_path: Path) -> None:
    profile = engine_profile(sglang_times(dumps(tmp_path), [1, 4], True), "mine", "", "sdxl", SIZE)
    full, estimate = filled(profile, "h100", "mid"), estimate_profile("h100", "sdxl", "mid")
    assert (full.steps, full.decode_ns()) == (profile.steps, 27_500_000)
    assert full.decode_ns("c4") == pytest.approx(27_500_000 * estimate.decode_ns("c4") / estimate.decode_ns(), abs=4)
    assert full.corun == estimate.corun
    assert full.overhead_ns("text_encode") == 6_000_000
    assert full.label == "mine (slowdowns estimated)"
    assert full.head.notes["cells"]["slowdowns"] == "estimated for h100 and sdxl, contention mid"
    with pytest.raises(InputError, match="--estimate needs a model that is known"):
        filled(engine_profile(sglang_times(dumps(tmp_path), [1, 4], True), "m", "", "flux", SIZE), "h100", "mid")


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    dumps(tmp_path)
    (tmp_path / "server.log").write_text(LOG)
    (tmp_path / "t.csv").write_text("arrival_s,steps\n" + "0,4\n0,6\n0,8\n" * 4)
    size = ("--resolution", "1024x1024")
    imported = ("profile", "import", "sglang", "1.json", "4.json", "--batch", "1,4", *size)
    assert main([*imported, "--out", "bare"]) == 0
    assert "measures how long steps take to launch" in capsys.readouterr().out
    run = ("simulate", "--trace", "t.csv", "--out", "s")
    assert main([*run, "--profile", "bare", "--policy", "continuous-serial"]) == 0
    assert main([*run, "--profile", "bare", "--policy", "continuous-parallel"]) == 2
    assert main([*imported, "--model", "sdxl", "--estimate", "h100", "--out", "full"]) == 0
    capsys.readouterr()
    assert main([*run, "--profile", "full", "--policy", "continuous-parallel"]) == 0
    assert "full (slowdowns estimated)" in capsys.readouterr().out
    assert load_profile(tmp_path / "full").head.notes["cells"]["steps"] == "imported"
    lines = ("profile", "import", "vllm-omni", "server.log", *size, "--unguided", "--out", "lines")
    assert main([*lines, "--unit", "ms"]) == 0
    assert load_profile(tmp_path / "lines").step_ns(2) == 8_000_000
    (tmp_path / "times.csv").write_text("kind,rows,milliseconds,resolution\nstep,2,10,512x512\nstep,80,400,512x512\n")
    table = ("profile", "import", "table", "times.csv", "--model", "sdxl", "--estimate", "l40s", "--out", "table")
    assert main(table) == 0
    assert "decode: estimated for l40s and sdxl" in capsys.readouterr().out
    assert (
        load_profile(tmp_path / "table").corun["whole", 0][80] == load_profile(tmp_path / "table").corun["whole", 0][32]
    )
    assert main([*lines, "--unit", "h"]) == 2
    assert "--unit is 'h'; allowed are s, ms, us, ns" in capsys.readouterr().err
    for wrong, message in ((("--batch", "1,2,3"), "3 numbers for 2 files"), (("--batch", "x"), "from 1 to 4096")):
        assert main([*imported[:5], *wrong, *size, "--out", "no"]) == 2
        assert message in capsys.readouterr().err
