"""Prediction against hardware: profile cells and runs, interleaved in one process, then the simulator's view of each.

Machines drift within seconds, so what runs alone is measured between any two runs, and a run is predicted from the
passes just before and just after it. Slowdowns are ratios and are pooled over all passes, one per repeat. What is
compared is the median over repeats.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.base import Policy
from policies.registry import build_policy
from synerdiff.core import NO_SKIPS, Decision, InputError, Request, RunResult, SkipBudget, View, WorkerInfo
from synerdiff.profile import Profile
from synerdiff.studies.one_run import time_scale_for_load
from synerdiff.studies.refresh import Cells, Coruns, Refresh, Solo, all_times_scaled, cells_for, refreshed

if TYPE_CHECKING:
    from profiler.sampling import Rule
    from real_runner.engine import RealRun
    from real_runner.hardware import Hardware

SATURATION = float("inf")
"""The load of a burst: all requests at once, for throughput."""
FEWEST_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Case:
    """One policy at one load."""

    policy: str
    load: float

    @property
    def saturated(self) -> bool:
        return self.load == SATURATION

    @property
    def label(self) -> str:
        return f"{self.policy} at {'saturation' if self.saturated else f'load {self.load:g}'}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is validated. ``range_factors``: by what all times are multiplied for the simulated range."""

    policies: tuple[str, ...]
    loads: tuple[float, ...]
    repeats: int = FEWEST_REPEATS
    budget: SkipBudget = NO_SKIPS
    range_factors: tuple[float, float] = (0.98, 1.02)

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise InputError(f"--repeats is {self.repeats}; at least 1 is needed.")
        for load in self.loads:
            if not (0 < load <= 2 or load == SATURATION):
                raise InputError(f"--load is {load:g}; a number above 0 and up to 2 is needed.")

    @property
    def cases(self) -> list[Case]:
        return [Case(policy, load) for load in self.loads for policy in self.policies]


@dataclass(slots=True)
class Observation:
    """One run of a case, and what was predicted for it."""

    repeat: int
    place: int
    """Which pass over the solo cells came just before it."""
    requests: Sequence[Request]
    run: RealRun
    predicted: RunResult | None = None
    low: RunResult | None = None
    """All times multiplied by the smaller factor."""
    high: RunResult | None = None


@dataclass(slots=True)
class Session:
    """Everything that was measured, before anything is concluded."""

    plan: Plan
    profile: Profile
    """As it was shipped."""
    cells: Cells
    first: Profile
    """Refreshed at the start: what loads refer to and what the policies plan with, in both engines."""
    time_scales: dict[float, float]
    solos: list[Solo]
    """One before the first run, one after each run."""
    coruns: list[Coruns]
    """One before the first repeat, one after each repeat."""
    observations: dict[Case, list[Observation]] = field(default_factory=dict)
    others: float | None = None
    """Cores that other processes kept busy meanwhile, on average; None where the system does not tell."""

    @property
    def repeats(self) -> int:
        """Repeats of which every case was run and the closing cells were measured."""
        runs = min((len(found) for found in self.observations.values()), default=0)
        return max(0, min(runs, len(self.coruns) - 1))

    @property
    def pooled(self) -> Profile:
        """From all passes."""
        return refreshed(self.profile, self.solos, self.coruns)

    def profile_of(self, seen: Observation) -> Profile:
        """From what was measured just before and just after that run."""
        return refreshed(self.profile, self.solos[seen.place : seen.place + 2], self.coruns)


class Planned:
    """A policy that plans with a profile of its own, whatever the engine's times are."""

    def __init__(self, inner: Policy, planning: Profile) -> None:
        self.inner, self.planning = inner, planning
        self.NAME = getattr(inner, "NAME", "") or type(inner).__name__
        self.chunking = inner.chunking

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.inner.reset(worker, self.planning)
        self.chunking = self.inner.chunking

    def decide(self, view: View) -> Decision:
        return self.inner.decide(view)


OnProgress = Callable[[int, int, str], None]


def measure_session(
    plan: Plan,
    profile: Profile,
    requests: Sequence[Request],
    hardware: Hardware,
    rule: Rule,
    stop: threading.Event,
    on_progress: OnProgress,
) -> Session:
    """Cells, then for each repeat every case, with what runs alone measured after each; ``stop`` ends it.

    Cases take turns in going first. A run that ends early (a hung lane, a broken contract) raises its error.
    """
    from real_runner.engine import run_real
    from real_runner.hardware import chunking_of

    guided = any(request.guidance_scale > 1 for request in requests)
    info = WorkerInfo(profile.max_rows, 0, (0,) * len(hardware.decode), 2 if guided else 1)
    cells = cells_for(profile, _most_rows(plan, profile, info), _chunkings(plan, profile, info))
    total = plan.repeats * (len(plan.cases) + 1) + 1
    done = 0

    def report(what: str) -> None:
        nonlocal done
        done += 1
        on_progress(done, total, what)

    for name in cells.chunkings:
        hardware.warm_up(cells.rows, chunking_of(profile, name))
    watch = OtherLoad()
    refresh = Refresh(hardware, profile, cells, rule)
    coruns, solos = [refresh.coruns()], [refresh.solo()]
    first = refreshed(profile, solos, coruns)
    scales = {load: 0.0 if load == SATURATION else time_scale_for_load(requests, first, load) for load in plan.loads}
    session = Session(plan, profile, cells, first, scales, solos, coruns, {case: [] for case in plan.cases})
    report("profile cells")
    for repeat in range(plan.repeats):
        turn = repeat % len(plan.cases)
        for case in plan.cases[turn:] + plan.cases[:turn]:
            if stop.is_set():
                break
            offered = _at_scale(requests, session.time_scales[case.load])
            policy = Planned(build_policy(case.policy), first)
            run = run_real(offered, policy, first, hardware, budget=plan.budget, stop=stop)
            if run.error is not None:
                raise run.error
            solos.append(refresh.solo())
            if not stop.is_set():
                session.observations[case].append(Observation(repeat, len(solos) - 2, offered, run))
            report(case.label)
        if stop.is_set():
            break
        coruns.append(refresh.coruns())
        report("profile cells")
    session.others = watch.cores()
    return session


class OtherLoad:
    """How busy other processes keep the machine, from Linux's /proc/stat and this process's own time."""

    def __init__(self) -> None:
        self._since = self._now()

    def cores(self) -> float | None:
        """Cores that others kept busy since the start, on average."""
        now = self._now()
        if now is None or self._since is None:
            return None
        wall_s, busy_s, own_s = (after - before for after, before in zip(now, self._since, strict=True))
        return max(0.0, (busy_s - own_s) / wall_s)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """(wall, busy on all cores, own) seconds."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq = (int(field) for field in fields[:7])
        ticks = os.sysconf("SC_CLK_TCK")
        return time.monotonic(), (user + nice + system + irq + softirq) / ticks, time.process_time()


def predict(session: Session, lanes: int, on_progress: OnProgress) -> None:
    """Fill in what the simulator says about every observed run of the complete repeats."""
    plan = session.plan
    total = session.repeats * len(plan.cases)
    done = 0
    for repeat in range(session.repeats):
        for case in plan.cases:
            seen = session.observations[case][repeat]
            times = session.profile_of(seen)
            seen.predicted = _simulated(session, case, seen, times, lanes)
            if not case.saturated:
                low, high = (all_times_scaled(times, factor) for factor in plan.range_factors)
                seen.low = _simulated(session, case, seen, low, lanes)
                seen.high = _simulated(session, case, seen, high, lanes)
            done += 1
            on_progress(done, total, f"predicting {case.label}")


def _simulated(session: Session, case: Case, seen: Observation, times: Profile, lanes: int) -> RunResult:
    from simulator import simulate

    policy = Planned(build_policy(case.policy), session.first)
    return simulate(seen.requests, policy, times, decode_gpus=(0,) * lanes, budget=session.plan.budget)


def _at_scale(requests: Sequence[Request], scale: float) -> list[Request]:
    from dataclasses import replace

    from traces.scaling import scaled

    if scale == 0:
        return [replace(request, arrival_ns=0) for request in requests]
    return scaled(requests, scale)


def _chunkings(plan: Plan, profile: Profile, info: WorkerInfo) -> list[str]:
    names = []
    for name in plan.policies:
        policy = build_policy(name)
        policy.reset(info, profile)
        names.append(policy.chunking)
    return names


def _most_rows(plan: Plan, profile: Profile, info: WorkerInfo) -> int:
    """Rows of the largest step that any of the policies can make: its batch, when it has one."""
    most = 0
    for name in plan.policies:
        policy: Any = build_policy(name)
        policy.reset(info, profile)
        batch = getattr(policy, "batch", 0)
        most = max(most, batch * info.sample_rows if batch else profile.max_rows)
    return most
