"""Reads and writes a profile's folder: ``profile.yaml`` beside CSV tables (``docs/file-formats.md``)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from synerdiff.core import InputError
from synerdiff.files import atomic, read_text, read_yaml, sha256_of_files, write_yaml
from synerdiff.profile.tables import (
    CHUNK_COLUMNS,
    CORUN_COLUMNS,
    OVERHEAD_COLUMNS,
    OVERHEADS,
    SCHEMA_VERSION,
    STEP_COLUMNS,
    Corun,
    Profile,
    Spread,
)

SHIPPED = Path(__file__).resolve().parents[2] / "profiler" / "profiles"
PROVENANCES = ("measured", "estimated")


def shipped_profiles() -> list[str]:
    """Names of the profiles that ship with synerdiff."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/profile.yaml"))


def find_profile(name_or_folder: str, base: Path | None = None) -> Path:
    """The folder of a profile: a path (also relative to ``base``), else the name of a shipped one."""
    candidates = [Path(name_or_folder)]
    if base is not None:
        candidates.insert(0, base / name_or_folder)
    for folder in candidates:
        if (folder / "profile.yaml").is_file():
            return folder
    if name_or_folder in shipped_profiles():
        return SHIPPED / name_or_folder
    if any(folder.exists() for folder in candidates):
        raise InputError(f"{name_or_folder}: this folder holds no profile.yaml, so it is not a profile.")
    known = ", ".join(shipped_profiles())
    raise InputError(f"{name_or_folder}: there is no such profile folder, and the shipped profiles are {known}.")


def load_profile(folder: Path) -> Profile:
    """Read and check a profile; InputError names file, line and column of what is wrong."""
    head_path = folder / "profile.yaml"
    head = read_yaml(head_path, "profile")
    version = head.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{head_path}: schema_version is {version!r}; this version of synerdiff reads {SCHEMA_VERSION}."
        )
    provenance = head.get("provenance")
    if provenance not in PROVENANCES:
        raise InputError(f"{head_path}: provenance is {provenance!r}; allowed are {' and '.join(PROVENANCES)}.")
    steps, held_out = _read_steps(folder / "steps.csv")
    chunks = _read_chunks(folder / "chunks.csv")
    return Profile(
        name=str(head.get("name") or folder.name),
        provenance=provenance,
        row_buckets=_row_buckets(head_path, head, steps),
        steps=steps,
        chunks=chunks,
        corun=_read_corun(folder / "corun.csv", chunks),
        overheads=_read_overheads(folder / "overheads.csv"),
        held_out_steps=held_out,
        info=head,
        content_hash=profile_hash(folder),
    )


def profile_hash(folder: Path) -> str:
    """Hash over all files that a run depends on."""
    names = ("profile.yaml", "steps.csv", "chunks.csv", "corun.csv", "overheads.csv", "adapters.csv")
    return sha256_of_files([folder / name for name in names if (folder / name).is_file()])


def _row_buckets(path: Path, head: Mapping[str, Any], steps: Mapping[int, Spread]) -> tuple[int, ...] | None:
    if "row_buckets" not in head:
        raise InputError(f"{path}: row_buckets is missing; give a list of rows, or null for eager execution.")
    buckets = head["row_buckets"]
    if buckets is None:
        return None
    if not isinstance(buckets, list) or not buckets:
        raise InputError(f"{path}: row_buckets is {buckets!r}; allowed are a list of rows or null.")
    for rows in buckets:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows not in steps:
            raise InputError(f"{path}: row bucket {rows!r} is not among the measured rows of steps.csv.")
    if sorted(set(buckets)) != buckets:
        raise InputError(f"{path}: row_buckets must rise without repeats; found {buckets}.")
    return tuple(buckets)


class _Row:
    """One CSV line with the place it came from."""

    def __init__(self, path: Path, line: int, cells: Mapping[str, str]) -> None:
        self.path, self.line, self.cells = path, line, cells

    def integer(self, column: str, low: int) -> int:
        text = self.cells[column].strip()
        if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
            raise self.error(column, f"is {text!r}; a whole number is needed")
        value = int(text)
        if value < low:
            raise self.error(column, f"is {value}; at least {low} is needed")
        return value

    def spread(self, median: str, p10: str, p90: str) -> Spread:
        found = Spread(self.integer(median, 1), self.integer(p10, 1), self.integer(p90, 1), self.integer("n", 0))
        if not found.p10 <= found.median <= found.p90:
            raise self.error(median, f"is {found.median}, outside its own p10-p90 range {found.p10}-{found.p90}")
        return found

    def flag(self, column: str) -> bool:
        value = self.integer(column, 0)
        if value > 1:
            raise self.error(column, f"is {value}; allowed are 0 and 1")
        return value == 1

    def error(self, column: str, problem: str) -> InputError:
        return InputError(f"{self.path}, line {self.line}: {column} {problem}.")


def _rows(path: Path, columns: Sequence[str]) -> list[_Row]:
    text = read_text(path, "profile table")
    if "\0" in text:
        raise InputError(f"{path}: this is not a CSV table.")
    reader = csv.reader(io.StringIO(text))
    header = next(reader, [])
    missing = [column for column in columns if column not in header]
    if missing:
        raise InputError(f"{path}: the column {missing[0]} is missing; a profile table has {', '.join(columns)}.")
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise InputError(f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}.")
        rows.append(_Row(path, reader.line_num, dict(zip(header, cells, strict=True))))
    return rows


def _read_steps(path: Path) -> tuple[dict[int, Spread], dict[int, Spread]]:
    known: dict[int, Spread] = {}
    held_out: dict[int, Spread] = {}
    for row in _rows(path, STEP_COLUMNS):
        rows = row.integer("rows", 1)
        if rows in known or rows in held_out:
            raise row.error("rows", f"{rows} is given twice")
        spread = row.spread("median_ns", "p10_ns", "p90_ns")
        (held_out if row.flag("held_out") else known)[rows] = spread
    if not known:
        raise InputError(f"{path}: no step times are given.")
    return dict(sorted(known.items())), held_out


def _read_chunks(path: Path) -> dict[str, tuple[Spread, ...]]:
    found: dict[str, dict[int, Spread]] = {}
    for row in _rows(path, CHUNK_COLUMNS):
        chunking, chunk = row.cells["chunking"], row.integer("chunk", 0)
        cells = found.setdefault(chunking, {})
        if chunk in cells:
            raise row.error("chunk", f"{chunk} of '{chunking}' is given twice")
        cells[chunk] = row.spread("median_ns", "p10_ns", "p90_ns")
    if "whole" not in found:
        raise InputError(f"{path}: the chunking 'whole' is missing.")
    for chunking, cells in found.items():
        if sorted(cells) != list(range(len(cells))):
            raise InputError(
                f"{path}: the chunks of '{chunking}' must count from 0 without gaps; found {sorted(cells)}."
            )
    if len(found["whole"]) != 1:
        raise InputError(f"{path}: the chunking 'whole' has {len(found['whole'])} chunks; it has exactly one, chunk 0.")
    return {chunking: tuple(cells[i] for i in range(len(cells))) for chunking, cells in found.items()}


def _read_corun(path: Path, chunks: Mapping[str, Sequence[Spread]]) -> dict[tuple[str, int], dict[int, Corun]]:
    found: dict[tuple[str, int], dict[int, Corun]] = {}
    for row in _rows(path, CORUN_COLUMNS):
        chunking, chunk, rows = row.cells["chunking"], row.integer("chunk", 0), row.integer("rows", 1)
        if chunking not in chunks or chunk >= len(chunks[chunking]):
            raise row.error("chunk", f"{chunk} of '{chunking}' is not in chunks.csv")
        cells = found.setdefault((chunking, chunk), {})
        if rows in cells:
            raise row.error("rows", f"{rows} is given twice for chunk {chunk} of '{chunking}'")
        cells[rows] = Corun(
            step=row.spread("step_slowdown_ppm", "step_p10_ppm", "step_p90_ppm"),
            chunk=row.spread("chunk_slowdown_ppm", "chunk_p10_ppm", "chunk_p90_ppm"),
            held_out=row.flag("held_out"),
        )
    return found


def _read_overheads(path: Path) -> dict[str, Spread]:
    found: dict[str, Spread] = {}
    for row in _rows(path, OVERHEAD_COLUMNS):
        name = row.cells["name"]
        if name not in OVERHEADS:
            raise row.error("name", f"is {name!r}; known are {', '.join(OVERHEADS)}")
        if name in found:
            raise row.error("name", f"{name} is given twice")
        columns = ("median_ns", "p10_ns", "p90_ns", "n")
        found[name] = Spread(*(row.integer(column, 0) for column in columns))
    return found


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV table in one step."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_profile(folder: Path, profile: Profile) -> None:
    """Write all tables of a profile; ``profile.info`` becomes profile.yaml."""
    head = {
        **profile.info,
        "schema_version": SCHEMA_VERSION,
        "name": profile.name,
        "provenance": profile.provenance,
        "row_buckets": None if profile.row_buckets is None else list(profile.row_buckets),
    }
    first = ("schema_version", "name", "provenance", "row_buckets")
    write_table(folder / "steps.csv", STEP_COLUMNS, _step_rows(profile))
    chunk_rows = [
        (chunking, i, s.median, s.p10, s.p90, s.n)
        for chunking, spreads in profile.chunks.items()
        for i, s in enumerate(spreads)
    ]
    write_table(folder / "chunks.csv", CHUNK_COLUMNS, chunk_rows)
    write_table(folder / "corun.csv", CORUN_COLUMNS, _corun_rows(profile))
    overheads = [(name, s.median, s.p10, s.p90, s.n) for name, s in profile.overheads.items()]
    write_table(folder / "overheads.csv", OVERHEAD_COLUMNS, overheads)
    write_yaml(folder / "profile.yaml", {key: head[key] for key in [*first, *(k for k in head if k not in first)]})


def _step_rows(profile: Profile) -> list[tuple[int, ...]]:
    rows = [(r, s.median, s.p10, s.p90, s.n, 0) for r, s in profile.steps.items()]
    rows += [(r, s.median, s.p10, s.p90, s.n, 1) for r, s in profile.held_out_steps.items()]
    return sorted(rows)


def _corun_rows(profile: Profile) -> list[tuple[Any, ...]]:
    return [
        (
            chunking,
            chunk,
            rows,
            cell.step.median,
            cell.chunk.median,
            cell.step.p10,
            cell.step.p90,
            cell.chunk.p10,
            cell.chunk.p90,
            min(cell.step.n, cell.chunk.n),
            int(cell.held_out),
        )
        for (chunking, chunk), cells in profile.corun.items()
        for rows, cell in sorted(cells.items())
    ]
