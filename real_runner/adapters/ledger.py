"""What adapters did and when: entries on lanes, and faults, on the monotonic clock until a run's end turns them into
records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from real_runner.account import Fault
from synerdiff.core import SampleId, WorkRecord
from synerdiff.device.cuda import EventClock, timing_event

Instant = Callable[[], int]
"""Nanoseconds on `time.monotonic_ns`; on a GPU known only once the stream has come there."""


class LedgerEntry(NamedTuple):
    """One piece of work beside the steps."""

    gpu: int
    lane: str
    kind: str
    start: Instant
    end: Instant
    rows: int
    samples: tuple[SampleId, ...]


class Clock:
    """Instants in the order of a device's work: the host's clock on a CPU, events of the current stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._events = EventClock(device) if device.type == "cuda" else None

    def now(self) -> Instant:
        """When what has been submitted so far has ended."""
        events = self._events
        if events is None:
            return at(time.monotonic_ns())
        event = timing_event()
        event.record(torch.cuda.current_stream())

        def resolved() -> int:
            event.synchronize()
            return events.host_ns(event)

        return resolved


def at(instant_ns: int) -> Instant:
    """An instant (ns) that is known already."""
    return lambda: instant_ns


class Ledger:
    """Entries and faults of one run; several threads add to it."""

    def __init__(self) -> None:
        self.entries: list[LedgerEntry] = []
        self.faults: list[Fault] = []
        """With times on the monotonic clock."""

    def clear(self) -> None:
        self.entries.clear()
        self.faults.clear()

    def add(
        self,
        gpu: int,
        lane: str,
        kind: str,
        start: Instant,
        end: Instant,
        rows: int = 0,
        samples: tuple[SampleId, ...] = (),
    ) -> None:
        self.entries.append(LedgerEntry(gpu, lane, kind, start, end, rows, samples))

    def fault(self, kind: str, samples: tuple[str, ...], detail: str) -> None:
        """Note a fault, now."""
        self.faults.append(Fault(time.monotonic_ns(), kind, samples, detail))

    def sent(self) -> dict[str, Any]:
        """All of it as fields of a message, for the ledger of another process; this one is then empty."""
        entries = [[*entry[:3], entry.start(), entry.end(), *entry[5:]] for entry in self.entries]
        fields = {"entries": entries, "faults": [fault[1:] for fault in self.faults]}
        self.clear()
        return fields

    def take_in(self, fields: Mapping[str, Any]) -> None:
        """What another process has `sent`."""
        for gpu, lane, kind, start_ns, end_ns, rows, samples in fields["entries"]:
            self.add(int(gpu), str(lane), str(kind), at(start_ns), at(end_ns), int(rows), tuple(samples))
        for kind, samples, detail in fields["faults"]:
            self.fault(str(kind), tuple(samples), str(detail))

    def records(self, zero_ns: int) -> list[WorkRecord]:
        """All entries as records, counted from ``zero_ns``."""
        records = []
        for entry in list(self.entries):
            start_ns = max(0, entry.start() - zero_ns)
            end_ns = max(start_ns, entry.end() - zero_ns)
            records.append(
                WorkRecord.other(entry.gpu, entry.lane, entry.kind, start_ns, end_ns, entry.samples, entry.rows)
            )
        return records

    def faults_since(self, zero_ns: int) -> list[Fault]:
        """The faults, times counted from ``zero_ns``."""
        return [fault._replace(time_ns=max(0, fault.time_ns - zero_ns)) for fault in self.faults]
