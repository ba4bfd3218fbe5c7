"""Files: the only YAML reader and writer, the only table reader, atomic writes, the guard of output folders, hashes.

Whatever a file may hold that is wrong becomes an InputError with one sentence: file, line or field, found, allowed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import yaml

from synerdiff.core import InputError

Progress = Callable[[int, int], None]
"""Called now and then while something long is read or fetched, with (bytes done, bytes in all; 0 when unknown)."""

MARK = ".synerdiff"
"""In a folder that a command writes: which command, so that no other's files are overwritten."""

MOST = 10**18
"""The largest whole number of a table unless its column says otherwise; in nanoseconds 31 years."""

LEAST_SIDE, MOST_SIDE = 8, 16_384
"""Pixels a side of an image."""

_Row = TypeVar("_Row")
_ROW_BYTES = 1500
"""What a row of a table takes in memory, about."""
_TEXT_COPIES = 8
"""Text, its lines and what is made of them take so many times the file's size, about."""
_LONGEST_SHOWN = 60
_LONGEST_NUMBER = 60
_LONGEST_NAME = 300
_LINES_PER_REPORT = 4096
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def shown(value: object, longest: int = _LONGEST_SHOWN) -> str:
    """A value as text that fits into a sentence."""
    text = str(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


PACKAGES = ("profiler", "simulator", "policies", "real_runner", "traces")
"""Our top-level packages with generic names; another distribution's package may shadow one."""


def install_hint(extra: str = "") -> str:
    """How to install the libraries of that extra: from this checkout, since synerdiff is on no package index."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():  # installed as a copy: only its user knows where the checkout is
        root = Path("PATH-TO-THE-CHECKOUT")
    return f"pip install -c '{root}/constraints.txt' -e '{root}{f'[{extra}]' if extra else ''}'"


# Reading text and numbers


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Errors of the file system and of damaged archives become an InputError that names the file."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: this is a device or a pipe; a {what} must be a file.")
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An InputError names the file, also where what raised it did not know it."""
    try:
        yield
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None


def free_memory_bytes() -> int | None:
    """Memory that this machine can still give; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def require_memory(path: Path, what: str, needed_bytes: int) -> None:
    """InputError when what is to be read takes more memory than there is."""
    free = free_memory_bytes()
    if free is not None and needed_bytes > free:
        raise InputError(
            f"{path}: reading this {what} takes about {needed_bytes / 1e9:.3g} GB of memory; "
            f"{free / 1e9:.3g} GB are free."
        )


def within_memory(rows: Iterable[_Row], path: Path, what: str, row_bytes: int) -> Iterator[_Row]:
    """The same rows; InputError as soon as those that were read, kept at so many bytes each, fill the free memory."""
    free = free_memory_bytes()
    most = math.inf if free is None else free // row_bytes
    for count, row in enumerate(rows):
        if count > most:
            raise InputError(
                f"{path}: a {what} of more than {most:,} rows does not fit into the {most * row_bytes / 1e9:.3g} GB of "
                "memory that are free; cut it into parts."
            )
        yield row


def read_text(path: Path, what: str, most_bytes: int | None = None) -> str:
    """The file as UTF-8 text, or one sentence that names it; not one of more bytes than that, or than memory takes."""
    with reading(path, what):
        size = path.stat().st_size
        if most_bytes is not None and size > most_bytes:
            raise InputError(f"{path}: a {what} has at most {most_bytes:,} bytes; this file has {size:,}.")
        require_memory(path, what, _TEXT_COPIES * size)
        return path.read_text(encoding="utf-8-sig")


def whole_number(text: str, low: int = 0, high: int = MOST) -> int:
    """An integer in ASCII digits within bounds, both included; ValueError says what was found and what is allowed."""
    stripped = text.strip()
    if not _INTEGER.fullmatch(stripped) or len(stripped) > _LONGEST_NUMBER:
        raise ValueError(f"is {shown(repr(text))}; a whole number{_bounds(low, high)} is needed")
    value = int(stripped)
    if not low <= value <= high:
        raise ValueError(f"is {value}; {_allowed(value, low, high)}")
    return value


def number(text: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite decimal number within bounds, both included; ValueError says what was found and what is allowed."""
    stripped = text.strip()
    if not _NUMBER.fullmatch(stripped) or len(stripped) > _LONGEST_NUMBER:
        raise ValueError(f"is {shown(repr(text))}; a number{_bounds(low, high)} is needed")
    value = float(stripped)
    if value == 0 and re.search("[1-9]", stripped.lower().partition("e")[0]):
        raise ValueError(f"is {stripped}, which is too near 0 to be told from it")
    if not math.isfinite(value):
        raise ValueError(f"is {stripped}; a finite number{_bounds(low, high)} is needed")
    if not low <= value <= high:
        raise ValueError(f"is {stripped}; {_allowed(value, low, high)}")
    return value


def _bounds(low: float, high: float) -> str:
    if high in (MOST, math.inf):
        return "" if low in (-MOST, -math.inf) else f" of at least {low}"
    return f" of at most {high}" if low == -math.inf else f" from {low} to {high}"


def _allowed(value: float, low: float, high: float) -> str:
    if value < low and high in (MOST, math.inf):
        return f"at least {low} is needed"
    return f"at most {high} is allowed" if low == -math.inf else f"allowed are {low} to {high}"


def finite(value: Any, check: Callable[[float], bool]) -> bool:
    """Whether ``value`` is a real number (no bool, NaN, infinity, integer beyond floats) that passes the check."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max and check(value)


def plain_digits(text: str, low: int, high: int) -> int | None:
    """The whole number that ASCII digits and nothing else write, within bounds, both included; else None."""
    written = len(text) <= _LONGEST_NUMBER and text.isascii() and text.isdigit()
    return int(text) if written and low <= int(text) <= high else None


def sides_of(text: str, low: int = LEAST_SIDE, high: int = MOST_SIDE) -> tuple[int, int] | None:
    """(height, width) of ``HEIGHTxWIDTH`` in pixels, within bounds, both included; None for what is none."""
    sides = [plain_digits(side, low, high) for side in text.split("x") if not side.startswith("0")]
    return (sides[0], sides[1]) if len(sides) == 2 and text.count("x") == 1 and sides[0] and sides[1] else None


# Tables


class Row:
    """One line of a CSV table with the place that it came from, ``FILE, line N``."""

    __slots__ = ("_cells", "place")

    def __init__(self, place: str, cells: Mapping[str, str]) -> None:
        self.place, self._cells = place, cells

    def text(self, column: str) -> str:
        """The cell as it is written; empty for an optional column that the table lacks."""
        return self._cells.get(column, "")

    def name(self, column: str) -> str:
        """A text that is not empty and has no control characters."""
        text = self.text(column)
        if not text.strip() or not text.isprintable():
            raise self.error(column, f"is {shown(repr(text))}; a name is needed")
        if len(text) > _LONGEST_NAME:
            raise self.error(column, f"has {len(text)} characters; a name has at most {_LONGEST_NAME}")
        return text

    def integer(self, column: str, low: int = 0, high: int = MOST) -> int:
        """A whole number within bounds, both included."""
        try:
            return whole_number(self.text(column), low, high)
        except ValueError as error:
            raise self.error(column, str(error)) from None

    def number(self, column: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number within bounds, both included."""
        try:
            return number(self.text(column), low, high)
        except ValueError as error:
            raise self.error(column, str(error)) from None

    def flag(self, column: str) -> bool:
        """0 or 1."""
        return self.integer(column, 0, 1) == 1

    def error(self, column: str, why: str) -> InputError:
        """What to raise for this cell: ``why`` goes on after the column's name and has no full stop."""
        return InputError(f"{self.place}: {column} {why}.")


def read_rows(path: Path, columns: Sequence[str], what: str, optional: Sequence[str] = ()) -> list[Row]:
    """All rows of a CSV table with a header, plain or gzipped; other columns than these are ignored.

    InputError names file and line: a column missing or given twice, a row of another length than the header, a cell
    longer than csv reads (131,072 characters), what is no text.
    """
    lines = csv_rows(path, what)
    header = next(lines, (0, list[str]()))[1]
    for column in (*columns, *optional):
        if header.count(column) > 1:
            raise InputError(f"{path}: the column {column} is given twice.")
    missing = [column for column in columns if column not in header]
    if missing:
        raise InputError(f"{path}: the column {missing[0]} is missing; a {what} has {', '.join(columns)}.")
    kept = within_memory(lines, path, what, _ROW_BYTES)
    return [Row(f"{path}, line {line}", dict(zip(header, cells, strict=True))) for line, cells in kept]


def csv_rows(
    path: Path, what: str, progress: Progress | None = None, delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file (or of its gzip) as (line, cells), the header first; empty lines are left out.

    Raises InputError when it cannot be read, is no CSV table, or a row has another number of cells than the header.
    """
    with reading(path, what), path.open("rb") as raw:
        total = path.stat().st_size
        report = None if progress is None else lambda: progress(raw.tell(), total)
        yield from csv_rows_of(decompressed(raw), path, what, report, delimiter)


def csv_rows_of(
    stream: IO[bytes],
    path: Path,
    what: str,
    report: Callable[[], None] | None = None,
    delimiter: str = ",",
) -> Iterator[tuple[int, list[str]]]:
    """The same for an open binary stream; ``path`` is the name that errors give."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(_lines(text, path, what, report), strict=True, delimiter=delimiter)
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


def decompressed(raw: IO[bytes]) -> IO[bytes]:
    """The stream itself, or what it holds when its first bytes are gzip's."""
    magic = raw.read(2)
    raw.seek(0)
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb")) if magic == b"\x1f\x8b" else raw


def _lines(text: io.TextIOWrapper, path: Path, what: str, report: Callable[[], None] | None) -> Iterator[str]:
    for count, line in enumerate(text, 1):
        if "\0" in line:
            raise InputError(f"{path}, line {count}: this is not text, so it cannot be a {what}.")
        if report is not None and count % _LINES_PER_REPORT == 0:
            report()
        yield line


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV table in one step."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        for row in rows:  # csv leaves a lone \r bare, and then reads it as the end of the row
            (quoting if any(isinstance(cell, str) and "\r" in cell for cell in row) else writer).writerow(row)


# YAML: the plain types of version 1.2, so that 010, 1:20, no and dates mean what they look like

_YAML_CHARACTERS = 4_000_000
_YAML_DEPTH = 50
_YAML_NODES = 100_000
_YAML_DIGITS = 20
_TAG = "tag:yaml.org,2002:"
_CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}


class _PlainLoader(yaml.SafeLoader):
    """Composes nodes whose tags follow YAML 1.2; nothing is constructed by PyYAML itself."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > _YAML_DEPTH or self.count > _YAML_NODES:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise _too_large(line, self.depth > _YAML_DEPTH)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _PlainDumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would take for something else than text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    for _class in (_PlainLoader, _PlainDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file whose top level is a mapping with text keys.

    Only text, numbers, true, false, null, lists and mappings (merge keys too), as YAML 1.2 reads them; a key given
    twice, other tags and keys, and what is nested or repeated beyond all need are InputErrors with file and line.
    """
    text = read_text(path, what, 4 * _YAML_CHARACTERS)
    if len(text) > _YAML_CHARACTERS:
        raise InputError(f"{path}: a {what} has at most {_YAML_CHARACTERS:,} characters; this file has {len(text):,}.")
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        data = None if node is None else _Plain().value(node, 1)
    except InputError as error:
        raise InputError(f"{path}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"{path}{where}: this is not valid YAML ({problem}).") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise InputError(f"{path}: a {what} holds named fields at its top level; found {found}.")
    for key in data:
        if not isinstance(key, str):
            raise InputError(f"{path}: field names are text; found {key!r}.")
    return data


class _Plain:
    """Turns composed nodes into plain values; an alias is written out each time, and counted."""

    def __init__(self) -> None:
        self._count = 0

    def value(self, node: yaml.Node, depth: int) -> Any:
        line = node.start_mark.line + 1
        self._count += 1
        if depth > _YAML_DEPTH or self._count > _YAML_NODES:
            raise _too_large(line, depth > _YAML_DEPTH)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(part, depth + 1) for part in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "merge"):
            return node.value
        if isinstance(node, yaml.ScalarNode) and kind in ("int", "float", "bool", "null"):
            return _scalar(kind, node.value, line)
        name = node.tag.replace(_TAG, "!!")
        raise InputError(
            f"line {line}: {shown(name)} is not allowed; values are text, numbers, lists and named fields."
        )

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            value = self.value(value_node, depth + 1)
            if key_node.tag == f"{_TAG}merge":
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, dict) for part in parts):
                    raise InputError(f"line {line}: << merges named fields, or a list of them; found {shown(value)!r}.")
                for part in parts:
                    merged = {**part, **merged}
                continue
            key = self.value(key_node, depth + 1)
            if not isinstance(key, str | int | float) or isinstance(key, bool):
                raise InputError(f"line {line}: a key is text or a number; found {shown(repr(key))}.")
            if key in own:
                raise InputError(f"line {line}: the key '{shown(key)}' is given twice.")
            own[key] = value
        return {**merged, **own}


def _scalar(kind: str, text: str, line: int) -> int | float | bool | None:
    digits = text.lstrip("+-")
    if kind in ("bool", "null") and (value := _CONSTANTS.get(text.lower(), text)) in (True, False, None):
        return value
    if kind == "int" and _INTEGER.fullmatch(text):
        if len(digits) > _YAML_DIGITS:
            raise InputError(f"line {line}: a whole number of {len(digits)} digits; at most {_YAML_DIGITS} are read.")
        if len(digits) > 1 and digits.startswith("0"):
            raise InputError(
                f"line {line}: {text} begins with 0, which some readers take for octal; "
                f"write {int(text)}, or '{text}' in quotes for text."
            )
        return int(text)
    if kind == "float":
        if digits.lower() in (".inf", ".nan"):
            return float(text.replace(".", ""))
        if _NUMBER.fullmatch(text):
            return float(text)
    raise InputError(f"line {line}: {shown(repr(text))} is not a value of the type !!{kind}.")


def _too_large(line: int, deep: bool) -> InputError:
    what = f"nested deeper than {_YAML_DEPTH}" if deep else f"more than {_YAML_NODES:,} values, aliases written out"
    return InputError(f"line {line}: {what}, which no file of synerdiff needs.")


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping of plain values in one step; ``read_yaml`` returns an equal one."""
    write_text(path, yaml.dump(dict(data), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120))


# Writing


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded path; it replaces ``path`` in one step when the block ends well, else nothing changes.

    Raises InputError, naming the path, when it cannot be written (a full disk too).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from None
    temporary = Path(name)
    try:
        yield temporary
        mode = 0o666 & ~_umask()
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write values as indented JSON in one step."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def claim_folder(path: Path, mark: str) -> None:
    """Make the output folder of the command ``mark``, before any work; its earlier output may be replaced.

    InputError when it cannot be written, is a file, or holds anything that this command did not write: the folder is
    empty, or a file in it names the command.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: the output must be a folder; this is a file.")
    owner = path / MARK
    try:
        names = sorted(part.name for part in path.iterdir()) if path.is_dir() else []
        written_by = ""
        if MARK in names:
            written_by = _first_line(owner) or "an unknown command"
    except OSError as error:
        raise InputError(f"{path}: the output folder cannot be read ({error.strerror}).") from None
    if written_by and written_by != mark:
        raise InputError(
            f"{path}: this folder holds what '{shown(written_by)}' wrote, not '{mark}'; give another folder."
        )
    others = [name for name in names if name != MARK and not name.endswith(".part")]
    if others and not written_by:
        raise InputError(f"{path}: this folder holds {others[0]}, which '{mark}' did not write; give another folder.")
    require_writable_folder(path)
    if not written_by:
        write_text(owner, f"{mark}\n")


def _first_line(path: Path) -> str:
    """What a mark says; empty for what is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(1000).decode("utf-8", errors="replace").strip()


def require_writable_folder(path: Path) -> None:
    """Create the folder if needed and prove that it can be written: for folders that several commands share."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: the output must be a folder; this is a file.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: the output folder cannot be written ({error.strerror}).") from None


def sha256_of_files(paths: list[Path]) -> str:
    """One hash over names and contents, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with reading(path, "file"), path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
