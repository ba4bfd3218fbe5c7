"""Reads CSV tables row by row, plain or gzipped, and turns everything that can go wrong into one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from synerdiff.core import InputError

Progress = Callable[[int, int], None]
"""Called now and then while something long is read or fetched, with (bytes done, bytes in all; 0 when unknown)."""

_LINES_PER_REPORT = 4096


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Errors of the file system and of damaged archives become an InputError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {what}.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; a {what} is needed.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is not text, so it cannot be a {what}.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError):
        raise InputError(
            f"{path}: the compressed file is damaged or cut short, so the {what} cannot be read."
        ) from None
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror or error}).") from None


def decompressed(raw: IO[bytes]) -> IO[bytes]:
    """The stream itself, or what it holds when its first bytes are gzip's."""
    magic = raw.read(2)
    raw.seek(0)
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb")) if magic == b"\x1f\x8b" else raw


def csv_rows(path: Path, what: str, progress: Progress | None = None) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file (or of its gzip) as (line, cells), the header first; empty lines are left out.

    Raises InputError when it cannot be read, is no CSV table, or a row has another number of cells than the header.
    """
    with reading(path, what), path.open("rb") as raw:
        total = path.stat().st_size
        report = None if progress is None else lambda: progress(raw.tell(), total)
        yield from rows_of(decompressed(raw), path, what, report)


def rows_of(
    stream: IO[bytes], path: Path, what: str, report: Callable[[], None] | None = None
) -> Iterator[tuple[int, list[str]]]:
    """The same for an open binary stream; ``path`` is the name that errors give."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(_lines(text, path, what, report), strict=True)
    width = 0
    try:
        for cells in reader:
            if not cells:
                continue
            width = width or len(cells)
            if len(cells) != width:
                where = f"{path}, line {reader.line_num}"
                raise InputError(f"{where}: the row has {len(cells)} cells and the header has {width}.")
            yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: this is not a CSV row ({error}).") from None
    finally:
        text.detach()  # the caller closes the stream


def _lines(text: io.TextIOWrapper, path: Path, what: str, report: Callable[[], None] | None) -> Iterator[str]:
    for number, line in enumerate(text, 1):
        if "\0" in line:
            raise InputError(f"{path}, line {number}: this is not text, so it cannot be a {what}.")
        if report is not None and number % _LINES_PER_REPORT == 0:
            report()
        yield line
