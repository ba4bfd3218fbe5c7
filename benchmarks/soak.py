"""Soak: 2,000 requests on the embedded model with injected faults; none may be lost and memory must not grow.

    python -m benchmarks.soak [--requests 2000]

Prints what became of the requests and the resident memory over the run; exit code 1 when a request is lost, ends in
another way than its fault says, or memory grows by more than 5% over the second half.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from policies.registry import build_policy
from real_runner.engine import run_real
from synerdiff.core import REUSE, SkipBudget
from tests.builders import requests_at
from tests.faulty import Faults, faulty, watched_chunks
from tests.hardware import digits_hardware, digits_profile


def resident_mib() -> float:
    """This process's resident memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    count = parser.parse_args().requests
    profile = digits_profile()
    faults = Faults()
    faults.raises = set(range(50, count, 97))
    faults.not_a_number = set(range(60, count, 101)) - faults.raises
    faults.bad_decode = set(range(70, count, 103)) - faults.raises - faults.not_a_number
    faults.unprepared = set(range(80, count, 107)) - faults.raises - faults.not_a_number - faults.bad_decode
    faults.short_of_memory_once = set(range(90, count, 109))
    failing = faults.raises | faults.not_a_number | faults.bad_decode | faults.unprepared
    memory: list[float] = []
    with digits_hardware(profile) as hardware:
        from real_runner.hardware import chunking_of

        hardware.warm_up(profile.row_buckets or (), chunking_of(profile, "whole"))
        with faulty(hardware, faults), watched_chunks():
            run = run_real(
                requests_at(*(5 * i for i in range(count)), steps=2, guidance_scale=4.0),
                build_policy("continuous-parallel"),
                profile,
                hardware,
                budget=SkipBudget(500_000, 1, 1, REUSE),
                on_progress=lambda ended: memory.append(resident_mib()),
            )
    statuses = {record.request.request_id: record.status for record in run.result.requests}
    wrong = [i for i in range(count) if statuses.get(i) != ("failed" if i in failing else "done")]
    half, end = memory[len(memory) // 2], memory[-1]
    print(f"{count} requests: {sum(s == 'done' for s in statuses.values())} done, {len(failing)} made to fail")
    print(f"lost or wrong: {wrong or 'none'}; error: {run.error}; faults recorded: {len(run.faults)}")
    print(f"resident memory: {memory[0]:.0f} MiB at first, {half:.0f} at half, {end:.0f} at the end")
    return int(bool(wrong) or run.error is not None or end > 1.05 * half)


if __name__ == "__main__":
    sys.exit(main())
