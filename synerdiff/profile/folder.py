"""Reads and writes a profile's folder: ``profile.yaml`` beside CSV tables (``docs/file-formats.md``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from synerdiff.core import PPM, InputError
from synerdiff.files import Row, read_rows, read_yaml, sha256_of_files, shown, sides_of, write_rows, write_yaml
from synerdiff.profile.tables import (
    MOST_DEGREE,
    OVERHEADS,
    Corun,
    Head,
    Profile,
    Size,
    Spread,
    pixels_of,
)
from synerdiff.schema import Section, validated

SCHEMA_VERSION, SIZED_SCHEMA_VERSION = 1, 2
"""The second: of a profile with several resolutions."""
_NS_COLUMNS = ("median_ns", "p10_ns", "p90_ns", "n")
_PPM_COLUMNS = ("step_p10_ppm", "step_p90_ppm", "chunk_p10_ppm", "chunk_p90_ppm")
COLUMNS = {
    "steps": ("rows", *_NS_COLUMNS, "held_out"),
    "chunks": ("chunking", "chunk", *_NS_COLUMNS),
    "corun": ("chunking", "chunk", "rows", "step_slowdown_ppm", "chunk_slowdown_ppm", *_PPM_COLUMNS, "n", "held_out"),
    "overheads": ("name", *_NS_COLUMNS),
    "degrees": ("resolution", "degree", "rows", *_NS_COLUMNS),
}
"""By table."""
SIZED = {
    "steps": ("resolution", "tokens"),
    "chunks": ("resolution",),
    "corun": ("step_resolution", "chunk_resolution", "tokens"),
}
"""What stands before the columns of a table of several resolutions."""
STEP_LAUNCH = "step_launch"
"""The overhead that `Profile.step_launch` holds: one by rows."""
DEGREES_FILE = "degrees.csv"
SHIPPED = Path(__file__).resolve().parents[2] / "profiler" / "profiles"
PROVENANCES = ("measured", "imported", "estimated")
_OWN = ("schema_version", "name", "provenance", "row_buckets")
"""Fields of profile.yaml that are not of the head."""
_MOST_ROWS, _MOST_CHUNKS = 100_000, 10_000
_MOST_NS = 10**15


def shipped_profiles() -> list[str]:
    """Names of the profiles that ship with synerdiff."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/profile.yaml"))


def is_profile(folder: Path) -> bool:
    """Whether the folder holds a profile."""
    return (folder / "profile.yaml").is_file()


def find_profile(name_or_folder: str, base: Path | None = None) -> Path:
    """The folder of a profile: a path (also relative to ``base``), else the name of a shipped one."""
    candidates = [*([] if base is None else [base / name_or_folder]), Path(name_or_folder)]
    shipped = shipped_profiles()
    for folder in [*candidates, *([SHIPPED / name_or_folder] if name_or_folder in shipped else [])]:
        if is_profile(folder):
            return folder
    if any(folder.exists() for folder in candidates):
        raise InputError(f"{name_or_folder}: this folder holds no profile.yaml, so it is not a profile.")
    raise InputError(
        f"{name_or_folder}: there is no such profile folder, and the shipped profiles are {', '.join(shipped)}."
    )


def load_profile(folder: Path) -> Profile:
    """Read and check a profile; InputError names file, line and column of what is wrong."""
    head_path = folder / "profile.yaml"
    head = read_yaml(head_path, "profile")
    version = head.get("schema_version")
    if type(version) is not int or version not in (SCHEMA_VERSION, SIZED_SCHEMA_VERSION):
        raise InputError(
            f"{head_path}: schema_version is {version!r}; this version of synerdiff reads {SCHEMA_VERSION} and "
            f"{SIZED_SCHEMA_VERSION}."
        )
    provenance = head.get("provenance")
    if provenance not in PROVENANCES:
        raise InputError(f"{head_path}: provenance is {provenance!r}; allowed are {', '.join(PROVENANCES)}.")
    name = _name(head_path, head.get("name", folder.resolve().name))
    overheads, launches = _read_overheads(folder / "overheads.csv")
    degrees = _read_degrees(folder / DEGREES_FILE)
    sized = version == SIZED_SCHEMA_VERSION
    steps_of, chunks_of = _by_size(folder, "steps", sized), _by_size(folder, "chunks", sized)
    sizes = list(steps_of)
    facts = head_of(
        {**head, "resolutions": [list(size) for size in sizes if size is not None]} if sized else head, str(head_path)
    )
    for size in {*chunks_of} ^ {*sizes}:
        raise InputError(f"{folder}: steps.csv and chunks.csv must have the same resolutions; {_text(size)} is in one.")
    chunks = {size: _read_chunks(folder / "chunks.csv", rows) for size, rows in chunks_of.items()}
    for size in sizes[1:]:
        if _lengths(chunks[size]) != _lengths(chunks[sizes[0]]):
            raise InputError(
                f"{folder / 'chunks.csv'}: {_text(size)} has other chunkings than {_text(sizes[0])}; a chunking has "
                "equally many chunks at every resolution."
            )
    _require_cuts(head_path, facts.cuts, _lengths(chunks[sizes[0]]))
    corun = _read_corun(folder / "corun.csv", chunks[sizes[0]], sizes if sized else None)
    profiles: dict[Size | None, Profile] = {}
    for size, rows in steps_of.items():
        steps, held_out, tokens = _read_steps(folder / "steps.csv", rows, sized)
        profiles[size] = Profile(
            name=name,
            provenance=provenance,
            row_buckets=_row_buckets(head_path, head, steps, size),
            steps=steps,
            chunks=chunks[size],
            corun=corun.pop((size, size), {}),
            overheads=overheads,
            step_launch=launches,
            degrees=degrees.get(size or facts.size, {}),
            held_out_steps=held_out,
            tokens=tokens,
            head=facts if size is None else facts.model_copy(update={"resolutions": (size,)}),
            content_hash=profile_hash(folder),
        )
    first = profiles.pop(sizes[0])
    others = {size: profile for size, profile in profiles.items() if size is not None}
    across = {(u, v): cells for (u, v), cells in corun.items() if u is not None and v is not None}
    return replace(first, head=facts, others=others, across=across) if others else first


def combined(profiles: Sequence[Profile], name: str) -> Profile:
    """One profile of the resolutions of several, the first one first; overheads and the head are the first's.

    How they contend with each other is left to solo times (contract: slowdowns across resolutions). InputError for
    profiles of other models, other chunkings or cuts, several resolutions, and a resolution that two have.
    """
    first = profiles[0]
    own: dict[Size, Profile] = {}
    for profile in profiles:
        size = profile.head.size
        if size is None or profile.others:
            what = "does not name its resolution" if size is None else "has several resolutions already"
            raise InputError(f"profile '{profile.name}' {what}, so it cannot be combined with others.")
        if size in own:
            raise InputError(f"profiles '{own[size].name}' and '{profile.name}' are both of {pixels_of(size)}.")
        if profile.head.model != first.head.model or profile.head.device != first.head.device:
            raise InputError(f"profiles '{first.name}' and '{profile.name}' are not of one model on one device.")
        if _lengths(profile.chunks) != _lengths(first.chunks):
            raise InputError(
                f"profiles '{first.name}' and '{profile.name}' cut decodes differently; a chunking has equally many "
                "chunks at every resolution."
            )
        other = next((name for name, cuts in first.head.cuts.items() if profile.head.cuts.get(name) != cuts), None)
        if other is not None:
            raise InputError(
                f"profiles '{first.name}' and '{profile.name}' cut decodes at other layers ({other}); synerdiff "
                "profile --resolution A,B measures both with the same cuts."
            )
        own[size] = profile
    same: dict[str, Any] = {"name": name, "overheads": first.overheads, "step_launch": first.step_launch}
    same["provenance"] = max((profile.provenance for profile in profiles), key=PROVENANCES.index)
    others = {size: replace(profile, **same) for size, profile in own.items() if profile is not first}
    head = first.head.model_copy(update={"resolutions": tuple(own)})
    return replace(first, **same, head=head, others=others)


def _lengths(chunks: Mapping[str, Sequence[Spread]]) -> dict[str, int]:
    return {name: len(cut) for name, cut in chunks.items()}


def _text(size: Size | None) -> str:
    return "none" if size is None else pixels_of(size)


def _columns(table: str, sized: bool) -> tuple[str, ...]:
    return (*SIZED[table], *COLUMNS[table]) if sized else COLUMNS[table]


def _by_size(folder: Path, table: str, sized: bool) -> dict[Size | None, list[Row]]:
    """The rows of a table by resolution, in the order of the file; of schema version 1 all of None."""
    by_size: dict[Size | None, list[Row]] = {}
    for row in read_rows(folder / f"{table}.csv", _columns(table, sized), "profile table"):
        by_size.setdefault(_size(row, "resolution") if sized else None, []).append(row)
    return by_size or {None: []}


def _size(row: Row, column: str) -> Size:
    """``HxW`` in pixels."""
    if (sides := sides_of(row.text(column))) is None:
        raise row.error(column, f"is {shown(repr(row.text(column)))}; HEIGHTxWIDTH in pixels is needed, as 768x1024")
    return sides


def head_of(fields: Mapping[str, Any], where: str) -> Head:
    """The head in the fields of profile.yaml; what it does not know is a note. InputError names the field."""
    known = {name for name in Head.model_fields if name not in ("resolutions", "notes")}
    own = (*known, *_OWN, "resolution", "resolutions")
    head = {name: value for name, value in fields.items() if name in known}
    head["notes"] = {name: value for name, value in fields.items() if name not in own}
    if "resolutions" in fields:
        head["resolutions"] = fields["resolutions"]
    elif "resolution" in fields:
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
            for height, width in value if len(value) == 1 else ():
                fields["resolution"] = height if height == width else [height, width]
        elif name != "notes" and value not in (None, "", {}, ()):
            fields[name] = value
            if name == "cuts":
                fields[name] = {cut: list(places) for cut, places in value.items()}
            elif name == "levers":
                fields[name] = list(value)
            elif isinstance(value, Section):
                fields[name] = value.model_dump(exclude_defaults=True)
    return {**fields, **head.notes}


def _require_cuts(path: Path, cuts: Mapping[str, tuple[int, ...]], lengths: Mapping[str, int]) -> None:
    for name, places in cuts.items():
        if name not in lengths:
            raise InputError(f"{path}: cuts names the chunking {shown(name)}; chunks.csv has {', '.join(lengths)}.")
        if list(places) != sorted(set(places)) or len(places) != lengths[name] - 1:
            raise InputError(
                f"{path}: cuts of {name} are {shown([*places])}; for {lengths[name]} chunks {lengths[name] - 1} rising "
                "places are needed."
            )


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
    names = ("profile.yaml", "steps.csv", "chunks.csv", "corun.csv", "overheads.csv", DEGREES_FILE, "adapters.csv")
    return sha256_of_files([folder / name for name in names if (folder / name).is_file()])


def _row_buckets(
    path: Path, head: Mapping[str, Any], steps: Mapping[int, Spread], size: Size | None
) -> tuple[int, ...] | None:
    if "row_buckets" not in head:
        raise InputError(f"{path}: row_buckets is missing; give a list of rows, or null for eager execution.")
    buckets = head["row_buckets"]
    if size is not None and buckets is not None:
        if not isinstance(buckets, dict) or pixels_of(size) not in buckets:
            raise InputError(
                f"{path}: row_buckets must map each resolution (HEIGHTxWIDTH) to its rows; it lacks {pixels_of(size)}."
            )
        buckets = buckets[pixels_of(size)]
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


def _spread(row: Row, columns: Sequence[str] = _NS_COLUMNS[:3], low: int = 1, high: int = _MOST_NS) -> Spread:
    """Median, p10 and p90 in their order, and n; InputError names the line. In nanoseconds at most 12 days."""
    median = row.integer(columns[0], low, high)
    p10, p90 = (row.integer(column, min(low, 1), high) for column in columns[1:])
    if not p10 <= median <= p90:
        raise row.error(columns[0], f"is {median}, outside its own p10-p90 range {p10}-{p90}")
    return Spread(median, p10, p90, row.integer("n"))


def _slowdown(row: Row, side: str) -> Spread:
    """Of a step or a chunk, ppm. A median from 20 times faster than alone to 1,000 times slower: beyond any machine."""
    return _spread(row, (f"{side}_slowdown_ppm", f"{side}_p10_ppm", f"{side}_p90_ppm"), PPM // 20, 1000 * PPM)


def _read_steps(
    path: Path, table: Sequence[Row], sized: bool
) -> tuple[dict[int, Spread], dict[int, Spread], dict[int, int]]:
    """Times by rows, those held out, and tokens by rows, where they are given."""
    known: dict[int, Spread] = {}
    held_out: dict[int, Spread] = {}
    tokens: dict[int, int] = {}
    for row in table:
        rows = row.integer("rows", 1, _MOST_ROWS)
        if rows in known or rows in held_out:
            raise row.error("rows", f"{rows} is given twice")
        spread = _spread(row)
        (held_out if row.flag("held_out") else known)[rows] = spread
        if sized and row.text("tokens"):
            tokens[rows] = row.integer("tokens", 1, 10**12)
    if not known:
        raise InputError(f"{path}: no step times are given.")
    return dict(sorted(known.items())), held_out, tokens


def _read_chunks(path: Path, table: Sequence[Row]) -> dict[str, tuple[Spread, ...]]:
    chunkings: dict[str, dict[int, Spread]] = {}
    for row in table:
        chunking, chunk = row.name("chunking"), row.integer("chunk", 0, _MOST_CHUNKS)
        cells = chunkings.setdefault(chunking, {})
        if chunk in cells:
            raise row.error("chunk", f"{chunk} of '{chunking}' is given twice")
        cells[chunk] = _spread(row)
    if "whole" not in chunkings:
        raise InputError(f"{path}: the chunking 'whole' is missing.")
    for chunking, cells in chunkings.items():
        if (found := sorted(cells)) != list(range(len(cells))):
            raise InputError(f"{path}: the chunks of '{chunking}' must count from 0 without gaps; found {found}.")
    if (count := len(chunkings["whole"])) != 1:
        raise InputError(f"{path}: the chunking 'whole' has {count} chunks; it has exactly one, chunk 0.")
    return {chunking: tuple(cells[i] for i in range(len(cells))) for chunking, cells in chunkings.items()}


def _read_corun(
    path: Path, chunks: Mapping[str, Sequence[Spread]], sizes: Sequence[Size | None] | None
) -> dict[tuple[Size | None, Size | None], dict[tuple[str, int], dict[int, Corun]]]:
    """By (resolution of the step, of the chunk); without ``sizes`` (schema version 1) all of (None, None)."""
    pairs: dict[tuple[Size | None, Size | None], dict[tuple[str, int], dict[int, Corun]]] = {}
    for row in read_rows(path, _columns("corun", bool(sizes)), "profile table"):
        pair: tuple[Size | None, Size | None] = (None, None)
        if sizes:
            pair = (_size(row, "step_resolution"), _size(row, "chunk_resolution"))
            for size, column in zip(pair, ("step_resolution", "chunk_resolution"), strict=True):
                if size not in sizes:
                    raise row.error(
                        column, f"{_text(size)} is not in steps.csv, which has {', '.join(map(_text, sizes))}"
                    )
        chunking, chunk = row.name("chunking"), row.integer("chunk", 0, _MOST_CHUNKS)
        rows = row.integer("rows", 1, _MOST_ROWS)
        if chunking not in chunks or chunk >= len(chunks[chunking]):
            raise row.error("chunk", f"{chunk} of '{chunking}' is not in chunks.csv")
        cells = pairs.setdefault(pair, {}).setdefault((chunking, chunk), {})
        if rows in cells:
            raise row.error("rows", f"{rows} is given twice for chunk {chunk} of '{chunking}'")
        cells[rows] = Corun(_slowdown(row, "step"), _slowdown(row, "chunk"), row.flag("held_out"))
    return pairs


def _read_overheads(path: Path) -> tuple[dict[str, Spread], dict[int, Spread]]:
    """By name; and step_launch by rows, the only one that has them."""
    overheads: dict[str, Spread] = {}
    launches: dict[int, Spread] = {}
    for row in read_rows(path, COLUMNS["overheads"], "profile table", optional=("rows",)):
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
        if name in overheads:
            raise row.error("name", f"{name} is given twice")
        overheads[name] = _spread(row, low=0)
    return overheads, launches


def _read_degrees(path: Path) -> dict[Size | None, dict[int, dict[int, Spread]]]:
    """Resolution -> degree -> rows -> time of a step on so many GPUs; empty where there is no such file."""
    degrees: dict[Size | None, dict[int, dict[int, Spread]]] = {}
    if not path.is_file():
        return degrees
    for row in read_rows(path, COLUMNS["degrees"], "profile table"):
        size = _size(row, "resolution") if row.text("resolution") else None
        cells = degrees.setdefault(size, {}).setdefault(row.integer("degree", 2, MOST_DEGREE), {})
        rows = row.integer("rows", 1, _MOST_ROWS)
        if rows in cells:
            raise row.error("rows", f"{rows} is given twice for degree {row.text('degree')}")
        cells[rows] = _spread(row)
    return degrees


def _require_readable(profile: Profile) -> None:
    chunks = {f"a chunk of {name}": spread for name, cut in profile.chunks.items() for spread in cut}
    steps = {f"a step of {rows} rows": spread for rows, spread in profile.steps.items()}
    for what, spread in {**chunks, **steps}.items():
        if spread.median > _MOST_NS:
            raise InputError(
                f"{what} takes {spread.median / 1e9:.4g} s; a profile holds at most {_MOST_NS / 1e9:,.0f} s."
            )


def write_profile(folder: Path, profile: Profile) -> None:
    """Write all tables of a profile; its head becomes profile.yaml. InputError for a time that no reader takes."""
    for one in (profile, *profile.others.values()):
        _require_readable(one)
    sizes = profile.sizes
    tables: Mapping[Any, Profile] = sizes or {None: profile}
    buckets = {size: None if one.row_buckets is None else list(one.row_buckets) for size, one in tables.items()}
    named = {pixels_of(size): buckets[size] for size in sizes}
    own = {
        "schema_version": SIZED_SCHEMA_VERSION if sizes else SCHEMA_VERSION,
        "name": profile.name,
        "provenance": profile.provenance,
        "row_buckets": named if any(named.values()) else next(iter(buckets.values())),
    }

    def at(*places: Any, rows: int | None = None) -> tuple[Any, ...]:
        """How a line begins: of several resolutions with its own, and with the tokens of its rows."""
        if not sizes:
            return ()
        return (*map(pixels_of, places), *(() if rows is None else (sizes[places[0]].tokens.get(rows, ""),)))

    steps = []
    for size, one in tables.items():
        rows = [(r, *s, 0) for r, s in one.steps.items()] + [(r, *s, 1) for r, s in one.held_out_steps.items()]
        steps += [(*at(size, rows=row[0]), *row) for row in sorted(rows)]
    write_rows(folder / "steps.csv", _columns("steps", bool(sizes)), steps)
    chunks = [
        (*at(size), chunking, i, *spread)
        for size, one in tables.items()
        for chunking, spreads in one.chunks.items()
        for i, spread in enumerate(spreads)
    ]
    write_rows(folder / "chunks.csv", _columns("chunks", bool(sizes)), chunks)
    pairs = {(size, size): one.corun for size, one in tables.items()} | dict(profile.across)
    corun = [
        (*at(*pair, rows=r), *key, r, u.median, v.median, u.p10, u.p90, v.p10, v.p90, min(u.n, v.n), int(cell.held_out))
        for pair, by_chunk in pairs.items()
        for key, cells in by_chunk.items()
        for r, cell in sorted(cells.items())
        for u, v in [(cell.step, cell.chunk)]
    ]
    write_rows(folder / "corun.csv", _columns("corun", bool(sizes)), corun)
    overheads: list[tuple[Any, ...]] = [(name, *spread, "") for name, spread in profile.overheads.items()]
    overheads += [(STEP_LAUNCH, *spread, rows) for rows, spread in sorted(profile.step_launch.items())]
    write_rows(folder / "overheads.csv", (*COLUMNS["overheads"], "rows"), overheads)
    degrees = [
        (pixels_of(one.head.size) if one.head.size else "", degree, rows, *spread)
        for one in tables.values()
        for degree, cells in sorted(one.degrees.items())
        for rows, spread in sorted(cells.items())
    ]
    if degrees:
        write_rows(folder / DEGREES_FILE, COLUMNS["degrees"], degrees)
    write_yaml(folder / "profile.yaml", {**own, **fields_of(profile.head)})
