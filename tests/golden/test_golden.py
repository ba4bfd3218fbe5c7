"""Results that a restructuring must not change: column by column, as ``values.json`` holds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.golden.pins import differences, known_values, pinned
from tests.golden.regenerate import main
from tests.golden.tables import PUBLISHED, TABLES


@pytest.mark.parametrize("name", TABLES)
def test_values_are_as_pinned(name: str) -> None:
    folder = Path(os.environ.get("SYNERDIFF_DATA", ""))
    if name == PUBLISHED and not (folder / "katz_h800_sdxl.csv").is_file():
        pytest.skip("SYNERDIFF_DATA names no folder with katz_h800_sdxl.csv")
    assert differences(name, pinned(TABLES[name]())) == []


def test_every_table_is_pinned_and_nothing_else() -> None:
    assert known_values().keys() == TABLES.keys()


def test_a_changed_value_is_named_with_both_numbers() -> None:
    name = "katz"
    identity, rows = TABLES[name]()
    changed = [dict(rows[0], predicted_s=rows[0]["predicted_s"] + 1e-6), *rows[1:]]
    (line,) = differences(name, pinned((identity, changed)))
    assert line.startswith("katz.predicted_s: was ")
    with pytest.raises(ValueError, match="system do not tell all rows apart"):
        pinned((["system"], rows))


def test_values_are_written_only_for_tables_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["everything"]) == 2
    assert "Name the tables whose values are meant to change: " in capsys.readouterr().err
