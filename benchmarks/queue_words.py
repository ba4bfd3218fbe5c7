"""Whether the word of a run (stable, near saturation, saturated) and the interval of its mean latency are right.

    python -m benchmarks.queue_words [--runs 200] [--first-seed 100000] [--jobs 2] [--out docs/data/queue-words.csv]

M/D/1 queues: Poisson arrivals at a nominal rate, one second of service each, 2,000 requests a run, through the same
way as `synerdiff simulate`. Their mean latency is 1 + load / (2 * (1 - load)) seconds (Pollaczek-Khinchine).
Nothing was chosen on these seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random

from synerdiff.core import NS_PER_S, Request
from synerdiff.experiments.backends import LokyBackend
from synerdiff.experiments.run import RunSpec, execute, prepare
from synerdiff.files import write_rows
from synerdiff.profile.tables import Profile, Spread
from synerdiff.results.folder import STATES, state

REQUESTS = 2000
STABLE, NEAR, SATURATED = STATES
WORDS = {
    0.5: (STABLE,),
    0.6: (STABLE,),
    0.7: (STABLE,),
    0.8: (STABLE,),
    0.85: (STABLE,),
    0.9: (STABLE, NEAR),
    0.95: (NEAR, SATURATED),
}
WORDS |= dict.fromkeys((0.97, 1.0, 1.03), (NEAR, SATURATED)) | dict.fromkeys((1.1, 1.2), (SATURATED,))
"""Load -> what a run may be called; where the words part, only the interval is judged."""
JUDGED_WORDS = (0.5, 0.7, 0.85, 0.97, 1.0, 1.03, 1.1, 1.2)
INTERVALS_UNTIL = 0.95
WORDS_AIM, INTERVALS_AIM = 0.95, 0.93
HEADERS = ("load", "runs", STABLE, NEAR, SATURATED, "word right", "intervals", "covering")


STEPS, WHOLE = {1: Spread.exactly(NS_PER_S - 1)}, {"whole": (Spread.exactly(1),)}
SERVER = Profile("one-second", "estimated", None, STEPS, WHOLE, corun={}, overheads={})


@dataclass(frozen=True, slots=True)
class QueueRun:
    """What one run printed."""

    load: float
    word: str
    interval: bool
    covers: bool


def run(at: tuple[float, int], requests: int = REQUESTS) -> QueueRun:
    """One run at (load, seed)."""
    load, seed = at
    random = Random(seed)
    arrivals_s = accumulate(random.expovariate(load) for _ in range(requests))
    source = tuple(Request(i, round(at_s * NS_PER_S), 1, guidance_scale=1.0) for i, at_s in enumerate(arrivals_s))
    spec = RunSpec(profile=SERVER, source=source, policy="continuous-serial", parameters={"batch": 1})
    found = execute(prepare(spec)).described
    low, high = found["request_latency_mean_ci_low_s"], found["request_latency_mean_ci_high_s"]
    covers = low is not None and load < 1 and low <= 1 + load / (2 * (1 - load)) <= high
    return QueueRun(load, state(found["run"]["policy_load"], found), low is not None, covers)


def table(runs: Sequence[QueueRun]) -> list[tuple[float | int, ...]]:
    """A row for each load (``HEADERS``)."""
    rows = []
    for load in sorted({run.load for run in runs}):
        own = [run for run in runs if run.load == load]
        words = [sum(run.word == word for run in own) for word in (STABLE, NEAR, SATURATED)]
        right = sum(run.word in WORDS[load] for run in own)
        rows.append((load, len(own), *words, right, sum(run.interval for run in own), sum(run.covers for run in own)))
    return rows


def misses(rows: Sequence[tuple[float | int, ...]]) -> list[str]:
    """What misses its aim: 95% right words, and intervals that miss the mean in at most 7% of the runs."""
    lines = []
    for load, runs, *_, right, intervals, covering in rows:
        if load in JUDGED_WORDS and right < WORDS_AIM * runs:
            lines.append(f"load {load:g}: the word is right in {right} of {runs} runs")
        if load <= INTERVALS_UNTIL and intervals - covering > (1 - INTERVALS_AIM) * runs:
            lines.append(f"load {load:g}: {covering} of {intervals} printed intervals cover the mean, in {runs} runs")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=100_000)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    seeds = range(asked.first_seed, asked.first_seed + asked.runs)
    cases = [(load, seed) for load in WORDS for seed in seeds]
    rows = table(list(LokyBackend(asked.jobs).run_unordered(partial(run), cases)))
    print(*HEADERS, sep="\t")
    for row in rows:
        print(*row, sep="\t")
    print(*(misses(rows) or ["Every aim is met."]), sep="\n")
    if asked.out is not None:
        write_rows(asked.out, HEADERS, rows)


if __name__ == "__main__":
    main()
