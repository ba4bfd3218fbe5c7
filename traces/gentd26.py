"""Turns GenTD26 (Alibaba cluster-trace-v2026-GenAI) into requests: its files as published, and the joined table.

The request file names no LoRAs, only their number. The last rows of the wider ``data_trace_processed.csv`` are the
same requests in the same order and name them by hash; here a hash becomes ``L0000``, ``L0001``, ... by how often
the wider file uses it (ties: which comes first).
"""

from __future__ import annotations

import ast
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from synerdiff.core import NS_PER_S, InputError, LoraUse, Request
from synerdiff.files import Progress, csv_rows, csv_rows_of, reading
from traces.columns import IMAGES, STEPS, FieldError, number, whole_number
from traces.native import Conversion, check_options

TEXT_TO_IMAGE = "TXT_2_IMG"
SKIPPED_TYPES = {"IMG_2_IMG": "image-to-image", "INPAINTING": "inpainting"}


def read_gentd26(
    path: Path,
    *,
    checkpoints: str = "one",
    adapters: str = "keep",
    all_types: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """The requests of GenTD26's own files, or of the table that joins them (see ``gentd26_rows``).

    Dropped and counted: image-to-image and inpainting rows (unless ``all_types``), and rows without parameters.
    Kept: failed, pending and processing rows, because what arrived was load, and exact duplicates (requests have no
    id, and those of the real file belong to one client that sends several equal requests at a time). Arrivals count
    from the file's first row, dropped or not, and keep its resolution of 1 s, ties in its order. ``checkpoints``
    "one" leaves base_model empty; ``adapters`` "drop" leaves the LoRAs out. guidance_scale is absent there: 7.5.
    """
    check_options(checkpoints, adapters)
    requests: list[Request] = []
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    rows = 0
    last_s = 0
    seen_at_instant: set[tuple[str, ...]] = set()
    for row in gentd26_rows(path, adapters == "keep", progress):
        rows += 1
        if row.arrival_s < last_s:
            raise InputError(f"{row.where}: the request arrives before the one ahead of it; the trace is sorted.")
        if row.arrival_s > last_s:
            seen_at_instant.clear()
        last_s = row.arrival_s
        reason = _reason_to_drop(row, all_types)
        if reason is not None:
            dropped[reason] += 1
            continue
        _note(noted, row, seen_at_instant)
        requests.append(
            Request(
                request_id=len(requests),
                arrival_ns=row.arrival_s * NS_PER_S,
                steps=_within(row, row.steps, "num_inference_steps", STEPS),
                images=_within(row, row.images, "num_images_per_prompt", IMAGES),
                base_model=row.checkpoint if checkpoints == "keep" else "",
                loras=row.loras,
            )
        )
    if not requests:
        raise InputError(f"{path}: of {rows} rows none can be replayed.")
    return Conversion(requests, rows, dict(dropped), dict(noted))


def _reason_to_drop(row: Gentd26Row, all_types: bool) -> str | None:
    if row.predict_type not in (known := (TEXT_TO_IMAGE, *SKIPPED_TYPES)):
        raise InputError(f"{row.where}: predict_type is {row.predict_type!r}; known are {', '.join(known)}.")
    if row.predict_type in SKIPPED_TYPES and not all_types:
        return SKIPPED_TYPES[row.predict_type]
    if row.steps is None or row.images is None:
        return "steps or images missing"
    return None


def _note(noted: Counter[str], row: Gentd26Row, seen_at_instant: set[tuple[str, ...]]) -> None:
    if row.status != "SUCCEED":
        noted[f"kept although {row.status.lower()}"] += 1
    if row.cells in seen_at_instant:
        noted["exact duplicates kept"] += 1
    seen_at_instant.add(row.cells)
    if row.predict_type in SKIPPED_TYPES:
        noted[f"{SKIPPED_TYPES[row.predict_type]} replayed as text-to-image"] += 1
    if row.lora_count and not row.loras:
        noted["stripped of their LoRAs"] += 1


def _within(row: Gentd26Row, value: int | None, column: str, allowed: tuple[int, int]) -> int:
    try:
        return whole_number(str(value), column, allowed)
    except FieldError as error:
        raise InputError(f"{row.where}: {error}.") from None


WHAT = "GenTD26 trace"
REQUEST_FILES = ("lora_request_trace.csv", "lora_request_trace.csv.gz")
WIDE_FILES = ("data_trace_processed.tar.gz", "data_trace_processed.csv", "data_trace_processed.csv.gz")
_WIDE_MEMBER = "data_trace_processed.csv"
_NEEDED = (
    "predict_type",
    "predict_status",
    "groupId",
    "num_images_per_prompt",
    "num_inference_steps",
    "checkpoint_model_version_id",
    "num_lora",
)
_MOST_LORAS = 1000
_SHARED = (
    "exec_time_seconds",
    "prompt_length",
    "negative_prompt_length",
    "num_images_per_prompt",
    "num_inference_steps",
)
"""Columns that both files have: rows that belong together agree in all of them."""


@dataclass(frozen=True, slots=True)
class Gentd26Row:
    """One row of the request file. ``steps`` and ``images`` are None where the file has no parameters."""

    where: str
    arrival_s: int
    predict_type: str
    status: str
    user: str
    steps: int | None
    images: int | None
    checkpoint: str
    lora_count: int
    loras: tuple[LoraUse, ...]
    """``name`` or ``name@scale``; empty when LoRAs were not asked for."""
    cells: tuple[str, ...]
    """The whole row, to tell exact duplicates."""


def gentd26_rows(path: Path, with_loras: bool, progress: Progress | None = None) -> Iterator[Gentd26Row]:
    """All rows in the file's order.

    ``path`` is the request file, the joined table (it has arrival_s and lora_ids), or a folder that holds the request
    file. With ``with_loras`` the request file needs ``data_trace_processed`` (as published or unpacked) beside it.
    """
    path = _request_file(path)
    rows = csv_rows(path, WHAT, progress)
    header = next(rows, (0, list[str]()))[1]
    _check_header(path, header, _NEEDED)
    joined = "lora_ids" in header
    if not joined:
        _check_header(path, header, ("gmt_create", *_SHARED))
    names: Iterator[tuple[LoraUse, ...]] | None = None
    if with_loras and not joined:
        wanted = [(line, dict(zip(header, cells, strict=True))) for line, cells in csv_rows(path, WHAT)][1:]
        names = iter(_joined_loras(path, wanted))
    start: datetime | None = None
    for line, cells in rows:
        where = f"{path}, line {line}"
        row = dict(zip(header, cells, strict=True))
        if "arrival_s" in row:
            arrival_s = _integer(where, row, "arrival_s", 2**40)
        else:
            moment = _moment(where, row["gmt_create"])
            start = start or moment
            arrival_s = round((moment - start).total_seconds())
        loras: tuple[LoraUse, ...] = ()
        if with_loras:
            loras = _loras_of_table(where, row) if names is None else next(names)
        yield Gentd26Row(
            where=where,
            arrival_s=arrival_s,
            predict_type=row["predict_type"],
            status=row["predict_status"],
            user=row["groupId"],
            steps=_optional(where, row, "num_inference_steps"),
            images=_optional(where, row, "num_images_per_prompt"),
            checkpoint=row["checkpoint_model_version_id"],
            lora_count=_integer(where, row, "num_lora", _MOST_LORAS),
            loras=loras,
            cells=tuple(cells),
        )


def _request_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in REQUEST_FILES:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: this folder holds neither {REQUEST_FILES[0]} nor {REQUEST_FILES[1]}.")


def _check_header(path: Path, header: list[str], needed: tuple[str, ...]) -> None:
    for column in needed:
        if column not in header:
            raise InputError(f"{path}, line 1: the column {column!r} is missing, so this is not a {WHAT}.")


def _moment(where: str, text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S")
    except ValueError:
        raise InputError(f"{where}: gmt_create is {text!r}; a time like 2024-11-15 16:57:50 is needed.") from None


def _integer(where: str, row: Mapping[str, str], column: str, most: int) -> int:
    """A whole number that may be written as a float (30.0)."""
    try:
        value = number(row[column], column, (0, most))
        if not value.is_integer():
            raise FieldError(f"{column} is {row[column]!r}; a whole number is needed")
    except FieldError as error:
        raise InputError(f"{where}: {error}.") from None
    return int(value)


def _optional(where: str, row: Mapping[str, str], column: str) -> int | None:
    return _integer(where, row, column, 2**31) if row[column].strip() else None


def _loras_of_table(where: str, row: Mapping[str, str]) -> tuple[LoraUse, ...]:
    ids, scales = row["lora_ids"], row.get("lora_scales", "")
    if not ids:
        return ()
    split_ids, split_scales = ids.split("|"), scales.split("|")
    if len(split_ids) != len(split_scales):
        raise InputError(f"{where}: lora_ids names {len(split_ids)} LoRAs and lora_scales {len(split_scales)} scales.")
    try:
        scaled = [number(scale, "lora_scales", (0, 1000)) for scale in split_scales]
    except FieldError as error:
        raise InputError(f"{where}: {error}.") from None
    return _each_once(list(zip(split_ids, scaled, strict=True)))


def _each_once(loras: Sequence[tuple[str, float]]) -> tuple[LoraUse, ...]:
    """The first mention of a LoRA counts: a request merges none twice."""
    first = dict(reversed(loras))
    return tuple([LoraUse(name, first[name]) for name in dict.fromkeys(name for name, _ in loras)])


def _joined_loras(path: Path, wanted: list[tuple[int, dict[str, str]]]) -> list[tuple[LoraUse, ...]]:
    """The LoRAs of every row of the request file, from the last rows of the wider one."""
    wide = next((path.parent / name for name in WIDE_FILES if (path.parent / name).is_file()), None)
    if wide is None:
        raise InputError(
            f"{path}: the LoRA names are in {WIDE_FILES[0]}, which is not beside it; "
            "put it there or leave the LoRAs out with --adapters drop."
        )
    tail: deque[tuple[int, dict[str, str], list[tuple[str, float]]]] = deque(maxlen=len(wanted))
    uses: Counter[str] = Counter()
    with _wide_rows(wide) as rows:
        header = next(rows, (0, list[str]()))[1]
        _check_header(wide, header, ("lora_args", *_SHARED))
        for line, cells in rows:
            row = dict(zip(header, cells, strict=True))
            loras = _lora_args(f"{wide}, line {line}", row["lora_args"])
            uses.update(key for key, _ in loras)
            tail.append((line, row, loras))
    if len(tail) < len(wanted):
        raise InputError(f"{wide}: it has {len(tail)} rows, fewer than the {len(wanted)} of {path}.")
    names = {key: f"L{rank:04d}" for rank, (key, _) in enumerate(uses.most_common())}
    per_request = []
    for (line, row), (wide_line, wide_row, loras) in zip(wanted, tail, strict=True):
        same = all(row[column] == wide_row[column] for column in _SHARED)
        if not same or _integer(f"{path}, line {line}", row, "num_lora", _MOST_LORAS) != len(loras):
            raise InputError(f"{wide}, line {wide_line}: this is not the request of {path}, line {line}.")
        per_request.append(_each_once([(names[key], scale) for key, scale in loras]))
    return per_request


@contextmanager
def _wide_rows(wide: Path) -> Iterator[Iterator[tuple[int, list[str]]]]:
    if not wide.name.endswith(".tar.gz"):
        yield csv_rows(wide, WHAT)
        return
    with reading(wide, WHAT), tarfile.open(wide, "r:gz") as archive:
        # A Mac packed the archive: it also holds "._data_trace_processed.csv", which is no table.
        members = [member for member in archive if Path(member.name).name == _WIDE_MEMBER and member.isfile()]
        stream = archive.extractfile(members[0]) if members else None
        if stream is None:
            raise InputError(f"{wide}: the archive does not hold {_WIDE_MEMBER}.")
        yield csv_rows_of(stream, wide, WHAT)


def _lora_args(where: str, text: str) -> list[tuple[str, float]]:
    """``[{'modelVersionId': hash, 'scale': 0.8}, ...]`` as (hash, scale)."""
    if text == "[]":
        return []
    try:
        parsed: Any = ast.literal_eval(text)
        return [(str(entry["modelVersionId"]), float(entry["scale"])) for entry in parsed]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        raise InputError(f"{where}: lora_args is not a list of modelVersionId and scale.") from None
