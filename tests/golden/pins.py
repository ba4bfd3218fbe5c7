"""What a table holds, in a form that survives restructuring: per column a hash of its values and their mean.

A row is identified by values (policy, profile, load, seed, batch), never by a run's key or a file's name, and rows are
sorted by them; numbers count with 9 significant digits. So other code that makes the same table gives the same pins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VALUES = Path(__file__).parent / "values.json"
COMMENT = (
    "Pinned results. A value changes only with a fault that the commit names, old and new number in its body. "
    "Regenerate single tables with: python -m tests.golden.regenerate TABLE ..."
)

Table = tuple[Sequence[str], Sequence[Mapping[str, Any]]]
"""(the columns that identify a row, the rows)"""


def text(value: Any) -> str:
    """A value as it is hashed: 8 and 8.0 are the same, so are None, NaN and a missing value."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return str(bool(value))
    if is_number(value):
        return format(float(value), ".9g")
    if isinstance(value, (list, tuple)):
        return ";".join(map(text, value))
    return str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or hasattr(value, "dtype")


def pinned(table: Table) -> dict[str, Any]:
    """``rows``: how many; ``columns``: name -> hash, and the mean where every value is a number or missing.

    Raises ValueError where two rows have the same identity: their order would not be defined.
    """
    identity, rows = table
    ordered = sorted(rows, key=lambda row: [text(row[name]).zfill(20) for name in identity])
    names = [tuple(text(row[name]) for name in identity) for row in ordered]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(identity)} do not tell all rows apart")
    columns = {}
    for name in dict.fromkeys(name for row in ordered for name in row):
        values = [row.get(name) for row in ordered]
        digest = hashlib.sha256("\n".join(map(text, values)).encode()).hexdigest()[:16]
        numbers = [float(value) for value in values if value is not None and value == value and is_number(value)]
        known = sum(text(value) != "" for value in values)
        mean = format(sum(numbers) / known, ".6g") if known and len(numbers) == known else ""
        columns[name] = f"{digest} mean {mean}" if mean else digest
    return {"rows": len(ordered), "identity": list(identity), "columns": columns}


def known_values() -> dict[str, Any]:
    """Table -> its pins, as they stand in ``values.json``."""
    values: dict[str, Any] = json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.is_file() else {}
    return {name: pins for name, pins in values.items() if name != "comment"}


def differences(table: str, now: Mapping[str, Any]) -> list[str]:
    """One line for each pinned column that has other values now; a column that was not pinned may come."""
    then = known_values()[table]
    lines = [
        f"{table}: {name} was {then[name]}, is {now[name]}" for name in ("rows", "identity") if then[name] != now[name]
    ]
    for name, pin in then["columns"].items():
        found = now["columns"].get(name, "missing")
        if found != pin:
            lines.append(f"{table}.{name}: was {pin}, is {found}")
    return lines


def write(tables: Mapping[str, Any]) -> None:
    """Put these tables' pins in place of the old ones; the others stay."""
    values = {"comment": COMMENT, **dict(sorted({**known_values(), **tables}.items()))}
    VALUES.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
