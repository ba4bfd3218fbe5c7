"""Reads and writes synerdiff's own trace format: CSV, and the same columns in parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from synerdiff.core import NS_PER_S, InputError, Request
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
from traces.scaling import check_time_scale, scaled_ns

WHAT = "trace"
_ALWAYS_WRITTEN = ("arrival_s", "steps", "images", "guidance_scale")


def read_trace(
    path: Path,
    time_scale: float = 1.0,
    window: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> list[Request]:
    """The requests of a trace file (``.csv``, gzipped or not, or ``.parquet``), in its order.

    ``window`` (a, b) keeps arrivals with a <= arrival_s < b, in seconds of the unscaled trace, and shifts them so
    that a becomes 0. Then arrival_ns = round(arrival_s * time_scale * 10^9). Requests are numbered from 0 in what is
    returned. Raises InputError, with file and line, for anything that the format does not allow and when no request
    is left.
    """
    check_time_scale(time_scale)
    start_ns, end_ns = _window_ns(window)
    requests: list[Request] = []
    last_ns = -1
    for arrival_ns, fields in _parsed(path, progress):
        last_ns = arrival_ns
        if arrival_ns < start_ns or (end_ns is not None and arrival_ns >= end_ns):
            continue
        requests.append(request_of(len(requests), scaled_ns(arrival_ns - start_ns, time_scale), fields))
    if last_ns < 0:
        raise InputError(f"{path}: the trace holds no requests.")
    if not requests:
        assert window is not None
        raise InputError(
            f"{path}: no request arrives in the window {window[0]:g}:{window[1]:g} s; "
            f"the last one of the trace arrives at {seconds_text(last_ns)} s."
        )
    return requests


def _window_ns(window: tuple[float, float] | None) -> tuple[int, int | None]:
    if window is None:
        return 0, None
    start_s, end_s = window
    if not 0 <= start_s < end_s < float("inf"):
        raise InputError(f"The window {start_s:g}:{end_s:g} is not allowed; give 0 <= start < end, in seconds.")
    return round(start_s * NS_PER_S), round(end_s * NS_PER_S)


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
