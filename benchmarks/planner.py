"""How long SynerDiff's planning takes: every plan that runs ask for, memo misses and the rest, in pure Python.

    python benchmarks/planner.py [--requests 300]

A miss is one call of the dynamic program. CPU time without garbage collection (its pauses grow with the records that a
simulation keeps, not with the plan), so that neither other processes nor the simulator count; it drifts: run it twice.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

from policies.planner import Planner
from policies.synerdiff import SynerDiff
from profiler.estimate import estimate_profile
from synerdiff.core import SkipBudget
from synerdiff.experiments.run import RunSpec, execute, prepare
from traces.generate import generate

CASES = [
    (contention, chunking, mix, theta)
    for contention in ("mild", "moderate", "severe")
    for chunking in ("c4", "c8")
    for mix in ("guided-20-50", "unguided-4")
    for theta in (None, 0.9, 0.97)
]
"""theta None: synerdiff-feedback."""


def timed(owner: type, name: str, into: list[int]) -> Any:
    """Let ``owner.name`` note how many ns of CPU time each call takes; returns the function that it was."""
    original = getattr(owner, name)

    def measured(*arguments: Any) -> Any:
        start = time.thread_time_ns()
        result = original(*arguments)
        into.append(time.thread_time_ns() - start)
        return result

    setattr(owner, name, measured)
    return original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=300)
    requests_count = parser.parse_args().requests
    misses: list[int] = []
    asked: list[int] = []
    all_misses: list[int] = []
    timed(Planner, "plan", misses)
    timed(SynerDiff, "action", asked)
    heads = f"{'asked':>7} {'median us':>9} {'misses':>7} {'mean us':>8} {'worst us':>8}"
    print(f"{'contention, chunking, mix, theta':44} {heads}")
    for contention, chunking, mix, theta in CASES:
        profile = estimate_profile("h200", "sdxl", contention)
        parameters = {"chunking": chunking} | ({} if theta is None else {"theta": theta})
        misses.clear()
        asked.clear()
        spec = RunSpec(
            profile=profile,
            source=tuple(generate("poisson", seed=1, requests=requests_count, mix=mix)),
            policy="synerdiff-feedback" if theta is None else "synerdiff",
            parameters=parameters,
            budget=SkipBudget(300_000),
            load=0.9,
        )
        prepared = prepare(spec)
        gc.collect()
        gc.disable()
        execute(prepared)
        gc.enable()
        label = f"{contention}, {chunking}, {mix}, {'feedback' if theta is None else theta}"
        middle = sorted(asked)[len(asked) // 2] / 1000 if asked else 0.0
        mean, worst = (sum(misses) / len(misses) / 1000, max(misses) / 1000) if misses else (0.0, 0.0)
        print(f"{label:44} {len(asked):7,} {middle:9.1f} {len(misses):7,} {mean:8.0f} {worst:8.0f}")
        all_misses += misses
    all_misses.sort()
    mean, p999 = sum(all_misses) / len(all_misses) / 1e6, all_misses[int(0.999 * len(all_misses))] / 1e6
    worst = all_misses[-1] / 1e6
    print(f"all {len(all_misses):,} misses: mean {mean:.3f} ms, 99.9% below {p999:.2f} ms, worst {worst:.2f} ms")


if __name__ == "__main__":
    main()
