"""Where the requests of one replicate come from: a generator with a seed, or a window of a trace file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from synerdiff.config.experiment import BatchSearch, Experiment, Workload
from synerdiff.core import NS_PER_S, InputError, Request
from synerdiff.experiments.adapter_mix import AdapterTrace, adapter_requests
from synerdiff.files import sha256_of_files
from synerdiff.schema import validated
from traces.dialects import Reading, load_trace
from traces.generate import generate_trace
from traces.gentd26 import read_gentd26
from traces.native import Conversion
from traces.scaling import cut_window
from traces.spec import trace_spec

GENERATED_RATE_PER_S = 1.0
"""Arrivals are drawn at this rate and then stretched to the load, so that all loads see the same pattern."""


@dataclass(frozen=True, slots=True)
class Source:
    """One replicate of a workload. ``number`` is its seed, or the place of its window among the workload's."""

    workload: str
    number: int
    requests: int | None
    parameters: str
    """The generator's or the reader's, as JSON."""
    generator: str | None = None
    trace: str | None = None
    trace_format: str = "auto"
    trace_hash: str = ""
    window: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """The trace's file, or the workload."""
        return self.workload if self.trace is None else Path(self.trace).name


@dataclass(frozen=True)
class Arrivals:
    """The requests of a replicate before they are stretched to a load."""

    requests: tuple[Request, ...]
    window: tuple[float, float] | None
    """The stated window; a generator's begins at 0. None: from the first arrival to the last."""
    dropped: Mapping[str, int]
    """What the trace file held and is not replayed, by reason."""
    read_as: tuple[str, ...] = ()
    """How a trace of another dialect was understood and what became of its rows, for people."""

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the requests and their window."""
        return hashlib.sha256(repr((self.requests, self.window)).encode()).hexdigest()


def sources(workload: Workload, experiment: Experiment, base: Path) -> list[Source]:
    """The replicates of a workload: one per seed, or one per window of its trace (the whole trace without any)."""
    if workload.generator is not None:
        count = None if "duration_s" in workload.parameters else workload.requests or experiment.requests
        return [_generated(workload, seed, count) for seed in workload.seeds or experiment.seeds]
    windows: list[tuple[float, float] | None] = [(window.start_s, window.end_s) for window in workload.windows]
    path = _trace_path(workload, base)
    trace_hash = _file_hash(path)
    return [
        Source(
            workload.name,
            number,
            workload.requests,
            json.dumps(workload.parameters, sort_keys=True),
            trace=str(path),
            trace_format=workload.format,
            trace_hash=trace_hash,
            window=window,
        )
        for number, window in enumerate(windows or [None])
    ]


def trace_source(
    path: Path, window: tuple[float, float] | None = None, mapping: str | None = None, sort: bool = False
) -> Source:
    """A trace of any dialect (``traces.dialects``), or the arrivals of a window of it."""
    trace_hash = _file_hash(path) if path.is_file() else ""  # the reader says what is wrong with it
    parameters = json.dumps(({"map": mapping} if mapping else {}) | ({"sort": True} if sort else {}))
    return Source(path.name, 0, None, parameters, trace=str(path), trace_hash=trace_hash, window=window)


def search_source(workload: Workload, experiment: Experiment, base: Path) -> Source:
    """The requests on which batch sizes are compared: a seed of their own, or the start of the trace's first window."""
    search: BatchSearch = experiment.batch_search
    if workload.generator is None:
        first = sources(workload, experiment, base)[0]
        return replace(first, requests=min(search.requests, first.requests or search.requests))
    count = None if "duration_s" in workload.parameters else search.requests
    return _generated(workload, search.seed, count)


def _generated(workload: Workload, seed: int, count: int | None) -> Source:
    parameters = json.dumps(workload.parameters, sort_keys=True)
    return Source(workload.name, seed, count, parameters, generator=workload.generator)


def _trace_path(workload: Workload, base: Path) -> Path:
    """Relative to the experiment's file; what an environment variable leads to is relative to the working folder."""
    assert workload.trace is not None
    text = os.path.expandvars(workload.trace)
    missing = re.search(r"\$\{?(\w+)", text)
    if missing:
        raise InputError(f"workload '{workload.name}': the environment variable {missing[1]} of its trace is not set.")
    path = Path(text).expanduser()
    return path.absolute() if "$" in workload.trace else base / path


def _file_hash(path: Path) -> str:
    """Tells a changed trace (a file, or a folder of files) from what this process has read before."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return sha256_of_files([file for file in files if file.is_file() or file == path])


@lru_cache(maxsize=64)
def arrivals(source: Source) -> Arrivals:
    """The requests of a replicate, kept for the next run of this process."""
    dropped: Mapping[str, int] = {}
    read_as: tuple[str, ...] = ()
    if source.generator is not None:
        requests = _generate(source)
    else:
        assert source.trace is not None  # a source has one of the two
        conversion = _read(source.trace, source.trace_format, source.parameters, source.trace_hash)
        requests = cut_window(tuple(conversion.requests), source.window, source.trace)
        dropped, read_as = conversion.dropped, tuple(conversion.lines())
    window = source.window
    if source.requests is not None and len(requests) > source.requests:
        requests, window = requests[: source.requests], None
    if source.generator is not None:
        duration_s = json.loads(source.parameters).get("duration_s")
        window = (0.0, requests[-1].arrival_ns / NS_PER_S if duration_s is None else float(duration_s))
    return Arrivals(requests, window, dropped, read_as)


def _generate(source: Source) -> tuple[Request, ...]:
    where = f"workload '{source.workload}'"
    parameters = json.loads(source.parameters)
    for name, field in (("seed", "seeds"), ("requests", "requests"), ("kind", "generator")):
        if name in parameters:
            raise InputError(f"{where}: {name} is not among its parameters; give {field} beside them.")
    fields = {"kind": source.generator, "seed": source.number, **parameters}
    if source.requests is not None:
        fields["requests"] = source.requests
    if source.generator == "adapters":
        return tuple(
            adapter_requests(
                validated(AdapterTrace, {name: value for name, value in fields.items() if name != "kind"}, where)
            )
        )
    if source.generator != "gentd26-like":
        fields.setdefault("rate_per_s", GENERATED_RATE_PER_S)
    return tuple(generate_trace(trace_spec(fields, where)))


_PARAMETERS: dict[str, dict[str, type]] = {
    "auto": {"map": str, "sort": bool},
    "gentd26": {"checkpoints": str, "adapters": str, "all_types": bool},
}


@lru_cache(maxsize=2)
def _read(path: str, trace_format: str, parameters: str, trace_hash: str) -> Conversion:
    options = json.loads(parameters)
    known = _PARAMETERS[trace_format]
    for name, value in options.items():
        if name not in known:
            raise InputError(f"{path}: there is no parameter '{name}' of this trace; known are {', '.join(known)}.")
        if not isinstance(value, known[name]):
            raise InputError(
                f"{path}: {name} is {value!r}; {'true or false' if known[name] is bool else 'text'} is needed."
            )
    if trace_format == "auto":
        return load_trace(Path(path), Reading(options.get("map", ""), options.get("sort", False)))
    return read_gentd26(Path(path), **options)
