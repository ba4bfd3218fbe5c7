"""The tables of a sweep: one row per run, and the requests of all runs, both in key order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff.files import atomic
from synerdiff.results.records import REQUEST_COLUMNS, read_table, write_table

if TYPE_CHECKING:
    import pyarrow


def write_tables(folder: Path, grid: Sequence[Mapping[str, Any]], search: Sequence[Mapping[str, Any]]) -> None:
    """``runs.parquet`` holds the grid and, with ``purpose`` search, the runs that only compared batch sizes;
    ``requests.parquet`` holds the requests of the grid, with the run's key in front."""
    rows = [{"purpose": "grid", **row} for row in grid] + [{"purpose": "search", **row} for row in search]
    write_table(folder / "runs.parquet", runs_table(rows))
    _write_requests(folder, [row["key"] for row in grid])


def runs_table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """Rows with the union of their columns; a column without any value holds floating-point nulls."""
    import pyarrow

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        column = pyarrow.array([row.get(name) for row in rows])
        columns.append(column.cast("double") if pyarrow.types.is_null(column.type) else column)
    return pyarrow.table(columns, names=names)


def _write_requests(folder: Path, keys: Sequence[str]) -> None:
    """One run after the other, so that a large sweep is never in memory as a whole."""
    import pyarrow
    from pyarrow import parquet

    kinds = [pyarrow.field("run", pyarrow.string())]
    kinds += [pyarrow.field(name, pyarrow.type_for_alias(kind)) for name, kind in REQUEST_COLUMNS.items()]
    schema = pyarrow.schema(kinds)
    with (
        atomic(folder / "requests.parquet") as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for key in keys:
            table, _ = read_table(folder / "runs" / f"{key}.parquet", REQUEST_COLUMNS)
            run = pyarrow.array([key] * table.num_rows)
            table = table.replace_schema_metadata(None).select(list(REQUEST_COLUMNS)).add_column(0, "run", run)
            writer.write_table(table)
