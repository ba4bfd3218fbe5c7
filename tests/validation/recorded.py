"""Validations whose hardware is the simulator: recorded runs and passes over the cells with a known truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from real_runner.account import Dispatch
from synerdiff.core import RunResult
from synerdiff.experiments.run import RunSpec, execute
from synerdiff.profile.tables import Profile
from synerdiff.validation.calibration import CellTimes, Overlap
from synerdiff.validation.session import Observation, Validation, ValidationPlan
from tests.builders import affine_profile, requests_at

DISPATCH_NS = 200_000


def contended() -> Profile:
    slowdowns = {1: (1_500_000, 1_400_000), 32: (1_300_000, 1_200_000)}
    return affine_profile(slowdowns=slowdowns, overheads={"step_dispatch": DISPATCH_NS, "chunk_dispatch": DISPATCH_NS})


def times_of(profile: Profile, factor: float = 1.0, offsets_ns: Sequence[int] = (DISPATCH_NS,) * 3) -> CellTimes:
    """A pass that finds the profile's times multiplied by a factor, plus each of the offsets, and its slowdowns."""

    def samples(ns: int) -> list[int]:
        return [round(ns * factor) + offset for offset in offsets_ns]

    return CellTimes(
        {rows: samples(cell.median) for rows, cell in profile.steps.items()},
        {},
        {name: [samples(cell.median) for cell in cells] for name, cells in profile.chunks.items()},
        {name: [cell.median] for name, cell in profile.overheads.items()},
        {
            (name, chunk, rows): (Overlap(cell.step.median, 1e6, 1), Overlap(cell.chunk.median, 1e6, 1))
            for (name, chunk), cells in profile.corun.items()
            for rows, cell in cells.items()
        },
    )


def recorded(result: RunResult) -> Any:
    """A simulated run as the runner would record it: a lane's piece begins once it has been handed over."""
    dispatch = Dispatch()
    work = []
    for record in result.work:
        wait_ns = min(DISPATCH_NS, record.end_ns - record.start_ns)
        if record.kind == "step":
            dispatch.step_queued.append(False)
        (dispatch.step_ns if record.kind == "step" else dispatch.chunk_ns).append(wait_ns)
        work.append(record._replace(start_ns=record.start_ns + wait_ns))
    return SimpleNamespace(result=replace(result, work=work), faults=[], dispatch=dispatch)


def recorded_session(
    profile: Profile,
    truth: Profile,
    passes: Callable[[int], CellTimes],
    *,
    loads: tuple[float, ...] = (0.5, 0.8),
    policies: tuple[str, ...] = ("continuous-serial", "continuous-parallel"),
    requests: tuple[int, float, int] = (60, 30, 5),
    repeats: int = 3,
) -> Validation:
    """Some repeats on hardware that keeps to ``truth``; ``passes(n)`` is the pass after repeat n (-1: the first).

    ``requests``: how many, milliseconds between two at load 1, steps.
    """
    count, gap_ms, steps = requests
    spec = RunSpec(
        profile=profile, source=tuple(requests_at(*(gap_ms * i for i in range(count)), steps=steps)), policy="static"
    )
    plan = ValidationPlan(spec, policies, loads, repeats)
    session = Validation(plan, profile, {load: 1 / load for load in loads}, [passes(-1)])
    for case in plan.cases:
        session.observations[case] = []
        for repeat in range(plan.repeats):
            session.passes.append(passes(repeat))
            planning = session.pooled
            run = recorded(execute(session.prepared(case, truth, truth)).result)
            prepared = session.prepared(case, planning, planning)
            observed = Observation(repeat, len(session.passes) - 1, prepared, run)
            now = session.profile_of(observed)
            observed.predicted = session.predicted(case, now, now)
            session.observations[case].append(observed)
    return session
