"""Traces as others write them: one table of the names that people use, one reader, and what became of every row.

A name is found whatever its case and its spaces, dots or hyphens; of an object within an object (``body.size``) the
last part counts too. ``--map`` names a column itself, with the unit of a time or the order of a size after a colon,
or gives a value for all rows. Nothing is guessed that could be read in two ways: that is refused with what to write.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

from synerdiff.core import NS_PER_S, InputError
from synerdiff.files import Progress, shown
from traces.cells import EPOCH, UNIT_NAMES, UNITS_NS, decimal_of, guidance_text, moment_ns, whole_text, zone_of
from traces.columns import (
    COLUMNS,
    IMAGES,
    MAX_ARRIVAL_S,
    MAX_SLO_S,
    REQUIRED,
    SEED,
    SIDE_PIXELS,
    STEPS,
    FieldError,
    Fields,
    parse_fields,
    request_of,
    seconds_text,
)
from traces.native import Conversion, read_trace
from traces.tables import TextTable, listed, open_table

NAMES: dict[str, tuple[str, ...]] = {
    "arrival": (
        *("arrival_s", "arrival_ms", "arrival_us", "arrival_ns", "arrival", "arrival_time", "arrival_timestamp"),
        *("timestamp", "timestamp_s", "timestamp_ms", "timestamp_us", "timestamp_ns"),
        *("ts", "time", "time_s", "time_ms"),
        *("created", "created_at", "submitted_at", "sent_at", "received_at", "request_time", "start_time", "datetime"),
    ),
    "steps": ("steps", "num_inference_steps", "inference_steps", "num_steps", "sampling_steps", "step"),
    "images": ("images", "num_images_per_prompt", "num_outputs_per_prompt", "num_images", "num_outputs", "n"),
    "guidance_scale": ("guidance_scale", "true_cfg_scale", "cfg_scale", "cfg", "guidance"),
    "height": ("height", "image_height"),
    "width": ("width", "image_width"),
    "size": ("size", "image_size", "resolution"),
    "base_model": ("base_model",),
    "loras": ("loras",),
    "controlnets": ("controlnets",),
    "slo": ("slo_s", "slo_ms", "slo", "deadline_s", "deadline_ms"),
    "seed": ("seed", "generator_seed"),
    "prompt": ("prompt", "text_prompt"),
    "negative_prompt": ("negative_prompt", "neg_prompt"),
}
"""Field -> names, the first one that a file has counts. diffusers, OpenAI, vllm-omni, SGLang, DiffusionDB and ours."""

ORDERS = ("WxH", "HxW")
_EPOCH_FROM = {"s": Decimal(10**9), "ms": Decimal(10**11), "us": Decimal(10**14), "ns": Decimal(10**17)}
"""Unit -> the least number that is taken for a time since 1970 in it (September 2001, or March 1973)."""
_SECONDS_BELOW = 1000
"""Whole numbers below this are seconds: as milliseconds the whole trace would last less than one."""
_NUMERIC = ("arrival", "steps", "images", "guidance_scale", "height", "width", "slo", "seed")
_POST = {"prompt", "step", "cfg", "sampler", "timestamp"}
_RECORDS = {"request_id", "arrival_s", "finished_s", "status"}
_LANGUAGE = re.compile(r"token|input_length|output_length")
_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[xX*\u00d7]\s*([0-9]{1,6})\s*")
_MINUTE_NS = 60 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Reading:
    """How a trace is to be read: ``mapping`` as ``--map`` gives it, whether to sort, and the seed of what is spread."""

    mapping: str = ""
    sort: bool = False
    seed: int = 0


def load_trace(path: Path, reading: Reading = Reading(), progress: Progress | None = None) -> Conversion:
    """A trace of synerdiff's own format, strictly, or one of another dialect (`convert_trace`).

    Own is what has the columns arrival_s and steps, unless a mapping is given. Raises InputError.
    """
    table = open_table(path, progress)
    plain = table.kind in ("CSV", "parquet") and set(REQUIRED) <= set(table.names) and not set(table.names) >= _RECORDS
    if plain and not reading.mapping:
        try:
            requests = read_trace(path, progress, reading.sort)
        except InputError as error:
            more = "synerdiff trace convert drops and counts what does not fit"
            raise InputError(f"{str(error).removesuffix('.')}; {more}.") from None
        return Conversion(requests, len(requests))
    return _converted(path, table, reading)


WEIGHTS = ("weight", "probability", "share", "ratio")


def read_shapes(path: Path, steps: int | None = None) -> list[dict[str, object]]:
    """Shapes of requests with weights (vllm-omni's random requests) as the fields of ``spec.Shape``.

    A list of JSON objects, or a table, with the names of any dialect; ``steps`` where none are named. InputError names
    the entry that does not fit.
    """
    table = open_table(path)
    where = f"{path} ({table.kind})"
    plain = [_plain(name) for name in table.names]
    has_steps = any(name in NAMES["steps"] for name in plain)
    if not has_steps and steps is None:
        raise InputError(f"{where}: no entry says how many steps; give them with --steps.")
    if has_steps and steps is not None:
        raise InputError(f"{where}: its entries say how many steps, which excludes --steps.")
    uses = _uses(where, table.names, "arrival=0" if has_steps else f"arrival=0,steps={steps}")
    if more := [name for name in uses if name not in (*_SHAPE_FIELDS, "arrival", "size", "slo")]:
        raise InputError(
            f"{where}: a shape has no {more[0]}; it has {', '.join(_SHAPE_FIELDS)}, size, slo and a weight."
        )
    weights = [name for name in WEIGHTS if name in plain]
    if len(weights) > 1:
        raise InputError(f"{where}: {' and '.join(weights)} both say how often a shape is drawn; leave one.")
    weight = plain.index(weights[0]) if weights else None
    shapes = []
    for place, cells in table.rows:
        try:
            fields = request_of(0, 0, _fields(where, uses, cells))
        except FieldError as error:
            raise InputError(f"{where}, {table.place} {place}: {error}.") from None
        share = Decimal(1) if weight is None else decimal_of(cells[weight])
        if share is None:
            raise InputError(f"{where}, {table.place} {place}: {table.names[weight or 0]} is not a number.")
        shape = {name: getattr(fields, name) for name in _SHAPE_FIELDS}
        shapes.append(shape | {"weight": float(share), "slo_s": fields.slo_ns and fields.slo_ns / NS_PER_S})
    for reason in table.broken:
        raise InputError(f"{where}: {table.broken[reason]} of its entries cannot be read: {reason}.")
    return shapes


_SHAPE_FIELDS = ("steps", "images", "guidance_scale", "height", "width", "prompt", "negative_prompt")


def convert_trace(path: Path, reading: Reading = Reading(), progress: Progress | None = None) -> Conversion:
    """The requests of any dialect: rows that do not fit are dropped and counted, columns that none asks for are named.

    A trace that starts late is shifted to its first request, unless its arrivals are synerdiff's own. Raises
    InputError, with what to write, where a field is missing or could be read in two ways.
    """
    return _converted(path, open_table(path, progress), reading)


@dataclass(frozen=True, slots=True)
class _Use:
    """Where a field comes from: a column, with the form of its values where it has one, or one value for all rows."""

    name: str
    column: int | None
    form: str = ""

    def text(self, cells: Sequence[str]) -> str:
        return self.name if self.column is None else cells[self.column].strip()


@dataclass(slots=True)
class _Rows:
    """What the rows of a file gave, before the unit of their times is known."""

    places: list[int] = field(default_factory=list)
    arrivals: list[Decimal | int] = field(default_factory=list)
    """Numbers as they are written, or nanoseconds since 1970 of times."""
    fields: list[Fields] = field(default_factory=list)
    posts: list[tuple[str, ...]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)
    zones: set[bool] = field(default_factory=set)
    """Whether times have a zone; empty for numbers."""
    count: int = 0


def _converted(path: Path, table: TextTable, reading: Reading) -> Conversion:
    where = f"{path} ({table.kind})"
    for name in table.names:
        if name and table.names.count(name) > 1:
            raise InputError(f"{where}: the column {name!r} is given twice.")
    uses = _uses(where, table.names, reading.mapping)
    own = {_plain(name) for name in table.names}
    posts = own >= _POST and bool(own & {"user", "user_name"})
    rows = _read(where, table, uses, posts)
    rows.dropped.update(table.broken)
    if not rows.arrivals:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in rows.dropped.items()) or "it has no rows"
        raise InputError(f"{where}: no row can be replayed ({reasons}); name the columns, {_example(uses)}.")
    arrivals, unit, late = _nanoseconds(where, rows, uses["arrival"], table)
    merged = 0
    facts = [f"read as {table.kind}: {_sources(uses, unit)}"]
    if posts:
        merged = _join_posts(rows, arrivals)
        facts += _spread(arrivals, reading.seed)
    order = _order(where, table, rows, arrivals, reading.sort or posts)
    if order is not None:
        before, arrivals, rows.fields = arrivals, [arrivals[i] for i in order], [rows.fields[i] for i in order]
        if not posts:
            rows.noted["follow one that arrived later: sorted"] += sum(a > b for a, b in pairwise(before))
    if late:
        facts += _shift(arrivals, rows.zones)
    if arrivals[-1] > MAX_ARRIVAL_S * NS_PER_S or arrivals[0] < 0:
        raise InputError(
            f"{where}: arrivals go from {arrivals[0] / NS_PER_S:g} to {arrivals[-1] / NS_PER_S:g} s; "
            f"0 to {MAX_ARRIVAL_S:,} s are replayed."
        )
    requests = [request_of(index, *row) for index, row in enumerate(zip(arrivals, rows.fields, strict=True))]
    again = len(requests) - len({replace(request, request_id=0) for request in requests})
    if again:
        rows.noted["equal another request of their instant, kept"] += again
    facts += _unread(table, uses)
    dropped = {
        reason if reason not in rows.first else f"{reason} (first: {table.place} {rows.first[reason]})": count
        for reason, count in rows.dropped.items()
    }
    total = rows.count + sum(table.broken.values())
    return Conversion(requests, total, dropped, dict(rows.noted), tuple(facts), merged)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def _uses(where: str, names: Sequence[str], mapping: str) -> dict[str, _Use]:
    """Field -> where it comes from."""
    asked = _mapping(mapping)
    whole = {_plain(name): index for index, name in reversed(list(enumerate(names)))}
    last = {_plain(name.rpartition(".")[2]): index for index, name in reversed(list(enumerate(names)))}
    uses = {}
    for target, known in NAMES.items():
        if target in asked:
            uses[target] = _mapped(where, target, asked[target], names)
            continue
        for columns in (whole, last):
            name = next((name for name in known if name in columns), None)
            if name is not None:
                column = columns[name]
                uses[target] = _Use(names[column], column, _form(target, name))
                break
    for needed in REQUIRED:
        if needed.removesuffix("_s") not in uses and needed not in uses:
            raise InputError(_missing(where, names, "arrival" if needed == "arrival_s" else needed, uses))
    return uses


def _missing(where: str, names: Sequence[str], target: str, uses: Mapping[str, _Use]) -> str:
    what = "when requests arrive" if target == "arrival" else "how many denoiser steps a request takes"
    hint = " (a trace of a language model has none)" if _LANGUAGE.search(" ".join(map(_plain, names))) else ""
    return f"{where}: none of its columns says {what}{hint}; it has {listed(names)}; name them, {_example(uses)}."


def _example(uses: Mapping[str, _Use]) -> str:
    arrival = uses["arrival"].name if "arrival" in uses else "COLUMN"
    return f"for example --map arrival={arrival},steps=COLUMN, or give one number for all, --map steps=30"


def _mapping(text: str) -> dict[str, str]:
    """``field=column,...`` as field -> column."""
    asked: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        name, separator, column = (piece.strip() for piece in part.partition("="))
        if not separator or not column:
            raise InputError(f"--map {shown(text)}: FIELD=COLUMN is needed, for example arrival=timestamp:ms,steps=30.")
        if name not in NAMES:
            raise InputError(f"--map {shown(text)}: there is no field '{name}'; fields are {', '.join(NAMES)}.")
        if name in asked:
            raise InputError(f"--map {shown(text)}: the field '{name}' is given twice.")
        asked[name] = column
    return asked


def _mapped(where: str, target: str, text: str, names: Sequence[str]) -> _Use:
    """A column by its exact name, one with its unit or order after a colon, or a value for all rows."""
    column, _, form = (text, "", "") if text in names else text.partition(":")
    if target == "size" and column in ORDERS and column not in names:  # size=WxH: how to read the column of sizes
        form, column = column, next((name for name in names if _plain(name) in NAMES["size"]), column)
    if column in names:
        if form and not _knows(target, form):
            raise _form_error(target, text, "s, ms, us, ns or a zone such as +02:00 or UTC")
        return _Use(column, names.index(column), form or _form(target, _plain(column)))
    constant = _SIZE.fullmatch(column) if target == "size" else target in _NUMERIC and decimal_of(column) is not None
    if constant:
        if form and not (form in UNITS_NS if target == "arrival" else _knows(target, form)):
            raise _form_error(target, text, "s, ms, us or ns")
        return _Use(column, None, form or ("s" if target in ("arrival", "slo") else "WxH" if target == "size" else ""))
    raise InputError(f"{where}: there is no column '{shown(column)}' for --map {target}; it has {listed(names)}.")


def _form_error(target: str, text: str, times: str) -> InputError:
    allowed = {"arrival": times, "slo": "s, ms, us or ns", "size": "WxH or HxW"}.get(target, "nothing")
    return InputError(f"--map {target}={shown(text)}: after the colon {allowed} is needed.")


def _knows(target: str, form: str) -> bool:
    if target == "size":
        return form in ORDERS
    return (target in ("arrival", "slo") and form in UNITS_NS) or (target == "arrival" and zone_of(form) is not None)


def _form(target: str, name: str) -> str:
    """The unit or order that a column's own name tells."""
    if target == "size":
        return {"resolution": "", "hxw": "HxW"}.get(name, "WxH")
    unit = name.rpartition("_")[2]
    return unit if target in ("arrival", "slo") and "_" in name and unit in UNITS_NS else ""


def _read(where: str, table: TextTable, uses: Mapping[str, _Use], posts: bool) -> _Rows:
    rows = _Rows()
    arrival = uses["arrival"]
    zone = zone_of(arrival.form) if arrival.form and arrival.form not in UNITS_NS else None
    author = [i for i, name in enumerate(table.names) if _plain(name) in ("user", "user_name", "sampler")]
    known: dict[tuple[str, ...], Fields] = {}
    columns = [uses[target] for target in NAMES if target in uses and target != "arrival"]
    numbers: bool | None = None
    for place, cells in table.rows:
        rows.count += 1
        try:
            text = arrival.text(cells)
            number = decimal_of(text)
            when: Decimal | int | None = number
            if number is None:
                when, zoned = moment_ns(text, zone)
                rows.zones.add(zoned)
            if numbers is not None and numbers != (number is not None):
                raise InputError(
                    f"{where}, {table.place} {place}: {arrival.name} is {shown(text)!r}; some rows give a number and "
                    "some a date, so it cannot be told which instant either is."
                )
            numbers = number is not None
            texts = tuple(use.text(cells) for use in columns)
            fields = known.get(texts)
            if fields is None:
                fields = _fields(where, uses, cells)
                if len(known) < 20_000 and not fields[-2]:
                    known[texts] = fields
        except FieldError as error:
            rows.dropped[str(error)] += 1
            rows.first.setdefault(str(error), place)
            continue
        assert when is not None
        rows.places.append(place)
        rows.arrivals.append(when)
        rows.fields.append(fields)
        if "seed" in uses and uses["seed"].text(cells).startswith("-"):
            rows.noted["have a seed below 0, read as none"] += 1
        if posts:
            rows.posts.append(tuple(cells[i] for i in author))
    if len(rows.zones) > 1:
        raise InputError(
            f"{where}: some times of {arrival.name} have a zone and some have none; "
            f"say which those have, for example --map arrival={arrival.name}:UTC."
        )
    return rows


def _fields(where: str, uses: Mapping[str, _Use], cells: Sequence[str]) -> Fields:
    """What follows the arrival; raises FieldError with a reason that many rows may share."""
    texts = dict.fromkeys(NAMES, "") | {target: use.text(cells) for target, use in uses.items()}
    height, width = _size(where, uses.get("size"), texts)
    parsed = texts | {
        "steps": whole_text("steps", texts["steps"], STEPS),
        "images": whole_text("images", texts["images"], IMAGES, "1"),
        "guidance_scale": guidance_text(texts["guidance_scale"]),
        "height": whole_text("height", height, SIDE_PIXELS, ""),
        "width": whole_text("width", width, SIDE_PIXELS, ""),
        "slo_s": _slo(where, uses["slo"], texts["slo"]) if texts["slo"] else "",
        "seed": whole_text("seed", "" if texts["seed"].startswith("-") else texts["seed"], SEED, ""),
        "prompt": texts["prompt"].replace("\0", ""),
        "negative_prompt": texts["negative_prompt"].replace("\0", ""),
    }
    return parse_fields([parsed[column] for column in COLUMNS[1:]])


def _size(where: str, use: _Use | None, texts: Mapping[str, str]) -> tuple[str, str]:
    """(height, width); two empty texts where the profile's counts."""
    height, width = texts["height"], texts["width"]
    if bool(height) != bool(width):
        raise FieldError("height and width go together; one of them is empty")
    size = texts["size"]
    if not size or size.lower() == "auto" or use is None:
        return height, width
    match = _SIZE.fullmatch(size)
    if match is None:
        raise FieldError(f"{use.name} is not two numbers with an x between them")
    first, second = match[1], match[2]
    if height:
        if {decimal_of(height), decimal_of(width)} != {Decimal(first), Decimal(second)}:
            raise FieldError(f"{use.name} is another than height and width")
        return height, width
    if use.form == "WxH":
        return second, first
    if not use.form and int(first) != int(second):
        raise InputError(
            f"{where}: {use.name} is {size}, which may be WIDTHxHEIGHT or HEIGHTxWIDTH; "
            f"say which, --map size={use.name}:WxH or --map size={use.name}:HxW."
        )
    return first, second


def _slo(where: str, use: _Use, text: str) -> str:
    unit = use.form
    if not unit:
        raise InputError(f"{where}: {use.name} has no unit; say which, for example --map slo={use.name}:ms.")
    value = decimal_of(text)
    if value is None or not 0 < value * UNITS_NS[unit] <= MAX_SLO_S * NS_PER_S:
        raise FieldError("the SLO is not a time above 0")
    return seconds_text(max(1, int((value * UNITS_NS[unit]).to_integral_value())))


def _nanoseconds(where: str, rows: _Rows, use: _Use, table: TextTable) -> tuple[list[int], str, bool]:
    """(arrivals in ns, their unit for people, whether they count from elsewhere than the trace's start)."""
    if rows.zones:
        if use.form in UNITS_NS:
            raise InputError(
                f"{where}: {use.name} holds dates, which are not in {UNIT_NAMES[use.form]}; "
                f"say where their clock stands, for example --map arrival={use.name}:UTC."
            )
        zone = "with a zone" if True in rows.zones else "without a zone"
        return [int(value) for value in rows.arrivals], f"times {zone}", True
    low, high = min(rows.arrivals), max(rows.arrivals)
    unit = use.form if use.form in UNITS_NS else _unit(where, rows.arrivals, use.name, table)
    scale = UNITS_NS[unit]
    epoch = low * scale >= _EPOCH_FROM["s"] * NS_PER_S
    own = _plain(use.name) == "arrival_s" or use.column is None
    name = UNIT_NAMES[unit] + (" since 1970" if epoch else "")
    if high * scale > Decimal(2**63):
        raise InputError(f"{where}: {use.name} goes up to {high}, which is no time in {UNIT_NAMES[unit]}.")
    return [int(Decimal(value * scale).to_integral_value()) for value in rows.arrivals], name, epoch or not own


def _unit(where: str, values: Sequence[Decimal | int], name: str, table: TextTable) -> str:
    low, high = min(values), max(values)
    for unit, next_one in zip(_EPOCH_FROM, [*list(_EPOCH_FROM.values())[1:], Decimal(10**20)], strict=True):
        if _EPOCH_FROM[unit] <= low and high < next_one:
            return unit
    vllm_omni = table.kind.startswith("Request") or {"slo_ms", "num_inference_steps"} <= set(map(_plain, table.names))
    fractions = any(value != int(value) for value in values)
    if high < _EPOCH_FROM["s"] and (fractions or vllm_omni or high < _SECONDS_BELOW):
        return "s"
    raise InputError(
        f"{where}: {name} goes from {low} to {high}, which may be seconds or milliseconds; "
        f"say which, --map arrival={name}:s or --map arrival={name}:ms."
    )


def _sources(uses: Mapping[str, _Use], unit: str) -> str:
    parts = []
    for target, use in uses.items():
        form = f" ({unit})" if target == "arrival" else f" ({use.form})" if use.form else ""
        parts.append(f"{target} {'is' if use.column is None else 'from'} {shown(use.name)}{form}")
    return ", ".join(parts)


def _unread(table: TextTable, uses: Mapping[str, _Use]) -> list[str]:
    """Columns that nothing is taken from, and fields that no column gives."""
    taken = {use.column for use in uses.values()}
    names = [name for index, name in enumerate(table.names) if index not in taken]
    facts = []
    if names and not set(table.names) >= _RECORDS:
        facts.append(f"columns not read: {listed(names)}")
    defaults = {"images": "1", "guidance_scale": "7.5", "height": "", "prompt": ""}
    absent = [name for name in defaults if name not in uses and not (name == "height" and "size" in uses)]
    texts = {"height": "resolution (the profile's)", "prompt": "prompts (the model's own)"}
    if absent:
        facts.append("not in the file: " + ", ".join(texts.get(name, f"{name} ({defaults[name]})") for name in absent))
    return facts


def _join_posts(rows: _Rows, arrivals: list[int]) -> int:
    """Rows of one post become one request with as many images (DiffusionDB has a row an image); how many were."""
    where: dict[tuple[object, ...], int] = {}
    joined: list[Fields] = []
    times: list[int] = []
    seed = COLUMNS.index("seed") - 1
    for author, at_ns, fields in zip(rows.posts, arrivals, rows.fields, strict=True):
        key = (author, at_ns, fields[:seed], fields[seed + 1 :])
        index = where.get(key)
        if index is None or joined[index][1] >= IMAGES[1]:
            where[key] = len(joined)
            joined.append(fields)
            times.append(at_ns)
        else:
            steps, images, *rest = joined[index]
            joined[index] = (steps, images + 1, *rest)  # type: ignore[assignment]
    merged = len(rows.fields) - len(joined)
    rows.fields, arrivals[:] = joined, times
    return merged


def _spread(arrivals: list[int], seed: int) -> list[str]:
    facts = ["rows of one post (user, time, prompt, settings) are one request with as many images"]
    if all(at_ns % _MINUTE_NS == 0 for at_ns in arrivals):
        draw = random.Random(seed)
        arrivals[:] = [at_ns + draw.randrange(_MINUTE_NS) for at_ns in arrivals]
        facts.append(
            f"times are those of posts, to the minute, spread within it with seed {seed}: no arrivals of a service"
        )
    return facts


def _order(where: str, table: TextTable, rows: _Rows, arrivals: Sequence[int], sort: bool) -> list[int] | None:
    """The order in which they arrive; None when the file has it."""
    for index, (before, after) in enumerate(pairwise(arrivals), 1):
        if after < before:
            if sort:
                return sorted(range(len(arrivals)), key=arrivals.__getitem__)
            raise InputError(
                f"{where}, {table.place} {rows.places[index]}: the request arrives before the one ahead of it; "
                "--sort sorts the trace."
            )
    return None


def _shift(arrivals: list[int], zones: set[bool]) -> list[str]:
    first = arrivals[0]
    arrivals[:] = [at_ns - first for at_ns in arrivals]
    if not first:
        return []
    at = f"{seconds_text(first)} s"
    if zones or first >= _EPOCH_FROM["s"] * NS_PER_S:
        moment = EPOCH + timedelta(microseconds=first // 1000)
        at = f"{moment:%Y-%m-%d %H:%M:%S}" + (" UTC" if zones != {False} else " (no zone is given)")
    return [f"shifted: the first request, at {at}, is now at 0"]
