"""Profiles from published throughput and from tables of times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.registry import build_policy
from profiler.engine_logs import filled
from profiler.estimate import estimate_profile
from profiler.imported import Throughput, table_profile, throughput_profile
from simulator import simulate
from synerdiff.cli.main import main
from synerdiff.core import InputError, Request
from synerdiff.profile.folder import load_profile

MLPERF = Throughput(images_per_s=16.3484, gpus=8, batch=8, steps=20)


def test_a_full_batch_takes_what_the_throughput_says_and_fewer_rows_the_estimators_share() -> None:
    profile = throughput_profile(MLPERF, "h100x8", "MLPerf")
    batch_ns = 8 * 8 / 16.3484 * 1e9
    assert 20 * profile.step_ns(16) + 8 * profile.decode_ns() == pytest.approx(batch_ns, abs=20)
    estimated = estimate_profile("h100", "sdxl")
    for rows in (1, 2, 8):
        share = estimated.steps[rows].median / estimated.steps[16].median
        assert profile.step_ns(rows) / profile.step_ns(16) == pytest.approx(share, rel=1e-6)
    assert profile.max_rows == 16
    assert profile.step_ns(10) == pytest.approx((profile.step_ns(8) + profile.step_ns(12)) / 2, abs=1)
    assert (profile.provenance, profile.head.source, profile.corun) == ("imported", "MLPerf", {})


def test_a_batch_between_and_beyond_the_estimators_rows() -> None:
    between = throughput_profile(Throughput(10, 1, 5, 20), "p", "")
    assert between.max_rows == 10
    assert 20 * between.step_ns(10) == pytest.approx(0.5e9, abs=50)
    beyond = throughput_profile(Throughput(10, 1, 32, 20), "p", "")
    assert 20 * beyond.step_ns(64) == pytest.approx(3.2e9, abs=50)
    assert beyond.step_ns(32) == pytest.approx(beyond.step_ns(64) / 2, abs=1)


def test_a_given_decode_leaves_the_steps_the_rest() -> None:
    profile = throughput_profile(Throughput(2, 2, 4, 10, guided=False, decode_ms=100), "p", "")
    # 4 s for four images on one GPU, 0.4 s of it decodes.
    assert (profile.decode_ns(), profile.step_ns(4)) == (100_000_000, 360_000_000)
    with pytest.raises(
        InputError, match=r"takes 4 s in all, and its decodes alone 4 s, so 10 steps have no time; --decode-ms is too"
    ):
        throughput_profile(Throughput(2, 2, 4, 10, decode_ms=1000), "p", "")


@pytest.mark.parametrize("decode_ms", [0.0, 40.0])
def test_contention_is_estimated_where_that_is_asked_for(decode_ms: float) -> None:
    """A full batch still takes what the throughput says; slowdowns are the estimate's, and every cell says whence."""
    of = replace(MLPERF, decode_ms=decode_ms, estimate="h100")
    profile = filled(throughput_profile(of, "h100x8", "MLPerf"), "h100", "high")
    estimated = estimate_profile("h100", "sdxl", "high")
    expected_ns = decode_ms * 1e6 or estimated.decode_ns()
    assert profile.decode_ns() == expected_ns
    assert 20 * profile.step_ns(16) + 8 * expected_ns == pytest.approx(8 * 8 / 16.3484 * 1e9, abs=20)
    assert profile.slowdown_ppm(16, "whole", 0) == estimated.slowdown_ppm(16, "whole", 0)
    assert profile.decode_ns("c4") == pytest.approx(expected_ns, abs=4)
    cells = profile.head.notes["cells"]
    assert cells["slowdowns"] == "estimated for h100 and sdxl, contention high"
    assert cells["decode"].startswith("given" if decode_ms else "estimated for h100 and sdxl; the steps take the rest")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images_per_s": 0.0}, "images-per-s is 0; allowed is a number from 1e-06"),
        ({"images_per_s": float("nan")}, "images-per-s is nan"),
        ({"batch": 0}, "batch is 0"),
        ({"decode_ms": -1.0}, "decode-ms is -1"),
        ({"gpu": "h900"}, "h900"),
    ],
)
def test_what_is_no_throughput(fields: dict[str, Any], message: str) -> None:
    known = {"images_per_s": 16.0, "gpus": 8, "batch": 8, "steps": 20}
    with pytest.raises(InputError, match=message):
        throughput_profile(Throughput(**{**known, **fields}), "p", "")


def test_policies_that_decode_beside_steps_are_refused_in_a_sentence() -> None:
    profile = throughput_profile(MLPERF, "h100x8", "MLPerf")
    requests = [Request(n, n, 2) for n in range(12)]
    assert simulate(requests, build_policy("continuous-serial"), profile).requests[-1].status == "done"
    for policy in ("continuous-parallel", "synerdiff", "load-skip"):
        with pytest.raises(
            InputError, match="profile 'h100x8' has no co-run slowdowns, which are needed where decodes"
        ):
            simulate(requests, build_policy(policy), profile)


TABLE = """kind,batch,resolution,milliseconds,comment
step,1,512x512,10,
step,4,512x512,32.5,
step,1,1024x1024,40,another
decode,1,512x512,25,
decode,4,512x512,80,
encode,2,512x512,6,
"""


def test_a_table_of_times_is_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text(TABLE)
    profile = table_profile(path, "own", "our bench", "sdxl", "512x512", guided=True)
    assert {rows: spread.median for rows, spread in profile.steps.items()} == {2: 10_000_000, 8: 32_500_000}
    assert (profile.decode_ns(), profile.overhead_ns("text_encode")) == (25_000_000, 3_000_000)
    assert (profile.head.size, profile.head.model, profile.head.source) == ((512, 512), "sdxl", "our bench")
    unguided = table_profile(path, "own", "", "", "1024x1024", guided=False)
    assert (list(unguided.steps), unguided.head.notes["decode"]) == ([1], "not in the table: taken to cost nothing")


def test_a_table_holds_steps_that_several_gpus_take_together(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("kind,milliseconds,rows,degree\nstep,150,1,\nstep,90,1,2\nstep,60,1,4\ndecode,30,,\n")
    profile = table_profile(path, "own", "", "", None, guided=False)
    times = [profile.on_gpus(degree).step_ns(1) for degree in (1, 2, 4)]
    assert (times, profile.decode_ns()) == ([150_000_000, 90_000_000, 60_000_000], 30_000_000)
    path.write_text("kind,milliseconds,rows,degree\nstep,90,1,2\n")
    with pytest.raises(InputError, match="it has no step on one GPU"):
        table_profile(path, "own", "", "", None, guided=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", "it has times at 512x512, 1024x1024; choose one with --resolution"),
        ("step,4", "step,1", "line 3: a step of 2 rows is given twice"),
        ("decode,1", "vae,1", "line 5: kind is 'vae'; allowed are step, decode, encode"),
        ("step,1,512x512", "step,,512x512", "line 2: rows or batch is needed, and not both"),
        ("512x512,10", "512,10", "line 2: resolution is '512'; HEIGHTxWIDTH in pixels is needed"),
        ("32.5", "-1", "line 3: milliseconds is"),
        ("kind,", "what,", "the column kind is missing"),
    ],
)
def test_a_wrong_table_names_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "times.csv"
    path.write_text(TABLE.replace(old, new, 1) if old else TABLE)
    with pytest.raises(InputError, match=message):
        table_profile(path, "own", "", "", "512x512" if old else None, guided=True)


def test_the_commands_write_profiles_that_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = "--images-per-s 16.3484 --gpus 8 --batch 8 --steps 20 --guided --model sdxl --source MLPerf --out h100x8"
    assert main(["profile", "import", "throughput", *given.split()]) == 0
    assert "h100x8 (imported)" in capsys.readouterr().out
    written, made = load_profile(tmp_path / "h100x8"), throughput_profile(MLPERF, "h100x8", "MLPerf")
    assert (written.steps, written.chunks, written.head) == (made.steps, made.chunks, made.head)
    (tmp_path / "times.csv").write_text(TABLE)
    assert main(["profile", "import", "table", "times.csv", "--resolution", "512x512", "--out", "own"]) == 0
    assert load_profile(tmp_path / "own").step_ns(8) == 32_500_000
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert main(["profile", "import", "table", "times.csv", "--resolution", "512x512", "--out", "mine"]) == 2
    capsys.readouterr()
    assert main(["profile", "--out", "p"]) == 2
    assert "--model is missing" in capsys.readouterr().err
