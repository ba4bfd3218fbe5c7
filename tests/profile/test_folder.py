"""What a profile's folder may hold: the head is typed, and bad values are one sentence with file and field."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from synerdiff import cli
from synerdiff.core import InputError
from synerdiff.experiments.offer import fitted
from synerdiff.files import read_yaml, write_yaml
from synerdiff.profile.folder import find_profile, load_profile, shipped_profiles, write_profile
from synerdiff.profile.scaling import scaled_profile
from synerdiff.profile.tables import Head
from tests.builders import affine_profile, requests_at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    profile = affine_profile()
    profile.head = Head(
        device="a machine",
        model="digits",
        weights="trained",
        resolutions=((32, 64),),
        dtype="float32",
        cuts={"c4": (3, 6, 9)},
        notes={"sampling": "10 times", "overlap": {"whole": {1: 0.9}}},
    )
    write_profile(tmp_path / "p", profile)
    return tmp_path / "p"


def test_a_profile_reads_back_as_it_was_written(folder: Path) -> None:
    profile = load_profile(folder)
    assert profile.head.size == (32, 64)
    assert profile.head.notes == {"sampling": "10 times", "overlap": {"whole": {1: 0.9}}}
    again = folder.parent / "again"
    write_profile(again, profile)
    assert load_profile(again).head == profile.head
    assert load_profile(again).content_hash == profile.content_hash


def test_step_launch_is_the_one_overhead_with_rows_and_old_tables_lack_the_column(folder: Path) -> None:
    profile = load_profile(folder)
    assert profile.step_launch == {}
    table = folder / "overheads.csv"
    table.write_text("name,median_ns,p10_ns,p90_ns,n\nstep_dispatch,5,4,6,9\n")
    assert load_profile(folder).overhead_ns("step_dispatch") == 5
    head = "name,median_ns,p10_ns,p90_ns,n,rows\n"
    table.write_text(head + "step_dispatch,5,4,6,9,\nstep_launch,7,6,8,9,1\nstep_launch,9,8,10,9,2\n")
    launched = load_profile(folder)
    assert [launched.launch_ns(rows) for rows in (1, 2)] == [7, 9]
    again = folder.parent / "again"
    write_profile(again, launched)
    assert load_profile(again).step_launch == launched.step_launch
    for row, message in (
        ("step_launch,7,6,8,9,", "line 2: rows is ''; a whole number"),
        ("step_launch,7,6,8,9,1\nstep_launch,7,6,8,9,1", "1 is given twice for step_launch"),
        ("step_dispatch,5,4,6,9,2", "only step_launch has rows"),
    ):
        table.write_text(head + row + "\n")
        with pytest.raises(InputError, match=message):
            load_profile(folder)


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_say_what_they_are_of(name: str) -> None:
    head = load_profile(find_profile(name)).head
    assert head.model
    assert head.device
    assert head.size is not None
    assert head.dtype


def set_head(folder: Path, **fields: object) -> None:
    write_yaml(folder / "profile.yaml", {**read_yaml(folder / "profile.yaml", "profile"), **fields})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *(
            ("resolution", bad, f"resolution is {bad!r}; a side of 8 to 16384 pixels, or [height, width], is needed.")
            for bad in (
                0,
                -32,
                None,
                32.5,
                "32",
                True,
                [],
                [32],
                [32, 64, 3],
                [32, "64"],
                [32, 0],
                {"height": 32},
                10**6,
            )
        ),
        ("name", ["a"], "name is ['a']; a text of 1 to 200 characters without slashes is needed."),
        ("name", "../../x", "name is '../../x'; a text"),
        ("name", "", "name is ''; a text"),
        ("name", "x" * 201, "; a text of 1 to 200 characters"),
        ("model", ["digits"], "model is ['digits']; it must be a valid string."),
        ("device", 3, "device is 3; it must be a valid string."),
        ("weights", "borrowed", "weights is 'borrowed'; it must be 'checkpoint', 'trained' or 'random'."),
        ("cuts", {"c4": 3}, "cuts.c4 is 3; it must be a list."),
        ("cuts", {"c4": [0]}, "cuts.c4[0] is 0; it must be greater than or equal to 1."),
        ("provenance", "guessed", "provenance is 'guessed'; allowed are measured, imported, estimated."),
    ],
)
def test_a_bad_head_is_one_sentence(folder: Path, field: str, value: object, message: str) -> None:
    set_head(folder, **{field: value})
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_profile(folder)
    assert str(caught.value).startswith(f"{folder / 'profile.yaml'}: ")


@pytest.mark.parametrize(
    ("table", "old", "new", "message"),
    [
        ("steps.csv", "1,12000000,12000000,", "1,12000000,12000001,", "line 2: median_ns is 12000000, outside its own"),
        (
            "steps.csv",
            "1,12000000,12000000,",
            f"1,{10**30},{10**30},",
            f"line 2: median_ns is {10**30}; allowed are 1 to",
        ),
        (
            "corun.csv",
            "1000000,1000000",
            "1,1000000",
            "line 2: step_slowdown_ppm is 1; allowed are 50000 to",
        ),
        ("chunks.csv", "whole,0", "whole,1e3", "line 2: chunk is '1e3'; a whole number from 0 to 10000 is needed."),
        ("chunks.csv", "whole,0", ",0", "line 2: chunking is ''; a name is needed."),
    ],
)
def test_a_bad_table_is_one_sentence(folder: Path, table: str, old: str, new: str, message: str) -> None:
    text = (folder / table).read_text()
    assert old in text
    (folder / table).write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(message)):
        load_profile(folder)


def test_requests_take_a_rectangular_profile_s_size(folder: Path) -> None:
    profile = load_profile(folder)
    own, same = requests_at(0), requests_at(0, height=32, width=64)
    assert fitted(own, profile) == fitted(same, profile)
    assert (fitted(own, profile)[0].height, fitted(own, profile)[0].width) == (32, 64)
    with pytest.raises(InputError, match="asks for 64x32 pixels; profile 'test' was made for 32x64"):
        fitted(requests_at(0, height=64, width=32), profile)


def test_simulate_takes_a_rectangular_profile(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = folder.parent / "t.csv", folder.parent / "out"
    trace.write_text("arrival_s,steps,height,width\n0,4,32,64\n0.5,4,32,64\n1,4,,\n")
    command = ["simulate", "--profile", str(folder), "--trace", str(trace), "--policy", "dynamic", "--out", str(out)]
    assert cli.main(command) == 0, capsys.readouterr().err
    trace.write_text("arrival_s,steps,height,width\n0,4,64,64\n")
    assert cli.main(command) == 2
    assert "asks for 64x64 pixels" in capsys.readouterr().err


def test_a_changed_profile_forgets_what_it_looked_up() -> None:
    profile = affine_profile(10, 2)
    assert profile.step_ns(4) == 18_000_000
    slower = replace(profile, steps={rows: s._replace(median=2 * s.median) for rows, s in profile.steps.items()})
    assert (slower.step_ns(4), profile.step_ns(4)) == (36_000_000, 18_000_000)
    assert scaled_profile(profile, decode=2.0).decode_ns() == 2 * profile.decode_ns()
