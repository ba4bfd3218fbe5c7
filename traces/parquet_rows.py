"""Reads the trace columns out of a parquet file as the texts that a CSV would hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synerdiff.core import InputError
from synerdiff.files import reading
from traces.columns import INTEGER_COLUMNS

_ROWS_PER_BATCH = 16_384


def parquet_rows(path: Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """The column names as row 0, then (row, texts) with rows counted from 1; a null is an empty text.

    Raises InputError for a foreign or truncated file and for values that are neither text nor numbers.
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
                    yield row, [_text(path, row, *pair) for pair in zip(names, values, strict=True)]
    except (pyarrow.ArrowException, OSError):
        raise InputError(f"{path}: this is not a complete parquet file, so it cannot be a {what}.") from None


def _text(path: Path, row: int, column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A column of whole numbers that has a gap is stored as floating point by most writers.
        whole = column in INTEGER_COLUMNS and isinstance(value, float) and value.is_integer()
        return str(int(value)) if whole else repr(value)
    raise InputError(f"{path}, row {row}: {column} holds a {type(value).__name__}; text or a number is needed.")
