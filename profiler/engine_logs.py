"""Profiles from an engine's own logs: SGLang's performance dumps, the lines of vllm-omni's batching profiler.

Neither measures decodes beside steps: that is left out, or filled from the estimator and marked (`filled`).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

from profiler.datasheets import MODELS
from profiler.estimate import estimate_profile
from profiler.imported import LEAST_MS, MOST_BATCH, MOST_MS, imported_profile
from synerdiff.core import InputError
from synerdiff.files import (
    LEAST_SIDE,
    MOST,
    MOST_SIDE,
    finite,
    number,
    plain_digits,
    read_text,
    shown,
    sides_of,
)
from synerdiff.profile.tables import Head, Profile, Spread
from traces.cells import UNITS_NS as UNITS_NS

PATCH_PIXELS = 16
"""A compute unit of vllm-omni is a patch of 16 by 16 pixels."""
WARM_UP = 1
LAUNCHES = (
    "a dump made without synchronised profiling measures how long steps take to launch, not to run; "
    "compare with the stage's duration"
)
_PROFILER = "[DiffusionBatchProfiler]"
_PAIR = re.compile(r"(?<![\w.])(\w+)=(\S+)(?: ([^\W\d_]+|%)(?![\w=:]))?")
"""A name, its value, and a word after it, which may be the unit of a time."""
_TIME = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)(.*)")
_PAIRS = ("batch_size", "request_compute_units", "total_compute_units", "denoise_step_time")


@dataclass(slots=True)
class EngineTimes:
    """What logs hold, in ns: steps by rows, decodes and text encodings of one image; and what is to be said."""

    steps: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    decodes: list[float] = field(default_factory=list)
    encodes: list[float] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def size_of(text: str) -> tuple[int, int]:
    """``HxW`` as (height, width)."""
    if (sides := sides_of(text)) is None:
        raise InputError(
            f"--resolution is {shown(repr(text))}; HEIGHTxWIDTH is needed, {LEAST_SIDE} to {MOST_SIDE} pixels a side, "
            "like 768x512."
        )
    return sides


def batches_of(text: str, files: int) -> list[int]:
    """Images of a batch: one number for all files, or one for each."""
    batches = [size for part in text.split(",") if (size := plain_digits(part, 1, MOST_BATCH))]
    if len(batches) <= text.count(","):
        raise InputError(
            f"--batch is {shown(repr(text))}; numbers from 1 to {MOST_BATCH} are needed, separated by commas."
        )
    if len(batches) not in (1, files):
        raise InputError(f"--batch has {len(batches)} numbers for {files} files; give one for all, or one for each.")
    return batches * (files if len(batches) == 1 else 1)


def sglang_times(files: Sequence[Path], batches: Sequence[int], guided: bool, warm_up: int = WARM_UP) -> EngineTimes:
    """Times of SGLang's ``--perf-dump-path`` files, each of a batch that the dump does not name.

    The first ``warm_up`` steps of each are left out. Of its stages that which decodes and that which encodes text are
    taken. InputError names the file and the field.
    """
    times = EngineTimes()
    for path, batch in zip(files, batches, strict=True):
        dump = _dump(path)
        steps = [_milliseconds(path, "denoise_steps_ms", entry) for entry in _entries(path, dump, "denoise_steps_ms")]
        if len(steps) <= warm_up:
            raise InputError(f"{path}: it has {len(steps)} steps, of which {warm_up} are warm-up; none is left.")
        times.steps[batch * (2 if guided else 1)] += [step_ms * 1e6 for step_ms in steps[warm_up:]]
        unread = []
        for entry in _entries(path, dump, "steps") if "steps" in dump else ():
            name, stage_ms = str(entry.get("name", "")), _milliseconds(path, "steps", entry)
            known = name.lower()
            if "denois" in known:
                share = sum(steps) / stage_ms
                times.facts.append(f"{path.name}: its steps add up to {share:.0%} of {shown(name)}")
                if share < 0.9:
                    times.facts.append(f"{path.name}: so its steps measure launches; their times are too short")
            elif "decod" in known:
                times.decodes.append(stage_ms * 1e6 / batch)
            elif "encod" in known and ("text" in known or "prompt" in known):
                times.encodes.append(stage_ms * 1e6 / batch)
            else:
                unread.append(shown(name))
        if unread:
            times.facts.append(f"{path.name}: stages not read: {', '.join(unread)}")
    times.facts.append(f"the first {warm_up} steps of each dump are left out")
    times.facts.append(LAUNCHES)
    return times


def _dump(path: Path) -> dict[str, Any]:
    text = read_text(path, "performance dump")
    try:
        dump = json.loads(text, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, InputError) else "this is not JSON"
        raise InputError(f"{path}: {problem}, so it is no performance dump.") from None
    if not isinstance(dump, dict):
        raise InputError(f"{path}: a performance dump is a JSON object; this is a {type(dump).__name__}.")
    return dump


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError("an object names a field twice")
    return found


def _entries(path: Path, dump: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = dump.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: {name} is missing or no list of objects; SGLang's --perf-dump-path writes it.")
    return entries


def _milliseconds(path: Path, name: str, entry: dict[str, Any]) -> float:
    value = entry.get("duration_ms")
    if not finite(value, lambda ms: LEAST_MS <= ms <= MOST_MS):
        raise InputError(
            f"{path}: {name} has duration_ms {shown(repr(value))}; a number from {LEAST_MS} to {MOST_MS:,} is needed."
        )
    return float(value)  # type: ignore[arg-type]


def vllm_omni_times(
    files: Sequence[Path], size: tuple[int, int], unit: str | None, guided: bool, warm_up: int = WARM_UP
) -> EngineTimes:
    """Times in the lines ``[DiffusionBatchProfiler] batch_size= ... denoise_step_time=`` of logs.

    Only batches of this resolution count (their compute units say so); of each batch size the first ``warm_up`` steps
    are left out. ``unit`` is that of times without one. InputError names the line.
    """
    units = -(-size[0] // PATCH_PIXELS) * -(-size[1] // PATCH_PIXELS)
    times = EngineTimes()
    skipped: Counter[str] = Counter()
    for path in files:
        for where, values, time_ns in _profiler_lines(path, unit):
            batch, request, total = (values[name] for name in _PAIRS[:3])
            if request != units:
                skipped[f"of {request} compute units a request"] += 1
            elif total != batch * request:
                skipped["of several resolutions in one batch"] += 1
            elif not 0 < batch <= 4096:
                raise InputError(f"{where}: batch_size is {batch}; allowed are 1 to 4096.")
            else:
                times.steps[batch * (2 if guided else 1)].append(time_ns)
    for rows, steps in list(times.steps.items()):
        if len(steps) <= warm_up:
            skipped[f"warm-up (all of the steps of {rows} rows)"] += len(steps)
            del times.steps[rows]
        else:
            times.steps[rows] = steps[warm_up:]
    what = ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items())
    if not times.steps:
        raise InputError(
            f"{files[0]}: no step of {size[0]}x{size[1]} pixels ({units} compute units) is left "
            f"({what or f'no line holds {_PROFILER}'})."
        )
    times.facts += [f"steps not read: {what}"] if what else []
    times.facts.append(f"the first {warm_up} steps of each batch size are left out")
    return times


def _profiler_lines(path: Path, unit: str | None) -> Iterator[tuple[str, dict[str, int], float]]:
    """(place, whole numbers by name, time of a step in ns) of every profiler line."""
    for count, line in enumerate(read_text(path, "log").split("\n"), 1):
        if _PROFILER not in line:
            continue
        where = f"{path}, line {count}"
        pairs = [(name, value.rstrip(",;"), word) for name, value, word in _PAIR.findall(line.partition(_PROFILER)[2])]
        counts = Counter(name for name, _, _ in pairs)
        for name in _PAIRS:
            if counts[name] != 1:
                problem = "missing" if counts[name] == 0 else "given twice"
                raise InputError(f"{where}: {name}= is {problem}; the profiler writes {'=, '.join(_PAIRS)}= once each.")
        found = {name: (value, word) for name, value, word in pairs}
        values = {name: plain_digits(found[name][0], 0, MOST) for name in _PAIRS[:3]}
        for name, value in values.items():
            if value is None:
                raise InputError(f"{where}: {name} is {shown(repr(found[name][0]))}; a whole number is needed.")
        text, word = found[_PAIRS[3]]
        time = _TIME.fullmatch(text)
        written = (time and time[2]) or word or unit
        if not written:
            raise InputError(f"{where}: denoise_step_time={shown(text)} has no unit; give --unit s or --unit ms.")
        try:
            time_ns = number(time[1] if time else text) * UNITS_NS[written]
        except (KeyError, ValueError):
            raise InputError(
                f"{where}: denoise_step_time is {shown(repr(f'{text} {word}'.rstrip()))}; a number is needed, alone or "
                f"in {', '.join(UNITS_NS)}."
            ) from None
        if not finite(time_ns, lambda ns: 1 <= ns < 1e15):
            raise InputError(f"{where}: denoise_step_time is {text}; a time of 1 ns to 10 days is needed.")
        yield where, {name: value or 0 for name, value in values.items()}, time_ns


def engine_profile(times: EngineTimes, name: str, source: str, model: str, size: tuple[int, int]) -> Profile:
    """The imported profile: medians and deciles over all files, no co-run slowdowns."""
    notes: dict[str, Any] = {
        "imported_from": source or "an engine's logs",
        "cells": {"steps": "imported", "decode": "imported" if times.decodes else "not in the logs: taken as nothing"},
        "said": list(times.facts),
    }
    steps = {rows: _spread_of(steps) for rows, steps in sorted(times.steps.items())}
    overheads = {"text_encode": _spread_of(times.encodes)} if times.encodes else {}
    head = Head(model=model, resolutions=(size,), source=source, notes=notes)
    return imported_profile(name, steps, _spread_of(times.decodes or [1.0]), overheads, head)


def _spread_of(values: Sequence[float]) -> Spread:
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    low, middle, high = (max(1, round(tenths[i])) for i in (0, 4, 8))
    return Spread(middle, low, high, len(values))


def filled(profile: Profile, gpu: str, contention: str) -> Profile:
    """The profile with what it lacks taken from the estimate of its model on that card, every such cell with n = 0.

    Slowdowns of steps and decodes that run together; the chunks of a decode, scaled to the decode that is known; a
    decode and a text encoding that are not known. `profile.head.notes["cells"]` says which cell came from where.
    """
    if profile.head.model not in MODELS or profile.head.size is None:
        raise InputError(
            f"--estimate needs a model that is known, at a known resolution: give --model {' or '.join(MODELS)} "
            "and --resolution."
        )
    height, width = profile.head.size
    estimate = estimate_profile(gpu, profile.head.model, contention, resolution=f"{height}x{width}")
    whole = profile.chunks["whole"][0]
    known = whole.median > 1
    scale = whole.median / estimate.decode_ns() if known else 1.0
    chunks = {
        name: tuple(Spread.exactly(piece.median * scale) for piece in pieces)
        for name, pieces in estimate.chunks.items()
    }
    most = max(profile.steps)
    corun = {
        place: {**cells, **({most: cells[max(cells)]} if most > max(cells) else {})}
        for place, cells in estimate.corun.items()
    }
    by = f"estimated for {gpu} and {profile.head.model}"
    cells = {
        "steps": "imported",
        "decode": profile.head.notes.get("decode", "imported") if known else by,
        "chunks of a decode": f"{by}, scaled to the decode" if known else by,
        "slowdowns": f"{by}, contention {contention}",
        "text_encode": "imported" if "text_encode" in profile.overheads else by,
    }
    return replace(
        profile,
        chunks={**chunks, "whole": (whole if known else Spread.exactly(estimate.decode_ns()),)},
        corun=corun,
        overheads={**estimate.overheads, **profile.overheads},
        head=profile.head.model_copy(update={"notes": {**profile.head.notes, "cells": cells}}),
    )
