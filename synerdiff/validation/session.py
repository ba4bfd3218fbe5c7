"""Prediction against hardware: profile cells and runs, interleaved in one process, then the simulator's view of each.

Machines drift within seconds, so between any two runs a pass over all cells is made, and a run is predicted with the
times of the passes around it. Slowdowns are ratios and are pooled over all passes. What is compared is the median over
repeats.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from policies.base import Policy
from policies.registry import build_policy
from real_runner.engine import run_real
from real_runner.hardware import chunking_of
from simulator import simulate
from synerdiff.core import NO_SKIPS, Decision, InputError, Request, RunResult, SkipBudget, View, WorkerInfo
from synerdiff.experiments.one_run import time_scale_for_load
from synerdiff.profile.tables import Profile
from synerdiff.validation.calibration import Cells, CellTimes, all_times_scaled, cells_for, refreshed, take_pass
from traces.scaling import scaled

if TYPE_CHECKING:
    from real_runner.engine import RealRun
    from real_runner.hardware import Hardware


class BusyCores(NamedTuple):
    """Averages in cores; None where the system does not tell."""

    others: float | None
    """Kept busy by other processes."""
    stolen: float | None
    """Ready to run but not run by the host."""


UNKNOWN = BusyCores(None, None)


class MachineLoad:
    """From Linux's /proc/stat and this process's own time."""

    def __init__(self) -> None:
        self._since = self._now()

    def load(self) -> BusyCores:
        """Since the start."""
        now = self._now()
        if now is None or self._since is None:
            return UNKNOWN
        wall_s, busy_s, own_s, stolen_s = (after - before for after, before in zip(now, self._since, strict=True))
        return BusyCores(max(0.0, (busy_s - own_s) / wall_s), stolen_s / wall_s)

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


SATURATION = float("inf")
"""The load of a burst: all requests at once, for throughput."""
FEWEST_REPEATS = 7
PASSES_AROUND = 2
"""Passes before a run and after it from which its times are taken: single pieces scatter more than speed drifts
between neighbouring passes."""


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
class ValidationPlan:
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
    """How many passes over the cells came before it."""
    planning: Profile
    """What the policy planned with, in both engines: the cells of all passes that came before."""
    requests: Sequence[Request]
    run: RealRun
    predicted: RunResult | None = None
    low: RunResult | None = None
    """All times multiplied by the smaller factor."""
    high: RunResult | None = None


@dataclass(slots=True)
class Validation:
    """Everything that was measured, before anything is concluded."""

    plan: ValidationPlan
    profile: Profile
    """As it was shipped."""
    cells: Cells
    time_scales: dict[float, float]
    passes: list[CellTimes]
    """Some before the first run, one after each run."""
    observations: dict[Case, list[Observation]] = field(default_factory=dict)
    load: BusyCores = UNKNOWN
    """What else kept the machine busy meanwhile."""

    @property
    def repeats(self) -> int:
        """Repeats of which every case was run."""
        return min((len(runs) for runs in self.observations.values()), default=0)

    @property
    def pooled(self) -> Profile:
        """From all passes."""
        return refreshed(self.profile, self.passes, self.passes)

    def profile_of(self, observed: Observation) -> Profile:
        """Times from the passes around that run, slowdowns from all."""
        around = self.passes[max(0, observed.place - PASSES_AROUND) : observed.place + PASSES_AROUND]
        return refreshed(self.profile, around, self.passes)


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
    plan: ValidationPlan,
    profile: Profile,
    requests: Sequence[Request],
    hardware: Hardware,
    stop: threading.Event,
    on_progress: OnProgress,
) -> Validation:
    """Passes over the cells, then for each repeat every case, with a pass after each; ``stop`` ends it.

    Cases take turns in going first. A run that ends early (a hung lane, a broken contract) raises its error.
    """
    guided = any(request.guidance_scale > 1 for request in requests)
    info = WorkerInfo(profile.max_rows, 0, (0,) * len(hardware.decode), 2 if guided else 1)
    even_only = plan.budget.fraction_ppm == 0 and all(request.guidance_scale > 1 for request in requests)
    cells = cells_for(profile, _most_rows(plan, profile, info), _chunkings(plan, profile, info), even_only)
    total = plan.repeats * len(plan.cases) + PASSES_AROUND
    done = 0

    def report(what: str) -> None:
        nonlocal done
        done += 1
        on_progress(done, total, what)

    for name in cells.chunkings:
        hardware.warm_up(cells.rows, chunking_of(profile, name))
    watch = MachineLoad()
    passes: list[CellTimes] = []
    for _ in range(PASSES_AROUND):
        passes.append(take_pass(hardware, profile, cells))
        report("profile cells")
    first = refreshed(profile, passes, passes)
    scales = {load: 0.0 if load == SATURATION else time_scale_for_load(requests, first, load) for load in plan.loads}
    session = Validation(plan, profile, cells, scales, passes, {case: [] for case in plan.cases})
    for repeat in range(plan.repeats):
        turn = repeat % len(plan.cases)
        for case in plan.cases[turn:] + plan.cases[:turn]:
            if stop.is_set():
                break
            offered = _at_scale(requests, session.time_scales[case.load])
            planning = session.pooled
            run = run_real(
                offered, Planned(build_policy(case.policy), planning), planning, hardware, budget=plan.budget, stop=stop
            )
            if run.error is not None:
                raise run.error
            passes.append(take_pass(hardware, profile, cells))
            if not stop.is_set():
                session.observations[case].append(Observation(repeat, len(passes) - 1, planning, offered, run))
            report(case.label)
    session.load = watch.load()
    return session


def predict(session: Validation, lanes: int, on_progress: OnProgress) -> None:
    """Fill in what the simulator says about every observed run of the complete repeats."""
    plan = session.plan
    total = session.repeats * len(plan.cases)
    done = 0
    for repeat in range(session.repeats):
        for case in plan.cases:
            observed = session.observations[case][repeat]
            times = session.profile_of(observed)
            observed.predicted = _simulated(session, case, observed, times, lanes)
            if not case.saturated:
                low, high = (all_times_scaled(times, factor) for factor in plan.range_factors)
                observed.low = _simulated(session, case, observed, low, lanes)
                observed.high = _simulated(session, case, observed, high, lanes)
            done += 1
            on_progress(done, total, f"predicting {case.label}")


def _simulated(session: Validation, case: Case, observed: Observation, times: Profile, lanes: int) -> RunResult:
    policy = Planned(build_policy(case.policy), observed.planning)
    return simulate(observed.requests, policy, times, decode_gpus=(0,) * lanes, budget=session.plan.budget)


def _at_scale(requests: Sequence[Request], scale: float) -> list[Request]:
    if scale == 0:
        return [replace(request, arrival_ns=0) for request in requests]
    return scaled(requests, scale)


def _chunkings(plan: ValidationPlan, profile: Profile, info: WorkerInfo) -> list[str]:
    names = []
    for name in plan.policies:
        policy = build_policy(name)
        policy.reset(info, profile)
        names.append(policy.chunking)
    return names


def _most_rows(plan: ValidationPlan, profile: Profile, info: WorkerInfo) -> int:
    """Rows of the largest step that any of the policies can make: its batch, when it has one."""
    most = 0
    for name in plan.policies:
        policy: Any = build_policy(name)
        policy.reset(info, profile)
        batch = getattr(policy, "batch", 0)
        most = max(most, batch * info.sample_rows if batch else profile.max_rows)
    return most
