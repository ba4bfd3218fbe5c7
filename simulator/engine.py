"""The discrete-event engine for one worker: one SimPy process.

The process sleeps on a single timeout, the earliest thing that can happen, takes everything of that instant together,
asks the policy once, and re-times what contends anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy

from policies.base import Policy
from simulator.collection import rare_collections
from simulator.worker_run import DENOISE_GPU, WorkerRun
from synerdiff.core import NO_SKIPS, Request, RunResult, SkipBudget, WorkerInfo
from synerdiff.engine.samples import make_samples, request_records, sorted_work
from synerdiff.profile.tables import Profile


def simulate(
    requests: Sequence[Request],
    policy: Policy,
    profile: Profile,
    *,
    decode_gpus: tuple[int, ...] = (DENOISE_GPU,),
    budget: SkipBudget = NO_SKIPS,
    dispersion_seed: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Replay requests (by arrival) through a policy on one worker whose denoise lane is on GPU 0.

    ``decode_gpus`` gives the GPU of each decode lane: lanes on another GPU do not contend. ``on_progress`` is told now
    and then how many samples have ended. Raises InputError on what the profile cannot serve, ContractError when the
    policy breaks the contract.
    """
    samples = make_samples(requests, profile, budget)
    sample_rows = max((sample.full_rows for sample in samples), default=1)
    policy.reset(WorkerInfo(profile.max_rows, DENOISE_GPU, decode_gpus, sample_rows), profile)
    simulation = WorkerRun(samples, policy, profile, decode_gpus, dispersion_seed, on_progress)
    environment = simpy.Environment()
    environment.process(simulation.run(environment))
    with rare_collections():
        environment.run()
    return RunResult(
        requests=request_records(requests, samples),
        work=sorted_work([*simulation.step_records, *simulation.chunk_records]),
        sample_names=[sample.name for sample in samples],
        end_ns=int(environment.now),
        decisions=simulation.decisions,
    )
