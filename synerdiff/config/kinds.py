"""The kinds of files that people write, and their JSON schemas."""

from __future__ import annotations

from typing import Any

from synerdiff.config.capacity import Question
from synerdiff.config.cluster import Cluster
from synerdiff.config.experiment import Experiment, PolicyEntry
from synerdiff.config.tune import Tuning
from synerdiff.core import InputError
from synerdiff.schema import Section, json_schema

KINDS: dict[str, type[Section]] = {
    "experiment": Experiment,
    "capacity": Question,
    "tune": Tuning,
    "cluster": Cluster,
    "policy": PolicyEntry,
}


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON schema of that kind of file; InputError lists the known ones."""
    if kind not in KINDS:
        raise InputError(f"there is no kind of file '{kind}'; known are {', '.join(KINDS)}.")
    return json_schema(KINDS[kind])
