"""Kills commands by SIGKILL at seeded instants after their first result, runs them again, and compares.

    python -m benchmarks.kills [--times 20] [--only sweep fidelity profile run validate]

`sweep` and `fidelity`: what the second run leaves is, byte for byte, what an undisturbed one leaves, and no part that
was there at the kill was written again. `profile`: the cells that were there keep their times. `run` and `validate`,
which do not go on from where they were: what an earlier run left is unchanged, and the next run ends well.
Exit code 1 when any of this fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

EXPERIMENT = """name: kills
profiles: [digits-cpu]
workloads: [{name: w, generator: poisson, parameters: {rate_per_s: 1.0}}]
policies: [{policy: dynamic, batch: 2}, {policy: static, batch: [2, 4]}]
loads: [0.5, 0.8]
seeds: [1, 2, 3]
requests: 300
figures: []
"""
TRACE = "arrival_s,steps\n" + "".join(f"{second / 4},8\n" for second in range(24))
MADE = {
    "sweep": ["sweep", "kills.yaml", "--jobs", "1"],
    "fidelity": [
        *("fidelity", "--model", "digits", "--steps", "8", "--guidance-scale", "4"),
        *("--samples", "8", "--batch", "8", "--rules", "core"),
    ],
    "profile": ["profile", "--model", "digits", "--quick", "--rows", "1,2"],
    "run": ["run", "--profile", "digits-cpu", "--trace", "t.csv", "--policy", "dynamic"],
    "validate": [
        *("validate", "--profile", "digits-cpu", "--trace", "t.csv", "--policy", "dynamic", "--load", "0.5"),
        *("--no-saturation", "--repeats", "1"),
    ],
}
RESULTS = {"sweep": "runs/*.parquet", "fidelity": "parts/*", "profile": "partial.json"}
"""Command -> where its first result appears."""


def started(command: str, folder: Path, out: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "synerdiff.cli", *MADE[command], "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finished(command: str, folder: Path, out: Path) -> float:
    """Run it to its end; how long it took, in seconds. RuntimeError with what it said when it fails."""
    began = time.monotonic()
    process = started(command, folder, out)
    said = process.communicate()[1].decode(errors="replace")
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{command} ended with {process.returncode}: {said[-500:]}")
    return time.monotonic() - began


def kill(command: str, folder: Path, out: Path, after_s: float) -> None:
    """Start it and kill it, and its workers, so long after its first result (or after its start where it has none)."""
    pattern = RESULTS.get(command, "")
    before = written_at(out, pattern) if pattern else {}
    process = started(command, folder, out)
    while pattern and process.poll() is None and written_at(out, pattern) == before:
        time.sleep(0.002)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def contents(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """File -> hash, without what an interrupted write leaves."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.suffix != ".part")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def written_at(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern) if not path.name.endswith(".part")}


def cells(path: Path) -> Mapping[str, object]:
    """What an unfinished profile has measured, table by table, flat."""
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return {f"{table} {name}": entry for table, entries in tables.items() for name, entry in entries.items()}


def trouble(command: str, folder: Path, out: Path, after_s: float, whole: Mapping[str, str]) -> str:
    """What is wrong after one kill and what follows; empty when all is well."""
    if command in ("run", "validate"):
        before = contents(out)
        kill(command, folder, out, after_s)
        if contents(out) != before:
            return "an earlier result changed"
        finished(command, folder, out)
        return "" if contents(out).keys() == before.keys() else "the next run left other files"
    kill(command, folder, out, after_s)
    pattern = RESULTS[command]
    if command == "profile":
        partial = next(out.glob(pattern), None)
        measured = {} if partial is None else cells(partial)
        kill(command, folder, out, after_s)
        later = next(out.glob(pattern), None)
        again = measured if later is None else cells(later)
        lost = [name for name, entry in measured.items() if again.get(name) != entry]
        return f"{lost[0]} was lost or measured again" if lost else ""
    there = written_at(out, pattern)
    finished(command, folder, out)
    now = written_at(out, pattern)
    again_done = [path.name for path, at in there.items() if now.get(path) != at]
    if again_done:
        return f"{again_done[0]} was done again"
    changed = [name for name, digest in contents(out).items() if whole.get(name, digest) != digest]
    missing = whole.keys() ^ contents(out).keys()
    return f"{changed[0]} differs" if changed else f"{min(missing)} is there once only" if missing else ""


def undisturbed(command: str, folder: Path) -> tuple[float, dict[str, str]]:
    """How long the command takes, in seconds, and what it leaves in the folder of its name."""
    (folder / "kills.yaml").write_text(EXPERIMENT, encoding="utf-8")
    (folder / "t.csv").write_text(TRACE, encoding="utf-8")
    return finished(command, folder, folder / command), contents(folder / command)


def troubles(command: str, times: int, folder: Path, seed: int) -> list[str]:
    """One command, killed so many times; a sentence for each that went wrong."""
    took_s, whole = undisturbed(command, folder)
    instants, found = random.Random(seed), []
    for number in range(times):
        # The first result is there after about a third of the time, which loading takes.
        after_s = instants.uniform(0, took_s * (0.6 if command in RESULTS else 1))
        out = folder / (command if command in ("run", "validate") else f"{command}{number}")
        wrong = trouble(command, folder, out, after_s, whole)
        if wrong:
            found.append(f"{command}, {after_s:.2f} s after its first result: {wrong}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(MADE), default=list(MADE))
    options = parser.parse_args(arguments)
    found: list[str] = []
    for command in options.only:
        with TemporaryDirectory() as name:
            wrong = troubles(command, options.times, Path(name), options.seed)
        print(f"{command}: killed {options.times} times, {len(wrong)} went wrong", flush=True)
        found += wrong
    for line in found:
        print(line)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
