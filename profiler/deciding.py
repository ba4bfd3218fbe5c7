"""How long a decision takes on this host: what the lead of a GPU's next step covers besides its launch."""

from __future__ import annotations

import time

from policies.registry import build_policy
from synerdiff.core import Request, SkipBudget, WorkerInfo
from synerdiff.device.cuda import POLL_S
from synerdiff.engine.policy import PolicyCalls
from synerdiff.engine.samples import make_samples
from synerdiff.engine.worker import Worker
from synerdiff.profile.capacity import default_batch
from synerdiff.profile.tables import Profile

POLICY = "synerdiff-feedback"
"""The one that computes most at a decision."""
DECISIONS = 60
WARM_UP = 10


def decision_times(profile: Profile, count: int = DECISIONS) -> list[int]:
    """``count`` times (ns) from a look at the events until a decision has been applied, the sleep between two looks
    included: the policy decides about steps at its full batch while as many samples wait.

    Raises InputError for a profile without slowdowns.
    """
    rows = min(2, profile.max_rows)
    images = 2 * default_batch(profile, rows)
    request = Request(0, 0, WARM_UP + count + 1, images=images, guidance_scale=float(rows))
    samples = make_samples([request], profile, SkipBudget())
    policy = PolicyCalls(build_policy(POLICY))
    policy.reset(WorkerInfo(profile.max_rows, 0, (0,), rows), profile)
    worker = Worker(samples, policy.name, 1, profile.max_rows, (0,))
    for sample in samples:
        worker.enter(sample)
    times_ns, now_ns = [], 0
    for _ in range(WARM_UP + count):
        since_ns = time.monotonic_ns()
        time.sleep(POLL_S)
        worker.apply(policy.decide(worker.look(now_ns, closed=False)), now_ns)
        times_ns.append(time.monotonic_ns() - since_ns)
        step = worker.step
        assert step is not None
        now_ns += profile.step_ns(step.rows)
        worker.end_step(now_ns)
    return times_ns[WARM_UP:]
