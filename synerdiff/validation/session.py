"""Prediction against hardware: profile cells and runs, interleaved in one process, then the simulator's view of each.

Machines drift within seconds, so between any two runs a pass over all cells is made, and a run is predicted with the
times of the passes around it. Slowdowns are ratios and are pooled over all passes. What is compared is the median over
repeats.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from policies.registry import build_policy
from profiler.machine import device_name, software
from real_runner.engine import RealRun, run_real
from real_runner.hardware import Hardware, chunking_of, open_hardware
from synerdiff.core import NS_PER_S, InputError, WorkerInfo
from synerdiff.diffusion.execution import other_execution
from synerdiff.engine.policy import PolicyCalls
from synerdiff.experiments.run import Outcome, Prepared, RunSpec, Served, execute, prepare
from synerdiff.experiments.sources import Source
from synerdiff.profile.tables import Profile
from synerdiff.validation.calibration import Cells, CellTimes, cells_for, handed_over, refreshed, take_pass
from synerdiff.validation.lookups import Lookup, measured_cells, watched


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
class ValidationCase:
    """One policy at one load."""

    policy: str
    load: float

    @property
    def saturated(self) -> bool:
        """Whether all requests arrive at once."""
        return self.load == SATURATION

    @property
    def label(self) -> str:
        return f"{self.policy} at {'saturation' if self.saturated else f'load {self.load:g}'}"


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """What is validated."""

    spec: RunSpec
    """What all runs share: requests, skip budget, decode lanes; a case sets policy and arrivals."""
    policies: tuple[str, ...]
    loads: tuple[float, ...]
    repeats: int = FEWEST_REPEATS

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise InputError(f"--repeats is {self.repeats}; at least 1 is needed.")
        for load in self.loads:
            if not (0 < load <= 2 or load == SATURATION):
                raise InputError(f"--load is {load:g}; a number above 0 and up to 2 is needed.")

    @property
    def cases(self) -> list[ValidationCase]:
        """Every policy at every load."""
        return [ValidationCase(policy, load) for load in self.loads for policy in self.policies]

    def time_scales(self, profile: Profile) -> dict[float, float]:
        """Load -> by what the arrivals are stretched, on this profile."""
        specs = {load: replace(self.spec, profile=profile, load=load) for load in self.loads if load != SATURATION}
        return {load: prepare(spec).time_scale for load, spec in specs.items()}


@dataclass
class Observation:
    """One run of a case, and what was predicted for it."""

    repeat: int
    place: int
    """How many passes over the cells came before it."""
    prepared: Prepared
    """Its profile is what the policy planned with, in both engines: the cells of all passes that came before."""
    run: RealRun
    predicted: Outcome | None = None

    @cached_property
    def measured(self) -> Outcome:
        """The run with its work as the simulator records it, hand-over included."""
        return Outcome(self.prepared, Served(replace(self.run.result, work=handed_over(self.run))))


@dataclass(slots=True)
class Validation:
    """Everything that was measured, before anything is concluded."""

    plan: ValidationPlan
    profile: Profile
    """As it was shipped."""
    time_scales: dict[float, float]
    """Load -> by what the arrivals are stretched."""
    passes: list[CellTimes]
    """Some before the first run, one after each run."""
    observations: dict[ValidationCase, list[Observation]] = field(default_factory=dict)
    lookups: set[Lookup] = field(default_factory=set)
    """Cells that predictions have looked up."""
    load: BusyCores = UNKNOWN
    """What else kept the machine busy meanwhile."""

    @property
    def repeats(self) -> int:
        """Repeats of which every case was run."""
        return min((len(runs) for runs in self.observations.values()), default=0)

    @property
    def unmeasured(self) -> set[Lookup]:
        """Cells that predictions have looked up and that no pass has measured."""
        return self.lookups - measured_cells(self.passes)

    @property
    def pooled(self) -> Profile:
        """From all passes."""
        return refreshed(self.profile, self.passes, self.passes)

    def profile_of(self, observed: Observation) -> Profile:
        """Times from the passes around that run, slowdowns from all."""
        around = self.passes[max(0, observed.place - PASSES_AROUND) : observed.place + PASSES_AROUND]
        return refreshed(self.profile, around, self.passes)

    def predicted(self, case: ValidationCase, times: Profile, planning: Profile) -> Outcome:
        """The case simulated with these times under a policy that plans with others; what it looks up is noted."""
        watching = watched(times), watched(planning)
        run = self.prepared(case, *watching)
        for one in watching:
            one.lookups.clear()
        outcome = execute(run)
        calls = PolicyCalls(run.policy())
        calls.reset(WorkerInfo(times.max_rows, 0, run.spec.decode_gpus, 2), planning)
        watching[0].note_decode(calls.chunking)
        self.lookups |= watching[0].lookups | watching[1].lookups
        return outcome

    def prepared(self, case: ValidationCase, times: Profile, planning: Profile) -> Prepared:
        """The case's run on an engine with these times, under a policy that plans with others."""
        scale = None if case.saturated else self.time_scales[case.load]
        spec = replace(self.plan.spec, profile=times, planning=planning, policy=case.policy, time_scale=scale)
        run = prepare(spec)
        return run.at_once(run.images) if case.saturated else run


OnProgress = Callable[[int, int, str], None]


def require(plan: ValidationPlan, model: str | None) -> str:
    """The model to open: the one given, else the profile's. InputError for an estimated profile, or one of no model."""
    profile = prepare(plan.spec).profile
    if profile.estimated:
        raise InputError(f"profile '{profile.name}' is estimated; only a measured one can be validated.")
    if profile.others:
        raise InputError(
            f"the requests ask for several resolutions of profile '{profile.name}'; a validation measures every cell "
            "again that a prediction looks up, which is done for one resolution: give a trace of one (synerdiff run "
            "serves several)."
        )
    if not (name := model or profile.head.model):
        raise InputError(f"profile '{profile.name}' does not say for which model it was made; give --model.")
    return name


def opened(plan: ValidationPlan, model: str, device: str, execution: str | None = None) -> Hardware:
    """The model on its lanes, to be closed by leaving it."""
    return open_hardware(model, device, prepare(plan.spec).profile, execution=execution)


def facts(session: Validation, hardware: Hardware) -> dict[str, Any]:
    """What the report says about machine and requests."""
    spec, prepared, model = session.plan.spec, prepare(session.plan.spec), hardware.model
    return {
        "model": model.name,
        "device": device_name(model.device),
        "execution": str(model.execution),
        "not_as_measured": other_execution(prepared.profile, model.execution, model.device.type == "cuda"),
        "software": ", ".join(f"{key} {value}" for key, value in software().items()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "trace": spec.source.name if isinstance(spec.source, Source) else "",
        "requests": len(prepared.served),
        "warm_up_s": hardware.warm_up_ns / NS_PER_S,
    }


def measure_session(
    plan: ValidationPlan, hardware: Hardware, stop: threading.Event, on_progress: OnProgress
) -> Validation:
    """Passes over the cells, then for each repeat every case, with a pass after each; ``stop`` ends it.

    Cases take turns in going first. A run that ends early (a hung lane, a broken contract) raises its error.
    """
    profile, how = prepare(plan.spec).profile, hardware.model.execution
    # The cells are those of what runs here.
    profile = replace(profile, head=profile.head.model_copy(update={"execution": how.kind, "levers": how.levers}))
    cells = cells_of(plan, profile, len(hardware.decode))
    total, places = plan.repeats * len(plan.cases) + PASSES_AROUND, count(1)

    def report(what: str) -> None:
        on_progress(next(places), total, what)

    for name in cells.chunkings:
        hardware.warm_up(cells.rows, chunking_of(profile, name))
    watch = MachineLoad()
    passes: list[CellTimes] = []
    for _ in range(PASSES_AROUND):
        passes.append(take_pass(hardware, profile, cells))
        report("profile cells")
    scales = plan.time_scales(refreshed(profile, passes, passes))
    session = Validation(plan, profile, scales, passes, {case: [] for case in plan.cases})
    for repeat in range(plan.repeats):
        turn = repeat % len(plan.cases)
        for case in plan.cases[turn:] + plan.cases[:turn]:
            if stop.is_set():
                break
            planning = session.pooled
            prepared = session.prepared(case, planning, planning)
            run = run_real(prepared.served, prepared.policy(), planning, hardware, budget=prepared.budget, stop=stop)
            if run.error is not None:
                raise run.error
            passes.append(take_pass(hardware, profile, cells))
            if not stop.is_set():
                session.observations[case].append(Observation(repeat, len(passes) - 1, prepared, run))
            report(case.label)
    session.load = watch.load()
    return session


def predict(session: Validation, on_progress: OnProgress) -> None:
    """Fill in what the simulator says about every observed run of the complete repeats."""
    turns = [(repeat, case) for repeat in range(session.repeats) for case in session.plan.cases]
    for done, (repeat, case) in enumerate(turns, 1):
        observed = session.observations[case][repeat]
        observed.predicted = session.predicted(case, session.profile_of(observed), observed.prepared.profile)
        on_progress(done, len(turns), f"predicting {case.label}")


def cells_of(plan: ValidationPlan, profile: Profile, decode_lanes: int) -> Cells:
    """What the plan's runs can meet: rows up to the largest step of any policy (its batch, when it has one), the
    chunkings that the policies launch, and all that they look up when every case is simulated with this profile."""
    served = prepare(plan.spec).served
    guided = [request.guidance_scale > 1 for request in served]
    info = WorkerInfo(profile.max_rows, 0, (0,) * decode_lanes, 2 if any(guided) else 1)
    most, chunkings = 0, []
    for name in plan.policies:
        policy: Any = build_policy(name)
        PolicyCalls(policy).reset(info, profile)
        batch = getattr(policy, "batch", 0)
        most = max(most, batch * info.sample_rows if batch else profile.max_rows)
        chunkings.append(policy.chunking)
    even_only = plan.spec.budget.fraction_ppm == 0 and all(guided)
    cells = cells_for(profile, most, chunkings, even_only=even_only)
    rehearsal = Validation(plan, profile, plan.time_scales(profile), [])
    for case in plan.cases:
        rehearsal.predicted(case, profile, profile)
    rows = {int(one[-1]) for one in rehearsal.lookups if one[0] != "chunk"}
    names = [str(one[1]) for one in sorted(rehearsal.lookups, key=str) if one[0] != "step"]
    return Cells(tuple(sorted({*cells.rows, *rows})), tuple(dict.fromkeys([*cells.chunkings, *names])))
