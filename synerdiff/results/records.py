"""Records of a run as parquet files, and back as data frames.

Two tables: one row per request (``requests.parquet``) and one per piece of work (``work.parquet``); columns and units
are in ``docs/file-formats.md``. The same records always give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.core import NS_PER_S, InputError, RequestRecord, WorkRecord
from synerdiff.files import atomic, require_memory

if TYPE_CHECKING:
    import pandas
    import pyarrow

REQUEST_COLUMNS = {
    "request_id": "int64",
    "arrival_s": "double",
    "admitted_s": "double",
    "denoised_s": "double",
    "decode_started_s": "double",
    "finished_s": "double",
    "request_latency_s": "double",
    "status": "string",
    "images": "int64",
    "steps": "int64",
    "skipped_steps": "int64",
    "guidance_scale": "double",
    "height": "int64",
    "width": "int64",
    "base_model": "string",
    "loras": "string",
    "controlnets": "string",
    "slo_s": "double",
    "seed": "int64",
    "modes": "string",
    "worker": "int64",
    "steps_run": "int64",
    "intended_arrival_s": "double",
}
"""Column -> type. Times are seconds since the start of the trace, null where a request never got there."""

WORK_COLUMNS = {
    "gpu": "int64",
    "lane": "string",
    "kind": "string",
    "start_ns": "int64",
    "end_ns": "int64",
    "rows": "int64",
    "pad_rows": "int64",
    "sample_ids": "string",
    "modes": "string",
    "chunk": "int64",
    "exclusive": "bool",
    "forced": "bool",
}
"""Column -> type. ``sample_ids`` are ``request.image``; ``chunk`` is -1 for a step."""

RUN_KEY = b"synerdiff"
"""Where a table's metadata holds what else is known about its run, as JSON."""
_COPIES = 3
"""A table, as Arrow and as a frame, takes so many times its decoded size, about."""


def requests_table(records: Sequence[RequestRecord], worker_of: Sequence[int] | None = None) -> pyarrow.Table:
    """One row per request, in trace order; ``worker_of``: the worker of each, by default the first."""
    requests = [record.request for record in records]
    arrivals = [request.arrival_ns for request in requests]
    finished = [record.finished_ns for record in records]
    columns: list[list[Any]] = [
        [request.request_id for request in requests],
        _seconds(arrivals),
        _seconds([record.admitted_ns for record in records]),
        _seconds([record.denoised_ns for record in records]),
        _seconds([record.decode_started_ns for record in records]),
        _seconds(finished),
        [(end - start) / NS_PER_S if end >= 0 else None for start, end in zip(arrivals, finished, strict=True)],
        [record.status for record in records],
        [request.images for request in requests],
        [request.steps for request in requests],
        [record.skipped_steps for record in records],
        [request.guidance_scale for request in requests],
        [request.height for request in requests],
        [request.width for request in requests],
        [request.base_model for request in requests],
        [";".join(map(str, request.loras)) for request in requests],
        [";".join(map(str, request.controlnets)) for request in requests],
        [None if request.slo_ns is None else request.slo_ns / NS_PER_S for request in requests],
        [request.seed for request in requests],
        [";".join(record.modes) for record in records],
        [0] * len(records) if worker_of is None else list(worker_of),
        [request.steps for request in requests],
        _seconds([r.arrival_ns if r.intended_ns is None else r.intended_ns for r in requests]),
    ]
    return _table(REQUEST_COLUMNS, columns)


def work_table(records: Sequence[WorkRecord], sample_names: Sequence[str]) -> pyarrow.Table:
    """One row per piece of work, in the order of the records."""
    # Neighbouring steps mostly hold the same samples, so each distinct batch is spelled once.
    spelled: dict[tuple[int, ...], str] = {}
    ids: list[str] = []
    for record in records:
        text = spelled.get(record.samples)
        if text is None:
            text = spelled[record.samples] = ";".join([sample_names[sample] for sample in record.samples])
        ids.append(text)
    columns: list[Sequence[Any]] = list(zip(*records, strict=True)) if records else [[] for _ in WORK_COLUMNS]
    columns[list(WORK_COLUMNS).index("sample_ids")] = ids
    return _table(WORK_COLUMNS, columns)


def write_table(path: Path, table: pyarrow.Table, run: Mapping[str, Any] | None = None) -> None:
    """Write a table in one step; ``run`` is kept beside it in the file's metadata."""
    if run is not None:
        table = table.replace_schema_metadata({RUN_KEY: json.dumps(run, allow_nan=False).encode()})
    with atomic(path) as temporary:
        store(temporary, table)


def store(path: Path, table: pyarrow.Table) -> None:
    """Write a table as it is to a path of the caller's; the same table gives the same bytes."""
    from pyarrow import parquet

    parquet.write_table(table, path, compression="zstd")


def read_requests(path: Path) -> pandas.DataFrame:
    """The request table as a data frame; a run's folder is accepted for its ``requests.parquet``."""
    return _frame(path / "requests.parquet" if path.is_dir() else path, REQUEST_COLUMNS)


def read_work(path: Path) -> pandas.DataFrame:
    """The work table as a data frame; a run's folder is accepted for its ``work.parquet``."""
    return _frame(path / "work.parquet" if path.is_dir() else path, WORK_COLUMNS)


def _frame(path: Path, columns: Mapping[str, str]) -> pandas.DataFrame:
    frame: pandas.DataFrame = read_table(path, columns)[0].to_pandas()
    return frame


def read_table(path: Path, columns: Mapping[str, str]) -> tuple[pyarrow.Table, dict[str, Any]]:
    """A table that has at least these columns, and what the file knows about its run.

    Raises InputError for a missing, truncated or foreign file.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        groups = range(file.metadata.num_row_groups)
        size_bytes = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        require_memory(path, "table of records", _COPIES * size_bytes)
        table = file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file of records.") from None
    except pyarrow.ArrowException:
        raise InputError(f"{path}: this is not a complete parquet file; write it again.") from None
    except OSError as error:
        raise InputError(f"{path}: the records cannot be read ({error.strerror or error}).") from None
    for name, kind in columns.items():
        if name not in table.column_names:
            raise InputError(f"{path}: the column {name} is missing, so these are not records of a run.")
        stored = str(table.schema.field(name).type)
        if stored != kind:
            raise InputError(f"{path}: the column {name} holds {stored}; {kind} is needed.")
    return table, json.loads((table.schema.metadata or {}).get(RUN_KEY, b"{}"))


def _seconds(times_ns: list[int]) -> list[float | None]:
    return [time / NS_PER_S if time >= 0 else None for time in times_ns]


def _table(columns: Mapping[str, str], values: Sequence[Sequence[Any]]) -> pyarrow.Table:
    import pyarrow

    kinds = [pyarrow.type_for_alias(kind) for kind in columns.values()]
    arrays = [pyarrow.array(cells, kind) for cells, kind in zip(values, kinds, strict=True)]
    return pyarrow.table(arrays, names=list(columns))
