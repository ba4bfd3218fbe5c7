"""Any file of requests as a table of texts: CSV with , ; or tabs, parquet, JSON, JSON lines, ``Request(...)`` lines.

What a file is, its content tells, not its name.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synerdiff.core import InputError
from synerdiff.files import Progress, csv_rows, decompressed, reading, require_memory, shown, within_memory
from traces.native import REQUEST_BYTES, parquet_rows

WHAT = "trace"
_HEAD_BYTES = 65_536
_MOST_BYTES = 2**31
_JSON_COPIES = 12
"""Text, its lines, the values in it and the texts made of them take so many times its size, about."""
_NESTED = 4
_DELIMITERS = {",": "CSV", "\t": "a table with tabs", ";": "a table with semicolons"}
_CALL = re.compile(r"\w*Request\((.*)\)\s*,?\s*$")
_LONGEST_CALL = 100_000


@dataclass(frozen=True, slots=True)
class TextTable:
    """Rows with the number that errors give them; an absent value is an empty text."""

    kind: str
    names: list[str]
    place: str
    """What is counted: line, row or entry."""
    rows: Iterator[tuple[int, list[str]]]
    broken: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be read at all, by reason; complete once the rows have been read."""


def open_table(path: Path, progress: Progress | None = None) -> TextTable:
    """The table of a file; InputError says what it is when it is none."""
    with reading(path, WHAT), path.open("rb") as raw:
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{path}: the trace is empty.")
        head = decompressed(raw).read(_HEAD_BYTES)
    if head.startswith(b"PAR1") or path.suffix == ".parquet":
        return _counted("parquet", "row", parquet_rows(path, WHAT, strict=False), path)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise InputError(f"{path}: this file is packed with zstd; unpack it first, or pack it with gzip.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: this file is text in UTF-16; save it as UTF-8.")
    start = head.decode("utf-8-sig", errors="replace").lstrip()
    if start.startswith(("{", "[")):
        return _json_table(path)
    first = start.partition("\n")[0]
    if _CALL.search(first):
        lines, what = _text(path).split("\n"), "a line Request(name=value, ...)"
        return _mapped("Request(...) lines", "line", *_objects(enumerate(map(_arguments, lines), 1), lines, what))
    delimiter = max(_DELIMITERS, key=re.sub(r'"[^"]*"', "", first).count)  # not those inside quotes
    return _counted(_DELIMITERS[delimiter], "line", csv_rows(path, WHAT, progress, delimiter), path)


def _counted(kind: str, place: str, rows: Iterator[tuple[int, list[str]]], path: Path) -> TextTable:
    rows = within_memory(rows, path, WHAT, REQUEST_BYTES)
    names = next(rows, (0, list[str]()))[1]
    if not names:
        raise InputError(f"{path}: the trace is empty.")
    return TextTable(kind, names, place, rows)


def _mapped(kind: str, place: str, entries: Iterable[tuple[int, Mapping[str, str]]], broken: Counter[str]) -> TextTable:
    """Of mappings that need not have the same names."""
    listed = list(entries)
    names = list(dict.fromkeys(name for _, entry in listed for name in entry))
    rows = ((number, [entry.get(name, "") for name in names]) for number, entry in listed)
    return TextTable(kind, names, place, rows, broken)


def _text(path: Path) -> str:
    with reading(path, WHAT), path.open("rb") as raw:
        require_memory(path, WHAT, _JSON_COPIES * path.stat().st_size)
        text = decompressed(raw).read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise InputError(f"{path}: JSON of more than 2 GiB is not read; split the file, or write it as parquet.")
        require_memory(path, WHAT, _JSON_COPIES * len(text))
        return text.decode("utf-8-sig")


def _json_table(path: Path) -> TextTable:
    text = _text(path)
    lines = text.split("\n")
    filled = [line for line in lines if line.strip()]
    first = _parsed(filled[0])
    if isinstance(first, dict) and (len(filled) > 1 or not _list_within(first)):
        return _mapped("JSON lines", "line", *_objects(enumerate(map(_parsed, lines), 1), lines))
    document = _parsed(text)
    entries = document if isinstance(document, list) else _list_within(document)
    if not any(isinstance(entry, dict) for entry in entries or ()):
        why = "holds no list of requests" if document is not None else "is cut short or damaged"
        raise InputError(f"{path}: the JSON {why}; a list of objects is needed, or one object a line.")
    return _mapped("JSON", "entry", *_objects(enumerate(entries or (), 1)))


class _Number(str):
    """A number of JSON as the text that it is."""


def _parsed(text: str) -> Any:
    """JSON whose numbers stay text; None for what is no JSON."""
    try:
        return json.loads(text, parse_float=_Number, parse_int=_Number, object_pairs_hook=_named_once)
    except (ValueError, RecursionError):
        return None


class _NamedTwice(dict[str, Any]):
    """An object with a name in it, or within it, twice, of which any could be meant."""


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    within = any(isinstance(value, _NamedTwice) for value in found.values())
    return found if len(found) == len(pairs) and not within else _NamedTwice(found)


def _list_within(document: Any) -> list[Any] | None:
    """The one list of objects that an object holds."""
    values = document.values() if isinstance(document, dict) else ()
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _objects(
    entries: Iterable[tuple[int, Any]], lines: list[str] | None = None, what: str = "a JSON object"
) -> tuple[list[tuple[int, dict[str, str]]], Counter[str]]:
    rows: list[tuple[int, dict[str, str]]] = []
    broken: Counter[str] = Counter()
    for number, entry in entries:
        if isinstance(entry, _NamedTwice):
            broken["a name is in it twice"] += 1
        elif isinstance(entry, dict):
            rows.append((number, dict(_flat(entry, "", _NESTED))))
        elif lines is None or lines[number - 1].strip():
            broken[f"not {what}"] += 1
    return rows, broken


def _flat(entry: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    """Names and texts of an object; what an object within it holds is named ``outer.inner``."""
    for name, value in entry.items():
        if isinstance(value, dict) and depth:
            yield from _flat(value, f"{prefix}{name}.", depth - 1)
        elif isinstance(value, list):
            plain = all(type(part) is str for part in value)
            yield prefix + name, ";".join(value) if plain else json.dumps(value)
        elif value is not None:
            # A lone half of a surrogate pair, which JSON can spell, is no text that a file can hold.
            yield prefix + name, str(value).encode("utf-8", "replace").decode()


def _arguments(line: str) -> dict[str, Any] | None:
    """``Request(prompt='a cat', width=512, ...)`` as Python prints a record; only plain values."""
    match = _CALL.search(line)
    if match is None or len(line) > _LONGEST_CALL:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of 1or 2, which is no number and no error to Python
            call = ast.parse(f"_({match[1]})", mode="eval").body
        assert isinstance(call, ast.Call)
        return {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords if argument.arg}
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError):
        return None


def listed(names: Iterable[str], most: int = 12) -> str:
    """Column names for a sentence."""
    texts = [shown(name) if name.strip() else "(without a name)" for name in names] or ["none"]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
