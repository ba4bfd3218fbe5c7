"""What else kept this machine busy: other processes, and a host that takes processor time from a virtual machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple


class Load(NamedTuple):
    """Averages in cores; None where the system does not tell."""

    others: float | None
    """Kept busy by other processes."""
    stolen: float | None
    """Ready to run but not run by the host."""


UNKNOWN = Load(None, None)


class MachineLoad:
    """From Linux's /proc/stat and this process's own time."""

    def __init__(self) -> None:
        self._since = self._now()

    def load(self) -> Load:
        """Since the start."""
        now = self._now()
        if now is None or self._since is None:
            return UNKNOWN
        wall_s, busy_s, own_s, stolen_s = (after - before for after, before in zip(now, self._since, strict=True))
        return Load(max(0.0, (busy_s - own_s) / wall_s), stolen_s / wall_s)

    @staticmethod
    def _now() -> tuple[float, float, float, float] | None:
        """(wall, busy on all cores, own, stolen) seconds."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, stolen = (int(field) for field in fields[:8])
        ticks = os.sysconf("SC_CLK_TCK")
        return time.monotonic(), (user + nice + system + irq + softirq) / ticks, time.process_time(), stolen / ticks
