"""The fidelity table's files: what is written comes back, and every mistake in them is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synerdiff.core import CONDITIONAL, GUIDED, REUSE, InputError
from synerdiff.fidelity.table import Score, find_fidelity, read_fidelity, write_fidelity

HEAD = {"model": "digits", "solver": "DDIMScheduler", "resolution": 32}


def score(
    skipped: Any = (1, 3),
    ssim: float = 0.98,
    mode: Any = REUSE,
    steps: int = 6,
    scale: float = 4.0,
    run_steps: Any = None,
    half: float = 0.005,
    **more: Any,
) -> Score:
    fields = {
        "solver": "DDIMScheduler",
        "steps": steps,
        "guidance_scale": scale,
        "rule": f"{mode}-{skipped}-{run_steps or steps}",
        "run_steps": run_steps or steps,
        "mode": mode,
        "schedule": "spread",
        "warmup_steps": 0,
        "skipped_steps": skipped,
        "rows": 2.0 * (run_steps or steps) - len(skipped or ()),
        "n": 64,
        "ssim": ssim,
        "ssim_low": ssim - half,
        "ssim_high": min(1.0, ssim + half),
        "psnr_db": 40.0,
        "psnr_low_db": 39.0,
        "psnr_high_db": 41.0,
        "recognised": 1.0,
        "held_out": False,
    }
    return Score(**(fields | more))


def fewer_steps(run_steps: int, ssim: float, steps: int = 6, scale: float = 4.0) -> Score:
    return score((), ssim, GUIDED, steps, scale, run_steps, schedule="full")


def test_a_table_comes_back_as_written(tmp_path: Path) -> None:
    rows = [
        score(),
        score((2,), 0.99, CONDITIONAL, recognised=None, held_out=True),
        score(None, 0.9, CONDITIONAL, schedule="adaptive", rows=8.25),
        fewer_steps(4, 0.97),
        score((), 1.0, GUIDED, half=0.0),
    ]
    write_fidelity(tmp_path, HEAD, rows)
    table = read_fidelity(tmp_path)
    assert (table.model, table.solver, table.resolution) == ("digits", "DDIMScheduler", 32)
    assert sorted(table.rows, key=lambda row: row.rule) == sorted(rows, key=lambda row: row.rule)
    assert [row.rows for row in table.rows] == sorted((row.rows for row in rows), reverse=True)
    assert score().rows_share == pytest.approx(10 / 12)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",reuse,", ",often,", "line 2: mode is 'often'; allowed are guided, conditional, reuse"),
        (",reuse,", ",guided,", "line 2: mode is guided, which contradicts its skipped_steps"),
        ("1;3", "3;1", "line 2: skipped_steps must rise without repeats and lie below 6"),
        ("1;3", "1;6", "lie below 6"),
        ("1;3", "1;x", "skipped_steps is '1;x'; step indices separated by ; or varies are needed"),
        (",0.98,", ",1.2,", "line 2: ssim is 1.2; allowed are -1 to 1"),
        (",0.98,", ",nan,", "line 2: ssim is 'nan'; a number from -1 to 1 is needed"),
        (",0.98,", ",0.5,", "line 2: ssim is 0.5, outside its own interval 0.975 to 0.985"),
        (",64,", ",many,", "line 2: n is 'many'; a whole number of at least 2 is needed"),
        (",64,", ",1,", "line 2: n is 1; at least 2 is needed"),
        (",64,", ",64,7,", "line 2: the row has 20 cells and the header has 19"),
        ('3)-6",6,', '3)-6",7,', "line 2: run_steps is 7; allowed are 1 to 6"),
        ('"reuse-(1, 3)-6"', " ", "line 2: rule is ' '; a name is needed"),
        ("DDIMScheduler,6", ",6", "line 2: solver is ''; a name is needed"),
        (",10,64,", ",9,64,", "line 2: rows is 9, which contradicts its skipped_steps: 10"),
        ("psnr_low_db,", "", "the column psnr_low_db is missing; a fidelity table has solver, steps,"),
    ],
)
def test_mistakes_in_the_rows(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_fidelity(tmp_path, HEAD, [score()])
    path = tmp_path / "fidelity.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        read_fidelity(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema_version: 1", "schema_version: 7", "schema_version is 7; this version of synerdiff reads 1"),
        ("model: digits", "model: [digits]", "model is ['digits']; a name is needed"),
        ("resolution: 32", "resolution: 0", "resolution is 0; a number of pixels"),
        ("resolution: 32", "resolution: [32, true]", "resolution is [32, True]; a number of pixels"),
        ("resolution: 32", "resolution: big", "resolution is 'big'; a number of pixels or [height, width] is needed"),
    ],
)
def test_mistakes_in_the_head(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_fidelity(tmp_path, HEAD, [score()])
    path = tmp_path / "fidelity.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError) as caught:
        read_fidelity(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("second", [score(), score(ssim=0.5, skipped=(2,), rule=score().rule)])
def test_a_rule_that_stands_twice(tmp_path: Path, second: Score) -> None:
    write_fidelity(tmp_path, HEAD, [score(), second])
    with pytest.raises(InputError) as caught:
        read_fidelity(tmp_path)
    assert str(caught.value).endswith(
        "line 3: rule is 'reuse-(1, 3)-6', which stands above already for DDIMScheduler, 6 steps and guidance scale 4."
    )


def test_rows_that_contradict_each_other(tmp_path: Path) -> None:
    write_fidelity(tmp_path, HEAD, [score(), score(rule="the same")])
    assert len(read_fidelity(tmp_path).rows) == 2
    write_fidelity(tmp_path, HEAD, [score(), score(rule="the same", ssim=0.5)])
    with pytest.raises(
        InputError, match=r"line 3: ssim is 0\.5; 'reuse-\(1, 3\)-6' above skips the same steps and has 0\.98"
    ):
        read_fidelity(tmp_path)


def test_a_table_without_rows_or_files(tmp_path: Path) -> None:
    write_fidelity(tmp_path, HEAD, [])
    with pytest.raises(InputError, match="has no rows"):
        read_fidelity(tmp_path)
    (tmp_path / "fidelity.csv").unlink()
    with pytest.raises(InputError, match="there is no such fidelity table"):
        read_fidelity(tmp_path)


def test_where_a_table_is_looked_for(tmp_path: Path) -> None:
    given, profile = tmp_path / "given", tmp_path / "profile"
    profile.mkdir()
    with pytest.raises(InputError, match=r"holds no fidelity\.yaml, so it is not a fidelity table"):
        find_fidelity(given, profile, "sdxl")
    with pytest.raises(InputError, match="measure one with: synerdiff fidelity --model sdxl --out DIR"):
        find_fidelity(None, profile, "sdxl")
    with pytest.raises(InputError, match=r"none ships for model '\.\./models/digits'"):
        find_fidelity(None, profile, "../models/digits")
    assert find_fidelity(None, profile, "digits").name == "digits"
    write_fidelity(profile, HEAD, [score()])
    assert find_fidelity(None, profile, "digits") == profile
    write_fidelity(given, HEAD, [score()])
    assert find_fidelity(given, profile, "digits") == given
