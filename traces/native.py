"""Reads and writes synerdiff's own trace format: CSV, and the same columns in parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from synerdiff.core import InputError, Request
from synerdiff.files import Progress, csv_rows, write_rows
from traces.columns import (
    COLUMNS,
    REQUIRED,
    FieldError,
    Fields,
    RowParser,
    check_header,
    request_of,
    seconds_text,
    texts_of,
)
from traces.parquet_rows import parquet_rows

WHAT = "trace"
_ALWAYS_WRITTEN = ("arrival_s", "steps", "images", "guidance_scale")


def read_trace(path: Path, progress: Progress | None = None) -> list[Request]:
    """The requests of a trace file (``.csv``, gzipped or not, or ``.parquet``), in its order, numbered from 0.

    arrival_ns = round(arrival_s * 10^9). Raises InputError, with file and line, for anything that the format does not
    allow and when there is no request.
    """
    requests = [request_of(index, *row) for index, row in enumerate(_parsed(path, progress))]
    if not requests:
        raise InputError(f"{path}: the trace holds no requests.")
    return requests


def _parsed(path: Path, progress: Progress | None) -> Iterator[tuple[int, Fields]]:
    parquet = path.suffix == ".parquet"
    rows = parquet_rows(path, WHAT) if parquet else csv_rows(path, WHAT, progress)
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
        if arrival_ns < previous_ns:
            raise InputError(
                f"{path}, {place} {line}: arrival_s is {seconds_text(arrival_ns)}, before the previous request's "
                f"{seconds_text(previous_ns)}; a trace is sorted by arrival."
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
