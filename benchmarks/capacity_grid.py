"""Whether the search of `synerdiff capacity` finds what a dense grid does, on the same seeds and on fresh ones.

    python -m benchmarks.capacity_grid [--requests 150]

20 cases: arrivals x SLO x policy on an estimated profile, intervals over three seeds. Prints one line a case; the fresh
value is that of the answer's fleet over three other seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

from synerdiff.config.capacity import Question
from synerdiff.experiments.backends import LokyBackend
from synerdiff.experiments.capacity import Ask, Inquiry, Level, Verdict
from synerdiff.experiments.sweep import compute
from synerdiff.schema import validated

ARRIVALS = (("poisson", 4.0), ("poisson", 8.0), ("gamma", 5.0), ("mmpp", 3.0), ("mmpp", 6.0))
SLOS = ("p99=4s", "goodput=0.95")
POLICIES = ("continuous-serial", "auto")
PROFILE = "h200-sd15-estimated"
MOST = 24


def asked(kind: str, rate_per_s: float, slo: str, policy: str, requests: int, seeds: list[int]) -> Question:
    """The question that both the search and the dense grid answer."""
    fields = {
        "profiles": [PROFILE],
        "workload": {"name": kind, "generator": kind, "parameters": {"rate_per_s": rate_per_s}},
        "policies": [{"policy": policy}],
        "slo": slo,
        "gpus": f"1..{MOST}",
        "seeds": seeds,
        "requests": requests,
    }
    return validated(Question, fields, "case")


def level(inquiry: Inquiry, gpus: int) -> Verdict:
    """A fleet of that size on all seeds."""
    ask = Ask(Level(gpus, None), judging=False, few=False)
    runs = inquiry.runs(PROFILE, inquiry.entries[0], ask)
    for run in runs:
        compute(run)
    return inquiry.verdict(PROFILE, ask, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=150)
    requests = parser.parse_args().requests
    same = fresh = cases = 0
    for (kind, rate), slo, policy in product(ARRIVALS, SLOS, POLICIES):
        with tempfile.TemporaryDirectory() as folder:
            inquiry = Inquiry(asked(kind, rate, slo, policy, requests, [1, 2, 3]), Path(), Path(folder))
            best = inquiry.solve(LokyBackend(1))[0].best
            dense = next((gpus for gpus in range(1, MOST + 1) if level(inquiry, gpus).keeps), None)
            other = Inquiry(asked(kind, rate, slo, policy, requests, [11, 12, 13]), Path(), Path(folder))
            found = None if best is None else best.level.gpus
            value = None if best is None else level(other, best.level.gpus).value
        agrees = found == dense
        inside = (
            best is None or value is None or best.low is None or best.high is None or best.low <= value <= best.high
        )
        cases, same, fresh = cases + 1, same + agrees, fresh + inside
        print(
            f"{kind:8} {rate:4g}/s {slo:13} {policy:18} search {found} grid {dense} fresh inside: {inside}", flush=True
        )
    print(f"{cases} cases: {same} as the dense grid, {fresh} with the fresh value inside the interval")


if __name__ == "__main__":
    main()
