"""The readers of YAML and of tables, the guard of output folders, and the hint how to install an extra."""

from __future__ import annotations

import gzip
import math
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from synerdiff.core import InputError
from synerdiff.files import (
    MARK,
    claim_folder,
    install_hint,
    read_rows,
    read_text,
    read_yaml,
    write_rows,
    write_yaml,
)
from traces.dialects import load_trace

ROOT = Path(__file__).resolve().parent.parent


def yaml_of(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "f.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path, "file")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-3", -3),
        ("1e3", 1000.0),
        ("2.5", 2.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("1:20", "1:20"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2026-02-31", "2026-02-31"),
        ("'010'", "010"),
        ("<<", "<<"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("[1, [2, {a: b}]]", [1, [2, {"a": "b"}]]),
        ("{1: x, 2.5: y}", {1: "x", 2.5: "y"}),
    ],
)
def test_yaml_holds_the_plain_types_of_version_1_2(tmp_path: Path, text: str, value: object) -> None:
    found = yaml_of(tmp_path, f"a: {text}\n")["a"]
    assert found == value
    assert type(found) is type(value)


def test_yaml_merges_named_fields(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: *a, x: 5}\nd:\n  <<: [*b, *a]\n  w: 6\n"
    found = yaml_of(tmp_path, text)
    assert found["c"] == {"x": 5, "y": 2}
    assert found["d"] == {"x": 1, "y": 3, "z": 4, "w": 6}, "the first of a list wins, what stands there itself most"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{name}'] * 9)}]\n" for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x: 1\na: 010\n",
            "line 2: 010 begins with 0, which some readers take for octal; write 10, or '010' in quotes",
        ),
        ("a: " + "9" * 5000, "line 1: a whole number of 5000 digits; at most 20 are read"),
        ("a: !!int abc", "line 1: 'abc' is not a value of the type !!int"),
        ("a: !!float nought", "line 1: 'nought' is not a value of the type !!float"),
        ("a: !!bool maybe", "line 1: 'maybe' is not a value of the type !!bool"),
        ("a: !!timestamp 2026-02-31", "line 1: !!timestamp is not allowed; values are text, numbers, lists"),
        ("a: !!set {x, y}", "line 1: !!set is not allowed"),
        ("a: !mine 3", "line 1: !mine is not allowed"),
        ("a: !!binary aGk=", "line 1: !!binary is not allowed"),
        ("x: 1\n? {b: 1}\n: 2\n", "line 2: a key is text or a number; found {'b': 1}"),
        ("? [1, 2]\n: 2\n", "line 1: a key is text or a number; found [1, 2]"),
        ("null: 2\n", "line 1: a key is text or a number; found None"),
        ("a: {x: 1, x: 2}", "line 1: the key 'x' is given twice"),
        ("a: {<<: 3}", "line 1: << merges named fields, or a list of them; found '3'"),
        ("a: " + "[" * 200 + "]" * 200, "line 1: nested deeper than 50"),
        ("a: &a [*a]", "line 1: nested deeper than 50"),
        (BOMB, "more than 100,000 values, aliases written out"),
        ("a: *nothing", "line 1: this is not valid YAML (found undefined alias"),
        ("a: [1\n", "line 2: this is not valid YAML"),
        ("3: x\n", "field names are text; found 3"),
        ("- a\n", "a file holds named fields at its top level; found a list"),
    ],
)
def test_what_yaml_may_not_hold_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        yaml_of(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "f.yaml"))
    assert len(str(caught.value)) < 400


def test_yaml_comes_back_as_it_was_written(tmp_path: Path) -> None:
    shared = [1, 2]
    data = {
        "texts": ["010", "1:20", "no", "2026-01-01", "1e3", "<<", "true", "~", "", "0x1F", "a: b", "é\n"],
        "numbers": [0, -5, 10**18, 1e-05, 2.5, 1e300],
        "others": {"yes": True, "none": None, 3: "three"},
        "twice": [shared, shared],
    }
    write_yaml(tmp_path / "f.yaml", data)
    assert read_yaml(tmp_path / "f.yaml", "file") == data
    assert "&" not in (tmp_path / "f.yaml").read_text()


def table(folder: Path, text: str) -> Path:
    path = folder / "t.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_know_their_place_and_their_bounds(tmp_path: Path) -> None:
    (first, second) = read_rows(table(tmp_path, "n,x,other\n3,0.5,a\n\n -4 ,1e3,b\n"), ("n", "x"), "table", ("note",))
    assert (first.integer("n"), first.number("x"), first.text("note")) == (3, 0.5, "")
    assert (second.integer("n", -9, 0), second.number("x"), second.text("other")) == (-4, 1000.0, "b")
    assert second.place == f"{tmp_path / 't.csv'}, line 4"
    with pytest.raises(InputError, match=r"t\.csv, line 4: n is -4; at least 0 is needed\."):
        second.integer("n")
    with pytest.raises(InputError, match=r"t\.csv, line 4: x is 1e3; allowed are 0 to 1\."):
        second.number("x", 0, 1)


@pytest.mark.parametrize("text", ["1_0", "\u0661", "0x1", "1.0", "", "+", "nan", "1e3", "9" * 5000])
def test_a_whole_number_is_ascii_digits(tmp_path: Path, text: str) -> None:
    (row,) = read_rows(table(tmp_path, f"n,m\n{text},1\n"), ("n",), "table")
    with pytest.raises(InputError, match=r"n is .*; a whole number of at least 0 is needed") as caught:
        row.integer("n")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["1_0", "nan", "inf", "-infinity", "1e999", "1e99999", "0x1p3", "", "1,5"])
def test_a_number_is_decimal_and_finite(tmp_path: Path, text: str) -> None:
    (row,) = read_rows(table(tmp_path, f'n,m\n"{text}",1\n'), ("n",), "table")
    with pytest.raises(InputError, match=r"n is .*; a (finite )?number is needed"):
        row.number("n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: the column n is missing; a table has n, m."),
        ("n\n1\n", "t.csv: the column m is missing; a table has n, m."),
        ("n,m,n\n1,2,3\n", "t.csv: the column n is given twice."),
        ("n,m\n1\n", "t.csv, line 2: the row has 1 cells and the header has 2."),
        ("n,m\n1," + "x" * 140_000, "t.csv, line 2: this is not a CSV row (field larger than field limit (131072))."),
        ("n,m\n1,\0\n", "t.csv, line 2: this is not text, so it cannot be a table."),
        ('n,m\n1,"x\n', "this is not a CSV row"),
    ],
)
def test_a_bad_table_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_rows(table(tmp_path, text), ("n", "m"), "table")


def test_written_rows_come_back(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.csv", ("a", "b"), [(1, 'x, "y"'), (2, "")])
    assert [(row.integer("a"), row.text("b")) for row in read_rows(tmp_path / "t.csv", ("a", "b"), "table")] == [
        (1, 'x, "y"'),
        (2, ""),
    ]


def test_a_folder_is_claimed_by_one_command(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    claim_folder(out, "simulate")
    (out / "result.csv").write_text("ours")
    claim_folder(out, "simulate")
    with pytest.raises(InputError, match="holds what 'simulate' wrote, not 'run'; give another folder"):
        claim_folder(out, "run")
    assert (out / "result.csv").read_text() == "ours"
    assert (out / MARK).read_text() == "simulate\n"


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which 'simulate' did not write; give another folder"):
        claim_folder(tmp_path, "simulate")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="the output must be a folder; this is a file"):
        claim_folder(tmp_path / "notes.txt", "simulate")


def test_the_install_hint_names_the_checkout() -> None:
    assert install_hint("hardware") == f"pip install -c '{ROOT}/constraints.txt' -e '{ROOT}[hardware]'"
    naming = [
        path
        for folder in ("synerdiff", "policies", "simulator", "traces", "profiler", "real_runner")
        for path in (ROOT / folder).rglob("*.py")
        if "pip install 'synerdiff" in path.read_text() or "pip install synerdiff" in path.read_text()
    ]
    assert not naming, "synerdiff is on no package index"


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synerdiff.files.free_memory_bytes", lambda: 1_000_000)


@pytest.mark.usefixtures("little_memory")
def test_tables_and_texts_larger_than_the_memory_are_refused_before_they_are_whole(tmp_path: Path) -> None:
    table, text = tmp_path / "t.csv", tmp_path / "t.txt"
    table.write_text("a,b\n" + "1,2\n" * 2000)
    with pytest.raises(InputError, match=r"t\.csv: a table of more than 666 rows does not fit"):
        read_rows(table, ["a", "b"], "table")
    table.write_text("a,b\n" + "1,2\n" * 600)
    assert len(read_rows(table, ["a", "b"], "table")) == 600
    text.write_text("x" * 200_000)
    with pytest.raises(
        InputError, match=r"t\.txt: reading this log takes about 0\.0016 GB of memory; 0\.001 GB are free"
    ):
        read_text(text, "log")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz", "t.parquet", "foreign.csv"])
def test_traces_larger_than_the_memory_are_refused_before_they_are_whole(tmp_path: Path, name: str) -> None:
    path, rows = tmp_path / name, 20_000
    if name.endswith(".parquet"):
        columns = {"arrival_s": [float(i) for i in range(rows)], "steps": [4] * rows}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        csv = "".join(f"{i},4\n" for i in range(rows))
        header = "timestamp,num_inference_steps\n" if name.startswith("foreign") else "arrival_s,steps\n"
        json = "".join(f'{{"arrival_s": {i}, "steps": 4}}\n' for i in range(rows))
        data = (json if "json" in name else header + csv).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(InputError, match=r"GB( of memory that)? are free"):
        load_trace(path)


@pytest.mark.usefixtures("little_memory")
def test_a_yaml_file_of_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    with path.open("wb") as file:
        file.truncate(17_000_000)
    with pytest.raises(InputError, match=r"e\.yaml: a experiment has at most 16,000,000 bytes"):
        read_yaml(path, "experiment")
