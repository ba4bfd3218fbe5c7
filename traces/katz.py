"""Turns the trace that was published with Katz (diffusion_model_request_trace.json) into requests."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

from synerdiff.core import NS_PER_S, ControlNetUse, InputError, LoraUse, Request, controlnets_from, loras_from
from synerdiff.files import Progress, reading
from traces.columns import (
    GUIDANCE_SCALE,
    IMAGES,
    LIST_SEPARATOR,
    MAX_ARRIVAL_S,
    STEPS,
    FieldError,
    number,
    whole_number,
)
from traces.native import Conversion, check_options

WHAT = "Katz trace"
FIELDS = ("timestamp", "scene_id", "base_model_id", "controlnets", "loras")
SERVICES = ("A", "B")
_CHARACTERS_PER_READ = 1 << 20
_LONGEST_ENTRY = 1 << 20
_MILLISECONDS_FROM = 10**11
"""A number this large counts milliseconds: as seconds since 1970 it would lie beyond the year 5000."""


def read_katz(
    path: Path,
    *,
    service: str | None = None,
    steps: int = 50,
    images: int = 1,
    guidance_scale: float = 7.5,
    checkpoints: str = "one",
    adapters: str = "keep",
    progress: Progress | None = None,
) -> Conversion:
    """The requests of the JSON list, sorted by timestamp (ties in the file's order) and counted from the first.

    The file knows no steps, images or guidance: every request gets the ones given (Katz was measured with 50 guided
    steps and one image). ``service`` "A" or "B" keeps one of the two services. A null among controlnets or loras is
    left out and counted. A timestamp is a number (seconds, or milliseconds from 10^11 on) or an ISO 8601 text, UTC
    unless it says otherwise.
    """
    check_options(checkpoints, adapters)
    _check_mix(steps, images, guidance_scale)
    entries: list[tuple[int, str, tuple[LoraUse, ...], tuple[ControlNetUse, ...]]] = []
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    rows = 0
    for rows, entry in enumerate(_entries(path, progress), 1):
        where = f"{path}, entry {rows}"
        _check_entry(where, entry)
        if service is not None and entry["scene_id"] != service:
            dropped["of the other service"] += 1
            continue
        moment_ns = _moment_ns(where, entry["timestamp"])
        base_model = _identifier(where, "base_model_id", entry["base_model_id"])
        if base_model is None:
            noted["without a base model"] += 1
        named = [_identifiers(where, field, entry[field], noted) for field in ("controlnets", "loras")]
        try:
            controlnets, loras = controlnets_from(named[0]), loras_from(named[1])
        except InputError as error:
            raise InputError(f"{where}: {error}.") from None
        if adapters == "drop":
            if loras or controlnets:
                noted["stripped of their LoRAs and ControlNets"] += 1
            controlnets, loras = (), ()
        entries.append((moment_ns, (base_model or "") if checkpoints == "keep" else "", loras, controlnets))
    if not entries:
        raise InputError(f"{path}: the trace holds no requests{'' if service is None else f' of service {service}'}.")
    if any(after[0] < before[0] for before, after in pairwise(entries)):
        noted["sorted by timestamp, the file was not"] = len(entries)
    entries.sort(key=lambda entry: entry[0])
    start_ns = entries[0][0]
    if entries[-1][0] - start_ns > MAX_ARRIVAL_S * NS_PER_S:
        raise InputError(f"{path}: first and last timestamp lie more than {MAX_ARRIVAL_S} s apart.")
    asked = Request(0, 0, steps, images, guidance_scale)
    requests = [
        replace(asked, request_id=i, arrival_ns=at_ns - start_ns, base_model=model, loras=loras, controlnets=nets)
        for i, (at_ns, model, loras, nets) in enumerate(entries)
    ]
    return Conversion(requests, rows, dict(dropped), dict(noted))


def _check_mix(steps: int, images: int, guidance_scale: float) -> None:
    try:
        whole_number(str(steps), "steps", STEPS)
        whole_number(str(images), "images", IMAGES)
        number(str(guidance_scale), "guidance_scale", GUIDANCE_SCALE)
    except FieldError as error:
        raise InputError(f"{error}.") from None


def _entries(path: Path, progress: Progress | None) -> Iterator[Any]:
    """The elements of a JSON array, one at a time: the file is never in memory as a whole."""
    decoder = json.JSONDecoder(parse_float=Decimal)  # a time since 1970 in binary is off by 100 ns
    with reading(path, WHAT), path.open("r", encoding="utf-8-sig") as file:
        total = path.stat().st_size
        done = 0
        buffer = file.read(_CHARACTERS_PER_READ).lstrip()
        if not buffer.startswith("["):
            raise InputError(f"{path}: a {WHAT} is a JSON list of objects; this file does not start with one.")
        buffer = buffer[1:]
        position, count, ended = 0, 0, False
        while True:
            position = _skip_space(buffer, position)
            if buffer.startswith("]", position):
                if (buffer[position + 1 :] + file.read(_CHARACTERS_PER_READ)).strip():
                    raise InputError(f"{path}: something follows the JSON list.")
                return
            start = position
            if count and buffer.startswith(",", start):
                start = _skip_space(buffer, start + 1)
            comma_missing = bool(count) and not buffer.startswith(",", position)
            try:
                entry, end = decoder.raw_decode(buffer, start)
                complete = ended or end < len(buffer)  # a number at the very end may go on
            except (ValueError, RecursionError):  # a number of thousands of digits is a plain ValueError
                complete = False
            if complete and not comma_missing:
                count += 1
                position = end
                yield entry
                continue
            if ended or (comma_missing and position < len(buffer)) or len(buffer) - position > _LONGEST_ENTRY:
                raise InputError(f"{path}, entry {count + 1}: the JSON is cut short or damaged there.")
            piece = file.read(_CHARACTERS_PER_READ)
            ended = not piece
            done += len(piece)
            if progress is not None:
                progress(min(done, total), total)
            buffer, position = buffer[position:] + piece, 0


def _skip_space(buffer: str, position: int) -> int:
    while position < len(buffer) and buffer[position] in " \t\r\n":
        position += 1
    return position


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: a {type(entry).__name__} where an object is needed.")
    for field in FIELDS:
        if field not in entry:
            raise InputError(f"{where}: the field {field!r} is missing; a {WHAT} has {', '.join(FIELDS)}.")
    if entry["scene_id"] not in SERVICES:
        raise InputError(f"{where}: scene_id is {entry['scene_id']!r}; allowed are {' and '.join(SERVICES)}.")


def _moment_ns(where: str, value: Any) -> int:
    shown = str(value) if isinstance(value, Decimal) else repr(value)
    problem = f"{where}: timestamp is {shown}; a number or an ISO 8601 time is needed."
    if isinstance(value, bool):
        raise InputError(problem)
    if isinstance(value, int | float | Decimal):
        if not math.isfinite(value) or not 0 <= value < 10**15:
            raise InputError(problem)
        unit_ns = 10**6 if value >= _MILLISECONDS_FROM else NS_PER_S
        return round(value * unit_ns)
    if not isinstance(value, str):
        raise InputError(problem)
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise InputError(problem) from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * NS_PER_S + since.microseconds * 1000


def _identifier(where: str, field: str, value: Any) -> str | None:
    if value is None:
        return None
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not text.strip() or LIST_SEPARATOR in text:
        raise InputError(f"{where}: {field} holds {value!r}; an id without semicolons is needed.")
    return text


def _identifiers(where: str, field: str, value: Any, noted: Counter[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InputError(f"{where}: {field} is a {type(value).__name__}; a list or null is needed.")
    identifiers = [_identifier(where, field, element) for element in value]
    nulls = identifiers.count(None)
    if nulls:
        noted[f"nulls among {field} left out"] += nulls
    names = dict.fromkeys(name for name in identifiers if name is not None)
    if len(names) + nulls < len(identifiers):
        noted[f"{field} named again left out"] += len(identifiers) - nulls - len(names)
    return tuple(names)
