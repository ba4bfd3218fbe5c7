"""Worker processes: interrupted while they start, and left alone by a command that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import time
from synerdiff.experiments.backends import LokyBackend
try:
    list(LokyBackend(2).run_unordered(time.sleep, [600.0] * 2))
except KeyboardInterrupt:
    print("Interrupted.")
"""
LONG_S = 120.0

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are looked up in /proc")


def started() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers_of(pid: int) -> set[int]:
    """Its children that are loky's workers."""
    found = set()
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listed.read_text().split():
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"popen_loky" in words:
                found.add(int(child))
    return found


def wait_for(process: subprocess.Popen[str], count: int) -> set[int]:
    until = time.monotonic() + LONG_S
    while len(found := workers_of(process.pid)) < count:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.002)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_while_workers_start_prints_no_traceback(workers: int) -> None:
    process = started()
    wait_for(process, workers)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LONG_S)
    assert (out, err) == ("Interrupted.\n", "")


def test_workers_end_when_their_command_is_killed() -> None:
    process = started()
    workers = wait_for(process, 2)
    time.sleep(0.5)
    process.kill()
    process.communicate(timeout=LONG_S)
    until = time.monotonic() + LONG_S
    while any(Path(f"/proc/{worker}/task").is_dir() for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
