"""Reads and writes synerdiff's own trace format, as CSV and parquet; what became of a foreign trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from synerdiff.core import InputError, Request
from synerdiff.files import Progress, csv_rows, reading, within_memory, write_rows
from traces.columns import (
    COLUMNS,
    INTEGER_COLUMNS,
    REQUIRED,
    FieldError,
    Fields,
    RowParser,
    check_header,
    request_of,
    seconds_text,
    texts_of,
)

WHAT = "trace"
_ALWAYS_WRITTEN = ("arrival_s", "steps", "images", "guidance_scale")


def read_trace(path: Path, progress: Progress | None = None, sort: bool = False) -> list[Request]:
    """The requests of a trace file (``.csv``, gzipped or not, or ``.parquet``), in its order, numbered from 0.

    arrival_ns = round(arrival_s * 10^9). Raises InputError, with file and line, for anything that the format does not
    allow and when there is no request. ``sort``: the file need not be in order; equal arrivals keep theirs.
    """
    rows = _parsed(path, progress, sort)
    if sort:
        rows = iter(sorted(rows, key=itemgetter(0)))
    requests = [request_of(index, *row) for index, row in enumerate(rows)]
    if not requests:
        raise InputError(f"{path}: the trace holds no requests.")
    return requests


def _parsed(path: Path, progress: Progress | None, sort: bool) -> Iterator[tuple[int, Fields]]:
    parquet = path.suffix == ".parquet"
    rows = parquet_rows(path, WHAT) if parquet else csv_rows(path, WHAT, progress)
    rows = within_memory(rows, path, WHAT, REQUEST_BYTES)
    place = "row" if parquet else "line"
    header = next(rows, (0, list[str]()))[1]
    if not header:
        raise InputError(f"{path}: the trace is empty.")
    check_header(str(path) if parquet else f"{path}, line 1", header)
    parser = RowParser(header)
    previous_ns = -1
    for line, cells in rows:
        try:
            arrival_ns, fields = parser.parse(cells)
        except FieldError as error:
            raise InputError(f"{path}, {place} {line}: {error}.") from None
        if arrival_ns < previous_ns and not sort:
            raise InputError(
                f"{path}, {place} {line}: arrival_s is {seconds_text(arrival_ns)}, before the previous request's "
                f"{seconds_text(previous_ns)}; a trace is sorted by arrival, or read with --sort."
            )
        previous_ns = arrival_ns
        yield arrival_ns, fields


def require_trace_target(path: Path) -> None:
    """InputError unless a trace can be written there: a new name that ends in .csv, or an earlier trace's."""
    if path.suffix != ".csv":
        raise InputError(f"{path}: a trace is written as CSV; give a name that ends in .csv.")
    if not path.exists():
        return
    header = next(csv_rows(path, WHAT), (0, list[str]()))[1]
    if header and not (set(REQUIRED) <= set(header) <= set(COLUMNS)):
        raise InputError(f"{path}: this file is no trace of synerdiff, so it is not replaced; give another name.")


def write_trace(path: Path, requests: Sequence[Request]) -> None:
    """Write a trace as CSV, in one step; ``read_trace`` returns equal requests (numbered from 0).

    Columns in which every request has the default are left out. Raises InputError when the path does not end in
    .csv, nothing is given, arrivals are unsorted, or a value does not fit the format.
    """
    require_trace_target(path)
    if not requests:
        raise InputError(f"{path}: a trace without requests is not written.")
    rows = []
    previous_ns = 0
    for index, request in enumerate(requests):
        if request.arrival_ns < previous_ns:
            raise InputError(f"{path}: request {index} arrives before the one ahead of it; a trace is sorted.")
        previous_ns = request.arrival_ns
        try:
            rows.append(texts_of(request))
        except FieldError as error:
            raise InputError(f"{path}: request {index} cannot be written: {error}.") from None
    used = [i for i, column in enumerate(COLUMNS) if column in _ALWAYS_WRITTEN or any(row[i] for row in rows)]
    write_rows(path, [COLUMNS[i] for i in used], ([row[i] for i in used] for row in rows))


_ROWS_PER_BATCH = 16_384
REQUEST_BYTES = 2000
"""What a request takes in memory, its sample included, about."""


def parquet_rows(path: Path, what: str, strict: bool = True) -> Iterator[tuple[int, list[str]]]:
    """The column names as row 0, then (row, texts) with rows counted from 1; a null is an empty text.

    Times become ISO 8601. Raises InputError for a foreign or truncated file and, when strict, for other values than
    text, numbers and times.
    """
    with reading(path, what), path.open("rb"):  # a missing file or a folder gets its own sentence
        pass
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            yield 0, names
            row = 0
            for batch in file.iter_batches(_ROWS_PER_BATCH):
                columns = [column.to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True):
                    row += 1
                    yield row, [_text(path, row, *pair, strict) for pair in zip(names, values, strict=True)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        raise InputError(f"{path}: this is not a complete parquet file, so it cannot be a {what}.") from None


def _text(path: Path, row: int, column: str, value: Any, strict: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A column of whole numbers that has a gap is stored as floating point by most writers.
        whole = column in INTEGER_COLUMNS and isinstance(value, float) and value.is_integer()
        return str(int(value)) if whole else repr(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if not strict:
        return value.decode() if isinstance(value, bytes) else str(value)
    raise InputError(f"{path}, row {row}: {column} holds a {type(value).__name__}; text or a number is needed.")


CHECKPOINTS = ("one", "keep")
ADAPTERS = ("keep", "drop")


@dataclass(frozen=True, slots=True)
class Conversion:
    """``rows`` = requests + merged + dropped; ``noted`` counts what was kept and is worth knowing, or was changed."""

    requests: list[Request]
    rows: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    noted: Mapping[str, int] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    """How the file was understood, a line each."""
    merged: int = 0
    """Rows that became a further image of a request before them."""

    def __post_init__(self) -> None:
        assert self.rows == len(self.requests) + self.merged + sum(self.dropped.values())

    def lines(self) -> list[str]:
        """How the file was understood and what became of its rows, for people."""
        return [
            *(f"  {fact}" for fact in self.facts),
            *(f"  {count:>7,} dropped: {reason}" for reason, count in self.dropped.items()),
            *(f"  {count:>7,} {note}" for note, count in self.noted.items()),
        ]


def check_options(checkpoints: str, adapters: str) -> None:
    """``one`` counts all checkpoints as one model; ``drop`` leaves LoRAs and ControlNets out."""
    for name, value, allowed in (("checkpoints", checkpoints, CHECKPOINTS), ("adapters", adapters, ADAPTERS)):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; allowed are {' and '.join(allowed)}.")
