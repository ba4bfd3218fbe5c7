"""How fast the simulator is: batch-steps per CPU-second, beside a bare SimPy loop in the same run; what decisions take.

    python -m benchmarks.engine [--requests 20000] [--policy continuous-serial ...] [--fleets 8 64]

Prints ratios: on a shared machine absolute times drift, the ratio to the bare loop drifts less. Decisions are timed in
a run of their own, in CPU time without garbage collection, whose pauses grow with the records that a simulation keeps.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time

import simpy

from policies.base import Policy
from policies.registry import build_policy
from simulator import simulate
from synerdiff.config.cluster import cluster_of
from synerdiff.core import PPM, Decision, SkipBudget, View, WorkerInfo
from synerdiff.experiments.run import Prepared, RunSpec, execute, prepare
from synerdiff.profile.folder import find_profile
from synerdiff.profile.tables import Profile
from traces.generate import generate

STEPS = 30
LOAD = 0.8
FLEET_REQUESTS = 2000
BARE_EVENTS = 300_000


def bare_simpy_events_per_s() -> float:
    """Timeouts per CPU-second of a SimPy process that does nothing else."""
    environment = simpy.Environment()
    environment.process(environment.timeout(3) for _ in range(BARE_EVENTS))
    start = time.process_time()
    environment.run()
    return BARE_EVENTS / (time.process_time() - start)


class Around:
    """A policy that is another one, ``inner``."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.chunking = inner, inner.chunking

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.inner.reset(worker, profile)
        self.chunking = self.inner.chunking

    def decide(self, view: View) -> Decision:
        return self.inner.decide(view)


class Timed(Around):
    """Notes how many ns of CPU time each decision takes."""

    def __init__(self, inner: Policy) -> None:
        super().__init__(inner)
        self.taken_ns: list[int] = []

    def decide(self, view: View) -> Decision:
        start = time.thread_time_ns()
        decision = self.inner.decide(view)
        self.taken_ns.append(time.thread_time_ns() - start)
        return decision


def decisions_us(prepared: Prepared) -> tuple[float, float, float]:
    """(median, 99.9th percentile, worst) of a decision in the run."""
    policy = Timed(prepared.policy())
    gc.collect()
    gc.disable()
    simulate(prepared.served, policy, prepared.profile, budget=prepared.budget)
    gc.enable()
    taken = sorted(policy.taken_ns)
    return taken[len(taken) // 2] / 1e3, taken[len(taken) * 999 // 1000] / 1e3, taken[-1] / 1e3


def fleet_us(profile: str, workers: int) -> float:
    """CPU time of a decision in a fleet, all of the simulation included: the least of three runs."""
    requests = tuple(generate("poisson", seed=1, requests=FLEET_REQUESTS, mix="fixed", steps=STEPS))
    cluster = cluster_of({"workers": [{"denoise_gpu": index} for index in range(workers)]})
    spec = RunSpec(
        profile=find_profile(profile), source=requests, policy="continuous-serial", load=LOAD, cluster=cluster
    )
    prepared = prepare(spec)
    taken_us = []
    for _ in range(3):
        start = time.process_time()
        outcome = execute(prepared)
        taken_us.append((time.process_time() - start) * 1e6 / outcome.result.decisions)
    return min(taken_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1_000, 20_000, 100_000])
    parser.add_argument("--policy", nargs="+", default=["continuous-serial", "continuous-parallel"])
    parser.add_argument("--profile", default="h200-sdxl-estimated")
    parser.add_argument("--skip-fraction", type=float, default=0.0)
    parser.add_argument("--fleets", type=int, nargs="*", default=[8, 64], help="workers; the first is the measure")
    arguments = parser.parse_args()
    budget = SkipBudget(round(arguments.skip_fraction * PPM))
    print(f"{STEPS} guided steps, load {LOAD}, {arguments.profile}, Python {sys.version.split()[0]}")
    for policy in arguments.policy:
        for count in arguments.requests:
            source = tuple(generate("poisson", seed=1, requests=count, mix="fixed", steps=STEPS))
            spec = RunSpec(
                profile=find_profile(arguments.profile), source=source, policy=policy, budget=budget, load=LOAD
            )
            prepared = prepare(spec)
            bare = bare_simpy_events_per_s()
            start = time.process_time()
            result = simulate(prepared.served, build_policy(policy), prepared.profile, budget=budget)
            taken_s = time.process_time() - start
            steps = sum(1 for work in result.work if work.kind == "step")
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            del result
            print(
                f"{policy:20} {count:7,} requests: {taken_s:6.2f} CPU-s, {steps / taken_s:8,.0f} batch-steps/CPU-s, "
                f"{taken_s / count * 1e6:5.0f} us/request, a step costs {bare * taken_s / steps:4.1f} bare SimPy "
                f"timeouts, peak {memory_mb:,.0f} MB"
            )
        middle, rare, worst = decisions_us(prepared)
        print(f"{policy:20} a decision takes {middle:.1f} us (median), {rare:.0f} (99.9%), {worst:.0f} (worst)")
    costs = [fleet_us(arguments.profile, workers) for workers in arguments.fleets]
    for workers, cost_us in zip(arguments.fleets, costs, strict=True):
        print(f"{workers:4} workers: {cost_us:5.1f} us a decision, {cost_us / costs[0]:.2f} times the first")


if __name__ == "__main__":
    main()
