"""How fast the simulator is: batch-steps per CPU-second, beside a bare SimPy loop in the same run.

    python benchmarks/engine.py [--requests 20000] [--policy continuous-serial ...]

Prints ratios: on a shared machine absolute times drift, the ratio to the bare loop drifts less.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time

import simpy

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import NS_PER_S, Request
from synerdiff.profile.capacity import serial_capacity_samples_per_s
from synerdiff.profile.folder import find_profile, load_profile

STEPS = 30
LOAD = 0.8


def bare_simpy_events_per_s(events: int = 300_000) -> float:
    environment = simpy.Environment()

    def ticking():
        for _ in range(events):
            yield environment.timeout(3)

    environment.process(ticking())
    start = time.process_time()
    environment.run()
    return events / (time.process_time() - start)


def poisson(count: int, rate_per_s: float) -> list[Request]:
    source = random.Random(1)
    arrival_ns, requests = 0, []
    for number in range(count):
        arrival_ns += round(source.expovariate(rate_per_s) * NS_PER_S)
        requests.append(Request(number, arrival_ns, STEPS))
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1_000, 20_000, 100_000])
    parser.add_argument("--policy", nargs="+", default=["continuous-serial", "continuous-parallel"])
    parser.add_argument("--profile", default="h200-sdxl-estimated")
    arguments = parser.parse_args()
    profile = load_profile(find_profile(arguments.profile))
    rate_per_s = LOAD * serial_capacity_samples_per_s(profile, STEPS, 8)
    print(f"{STEPS} guided steps, load {LOAD}, {profile.label}, Python {sys.version.split()[0]}")
    for policy in arguments.policy:
        for count in arguments.requests:
            requests = poisson(count, rate_per_s)
            bare = bare_simpy_events_per_s()
            start = time.process_time()
            result = simulate(requests, build_policy(policy), profile)
            taken_s = time.process_time() - start
            steps = sum(1 for work in result.work if work.kind == "step")
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{policy:20} {count:7,} requests: {taken_s:6.2f} CPU-s, {steps / taken_s:8,.0f} batch-steps/CPU-s, "
                f"{taken_s / count * 1e6:5.0f} us/request, a step costs {bare * taken_s / steps:4.1f} bare SimPy "
                f"timeouts, peak {memory_mb:,.0f} MB"
            )
            del result


if __name__ == "__main__":
    main()
