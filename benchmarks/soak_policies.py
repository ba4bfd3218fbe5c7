"""Soak of both engines: random policies that keep the contract and that break it, random traces, faults and interrupts.

    python -m benchmarks.soak_policies [--seeds 20000] [--minutes 3]

Each seed plays one trial; the seeds are always the same ones, in the same order. A trial goes wrong when anything but a
result or an error of the contract comes out of it, when a request is lost or ends in another way than it may, when the
two engines disagree on a run that nothing disturbs, when a thread is left, or (over the last half of all trials) when
memory grows by more than 5%. Exit code 1 then.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.engine import Around
from benchmarks.soak import resident_mib
from policies.base import Policy
from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import (
    NO_SKIPS,
    REUSE,
    ChunkLaunch,
    ContractError,
    Decision,
    InputError,
    Mode,
    Request,
    RunResult,
    SkipBudget,
    View,
)
from tests.builders import affine_profile
from tests.exact_lanes import rehearse

NAMES = ("static", "dynamic", "continuous-serial", "continuous-parallel", "chunked", "skip-cfg", "load-skip", "edf")
PROFILES = (
    affine_profile(),
    affine_profile(3, 1, 60),
    affine_profile(overheads={"result_copy": 500, "step_dispatch": 7}),
)
BUDGETS = (NO_SKIPS, SkipBudget(400_000, 1, 1, REUSE), SkipBudget(900_000, 0, 3, Mode.CONDITIONAL))
STATUSES = {"done", "rejected", "failed", "unfinished"}

Break = Callable[[View, Any, Any], Any]


def _raise(view: View, decision: Decision, luck: random.Random) -> Any:
    raise luck.choice(
        [ValueError("no"), KeyError(3), SystemExit(0), MemoryError(), ZeroDivisionError(), RecursionError()]
    )


def _write(view: View, decision: Decision, luck: random.Random) -> Any:
    for sample in [*view.waiting, *view.active, *view.decoding][:1]:
        name = luck.choice(["steps", "step_index", "skips_left", "admitted_ns", "chunks_done", "id", "guided", "phase"])
        setattr(sample, name, luck.choice([0, 1, -1, None, 10**9]))
    lane = luck.choice(view.decode_lanes)
    name = luck.choice(["sample", "chunks_left", "gpu", "started", "exclusive"])
    setattr(lane, name, luck.choice([None, 0, 1, 7, True, False]))
    return decision


def _write_view(view: View, decision: Decision, luck: random.Random) -> Any:
    setattr(view, luck.choice(["now_ns", "waiting", "gone", "running", "closed"]), 3)
    return decision


def _clear(view: Any, decision: Decision, luck: random.Random) -> Any:
    news = luck.choice([view.arrived, view.step_done, view.chunk_done, view.gone])
    luck.choice([news.clear, lambda: news.append(None)])()
    return decision


BREAKS: tuple[Break, ...] = (
    _raise,
    _write,
    lambda view, decision, luck: luck.choice([None, 0, "step", (), [], object()]),
    lambda view, decision, luck: decision._replace(admit=(luck.choice([-1, 10**6, "0", None]),)),
    lambda view, decision, luck: decision._replace(step=decision.step * 2 or ((0, Mode.GUIDED),)),
    lambda view, decision, luck: decision._replace(pad_rows=luck.choice([-1, 10**9, 1.5])),
    lambda view, decision, luck: decision._replace(
        chunks=(ChunkLaunch(luck.choice([-1, 0, 99]), luck.choice([0, 1, 9])),)
    ),
    lambda view, decision, luck: decision._replace(wake_at_ns=luck.choice([0, view.now_ns, 1.5, "soon", -(10**20)])),
    lambda view, decision, luck: decision._replace(step=()),
    lambda view, decision, luck: Decision(),
    lambda view, decision, luck: Decision(reject=tuple(sample.id for sample in view.waiting)),
    _write_view,
    _clear,
)
"""What a policy does instead of what it has decided; some of it is allowed at times."""


class Wild(Around):
    """Breaks the contract now and then."""

    def __init__(self, inner: Policy, luck: random.Random) -> None:
        super().__init__(inner)
        self.luck = luck

    def decide(self, view: View) -> Decision:
        decision = self.inner.decide(view)
        if self.luck.random() < 0.1:
            changed: Decision = self.luck.choice(BREAKS)(view, decision, self.luck)
            return changed
        return decision


class Interrupting(Around):
    """Sets ``stop`` at one of its decisions."""

    def __init__(self, inner: Policy, stop: threading.Event, at: int) -> None:
        super().__init__(inner)
        self.stop, self.left = stop, at

    def decide(self, view: View) -> Decision:
        self.left -= 1
        if not self.left:
            self.stop.set()
        return self.inner.decide(view)


def trace_of(luck: random.Random) -> list[Request]:
    at_ns, requests = 0, []
    for number in range(luck.randint(1, 25)):
        at_ns += luck.choice([0, 1, 1000, 10_000_000, 80_000_000])
        requests.append(
            Request(
                number,
                at_ns,
                luck.randint(1, 9),
                images=luck.choice([1, 1, 1, 2, 4]),
                guidance_scale=luck.choice([1.0, 4.0, 7.5]),
                slo_ns=luck.choice([None, 1, 200_000_000]),
                base_model=luck.choice(["", "", "", "a"]),
            )
        )
    return requests


def trial(seed: int, seen: Counter[str]) -> str:
    """Plays it; what is wrong, empty when all is well."""
    luck = random.Random(seed)
    requests, profile, budget = trace_of(luck), luck.choice(PROFILES), luck.choice(BUDGETS)
    name, lanes = luck.choice(NAMES), luck.choice([1, 1, 2])
    most = luck.choice([None, None, 1, 3])
    parameters = {"batch": luck.choice([1, 2, 5])}
    kind = luck.choice(["legal", "legal", "wild", "wild", "interrupted"])
    threads = threading.active_count()

    def policy() -> Any:
        made = build_policy(name, parameters)
        return Wild(made, random.Random(seed)) if kind == "wild" else made

    def simulated() -> RunResult:
        return simulate(requests, policy(), profile, decode_gpus=(0,) * lanes, budget=budget, max_concurrency=most)

    def rehearsed(stop: threading.Event | None = None, at: int = 0) -> RunResult:
        played = policy() if stop is None else Interrupting(policy(), stop, at)
        real = rehearse(requests, played, profile, lanes, budget, stop, most)
        if real.error is not None:
            if wrong := lost(requests, real.result, kind):
                raise RuntimeError(wrong) from real.error
            raise real.error
        return real.result

    results = []
    plays: list[Callable[[], RunResult]] = [simulated, rehearsed]
    if kind == "interrupted":
        plays = [lambda: rehearsed(threading.Event(), luck.randint(1, 20))]
    for play in plays:
        try:
            results.append(play())
        except (ContractError, InputError) as error:
            seen[f"{kind}: {type(error).__name__}"] += 1
            if kind == "legal":
                return f"a policy that keeps the contract was refused: {error}"
            continue
        except BaseException as error:  # the contract's wrapper lets nothing else through
            return f"{type(error).__name__}: {error}"
        seen[f"{kind}: a result"] += 1
        if wrong := lost(requests, results[-1], kind):
            return wrong
    if threading.active_count() > threads:
        return "a thread was left"
    return ""


def lost(requests: Sequence[Request], result: RunResult, kind: str) -> str:
    """Whether each request has ended once, as it may."""
    if [record.request.request_id for record in result.requests] != [request.request_id for request in requests]:
        return "a request was lost"
    for record in result.requests:
        if record.status not in STATUSES or (kind == "legal" and record.status not in ("done", "rejected")):
            return f"request {record.request.request_id} is {record.status}"
        stages = (record.admitted_ns, record.denoised_ns, record.decode_started_ns, record.finished_ns)
        if record.status == "done" and not record.request.arrival_ns <= stages[0] < stages[1] <= stages[2] < stages[3]:
            return f"request {record.request.request_id} is done at {stages}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=3.0, help="Of processor time, at most.")
    options = parser.parse_args(arguments)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[float] = []
    began_s = time.process_time()
    for seed in range(options.seeds):
        if problem := trial(seed, seen):
            wrong.append(f"seed {seed}: {problem}")
        memory.append(resident_mib())
        if time.process_time() - began_s > 60 * options.minutes:
            break
    half, end = memory[len(memory) // 2], memory[-1]
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(seen.items()))
    print(f"{len(memory)} trials, {len(wrong)} went wrong; {outcomes}")
    print(f"resident memory: {half:.0f} MiB at half, {end:.0f} at the end")
    for line in wrong[:20]:
        print(line)
    return int(bool(wrong) or end > 1.05 * half)


if __name__ == "__main__":
    sys.exit(main())
