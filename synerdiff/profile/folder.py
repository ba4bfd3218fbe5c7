"""Reads and writes a profile's folder: ``profile.yaml`` beside CSV tables (``docs/file-formats.md``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synerdiff.core import PPM, InputError
from synerdiff.files import Row, read_rows, read_yaml, sha256_of_files, shown, write_rows, write_yaml
from synerdiff.profile.tables import (
    CHUNK_COLUMNS,
    CORUN_COLUMNS,
    OVERHEAD_COLUMNS,
    OVERHEADS,
    SCHEMA_VERSION,
    STEP_COLUMNS,
    STEP_LAUNCH,
    Corun,
    Head,
    Profile,
    Spread,
)
from synerdiff.schema import validated

SHIPPED = Path(__file__).resolve().parents[2] / "profiler" / "profiles"
PROVENANCES = ("measured", "imported", "estimated")
_OWN = ("schema_version", "name", "provenance", "row_buckets")
"""Fields of profile.yaml that are not of the head."""
_MOST_ROWS, _MOST_CHUNKS = 100_000, 10_000


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
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(
            f"{head_path}: schema_version is {version!r}; this version of synerdiff reads {SCHEMA_VERSION}."
        )
    provenance = head.get("provenance")
    if provenance not in PROVENANCES:
        raise InputError(f"{head_path}: provenance is {provenance!r}; allowed are {', '.join(PROVENANCES)}.")
    steps, held_out = _read_steps(folder / "steps.csv")
    chunks = _read_chunks(folder / "chunks.csv")
    overheads, launches = _read_overheads(folder / "overheads.csv")
    return Profile(
        name=_name(head_path, head.get("name", folder.resolve().name)),
        provenance=provenance,
        row_buckets=_row_buckets(head_path, head, steps),
        steps=steps,
        chunks=chunks,
        corun=_read_corun(folder / "corun.csv", chunks),
        overheads=overheads,
        step_launch=launches,
        held_out_steps=held_out,
        head=head_of(head, str(head_path)),
        content_hash=profile_hash(folder),
    )


def head_of(fields: Mapping[str, Any], where: str) -> Head:
    """The head in the fields of profile.yaml; what it does not know is a note. InputError names the field."""
    known = {name for name in Head.model_fields if name not in ("resolutions", "notes")}
    head = {name: value for name, value in fields.items() if name in known}
    head["notes"] = {name: value for name, value in fields.items() if name not in (*known, *_OWN, "resolution")}
    if "resolution" in fields:
        sides = fields["resolution"]
        square = isinstance(sides, int) and not isinstance(sides, bool)
        pair = [sides, sides] if square else sides
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and 8 <= n <= 16384 for n in pair)):
            allowed = "a side of 8 to 16384 pixels, or [height, width], is needed"
            raise InputError(f"{where}: resolution is {shown(repr(sides))}; {allowed}.")
        head["resolutions"] = [pair]
    return validated(Head, head, where)


def fields_of(head: Head) -> dict[str, Any]:
    """The head as profile.yaml holds it: what is empty is left out, notes come last."""
    fields: dict[str, Any] = {}
    for name in Head.model_fields:
        value = getattr(head, name)
        if name == "resolutions":
            for height, width in value:
                fields["resolution"] = height if height == width else [height, width]
        elif name == "cuts":
            fields |= {"cuts": {cut: list(places) for cut, places in value.items()}} if value else {}
        elif name != "notes" and value not in (None, "", {}):
            fields[name] = value
    return {**fields, **head.notes}


def _name(path: Path, name: Any) -> str:
    """A profile's name stands in tables, figures and file names."""
    if (
        isinstance(name, str)
        and 1 <= len(name.strip(" .")) <= 200
        and name.isprintable()
        and not set(name) & set("/\\")
    ):
        return name
    raise InputError(f"{path}: name is {shown(repr(name))}; a text of 1 to 200 characters without slashes is needed.")


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


def _spread(row: Row, columns: Sequence[str] = STEP_COLUMNS[1:4], low: int = 1, high: int = 10**15) -> Spread:
    """Median, p10 and p90 in their order, and n; InputError names the line. In nanoseconds at most 12 days."""
    median = row.integer(columns[0], low, high)
    p10, p90 = (row.integer(column, min(low, 1), high) for column in columns[1:])
    if not p10 <= median <= p90:
        raise row.error(columns[0], f"is {median}, outside its own p10-p90 range {p10}-{p90}")
    return Spread(median, p10, p90, row.integer("n"))


def _slowdown(row: Row, side: str) -> Spread:
    """Of a step or a chunk, ppm. A median from 20 times faster than alone to 1,000 times slower: beyond any machine."""
    return _spread(row, (f"{side}_slowdown_ppm", f"{side}_p10_ppm", f"{side}_p90_ppm"), PPM // 20, 1000 * PPM)


def _read_steps(path: Path) -> tuple[dict[int, Spread], dict[int, Spread]]:
    known: dict[int, Spread] = {}
    held_out: dict[int, Spread] = {}
    for row in read_rows(path, STEP_COLUMNS, "profile table"):
        rows = row.integer("rows", 1, _MOST_ROWS)
        if rows in known or rows in held_out:
            raise row.error("rows", f"{rows} is given twice")
        spread = _spread(row)
        (held_out if row.flag("held_out") else known)[rows] = spread
    if not known:
        raise InputError(f"{path}: no step times are given.")
    return dict(sorted(known.items())), held_out


def _read_chunks(path: Path) -> dict[str, tuple[Spread, ...]]:
    found: dict[str, dict[int, Spread]] = {}
    for row in read_rows(path, CHUNK_COLUMNS, "profile table"):
        chunking, chunk = row.name("chunking"), row.integer("chunk", 0, _MOST_CHUNKS)
        cells = found.setdefault(chunking, {})
        if chunk in cells:
            raise row.error("chunk", f"{chunk} of '{chunking}' is given twice")
        cells[chunk] = _spread(row)
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
    for row in read_rows(path, CORUN_COLUMNS, "profile table"):
        chunking, chunk, rows = (
            row.name("chunking"),
            row.integer("chunk", 0, _MOST_CHUNKS),
            row.integer("rows", 1, _MOST_ROWS),
        )
        if chunking not in chunks or chunk >= len(chunks[chunking]):
            raise row.error("chunk", f"{chunk} of '{chunking}' is not in chunks.csv")
        cells = found.setdefault((chunking, chunk), {})
        if rows in cells:
            raise row.error("rows", f"{rows} is given twice for chunk {chunk} of '{chunking}'")
        cells[rows] = Corun(
            step=_slowdown(row, "step"),
            chunk=_slowdown(row, "chunk"),
            held_out=row.flag("held_out"),
        )
    return found


def _read_overheads(path: Path) -> tuple[dict[str, Spread], dict[int, Spread]]:
    """By name; and step_launch by rows, the only one that has them."""
    found: dict[str, Spread] = {}
    launches: dict[int, Spread] = {}
    for row in read_rows(path, OVERHEAD_COLUMNS, "profile table", optional=("rows",)):
        name, rows = row.name("name"), row.text("rows")
        if name == STEP_LAUNCH:
            at = row.integer("rows", 1, _MOST_ROWS)
            if at in launches:
                raise row.error("rows", f"{at} is given twice for {STEP_LAUNCH}")
            launches[at] = _spread(row, low=0)
            continue
        if name not in OVERHEADS:
            raise row.error("name", f"is {name!r}; known are {', '.join((*OVERHEADS, STEP_LAUNCH))}")
        if rows:
            raise row.error("rows", f"is {rows!r}; only {STEP_LAUNCH} has rows, elsewhere it is empty")
        if name in found:
            raise row.error("name", f"{name} is given twice")
        found[name] = _spread(row, low=0)
    return found, launches


def write_profile(folder: Path, profile: Profile) -> None:
    """Write all tables of a profile; its head becomes profile.yaml."""
    own = {
        "schema_version": SCHEMA_VERSION,
        "name": profile.name,
        "provenance": profile.provenance,
        "row_buckets": None if profile.row_buckets is None else list(profile.row_buckets),
    }
    write_rows(folder / "steps.csv", STEP_COLUMNS, _step_rows(profile))
    chunk_rows = [
        (chunking, i, s.median, s.p10, s.p90, s.n)
        for chunking, spreads in profile.chunks.items()
        for i, s in enumerate(spreads)
    ]
    write_rows(folder / "chunks.csv", CHUNK_COLUMNS, chunk_rows)
    write_rows(folder / "corun.csv", CORUN_COLUMNS, _corun_rows(profile))
    overheads: list[tuple[Any, ...]] = [(k, s.median, s.p10, s.p90, s.n, "") for k, s in profile.overheads.items()]
    overheads += [(STEP_LAUNCH, s.median, s.p10, s.p90, s.n, rows) for rows, s in sorted(profile.step_launch.items())]
    write_rows(folder / "overheads.csv", (*OVERHEAD_COLUMNS, "rows"), overheads)
    write_yaml(folder / "profile.yaml", {**own, **fields_of(profile.head)})


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
