"""The engine against theory: M/D/1 waiting times, and saturation throughput against the capacity formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import Request
from synerdiff.profile.capacity import serial_capacity_samples_per_s
from synerdiff.profile.tables import Profile
from tests.builders import MS, affine_profile
from tests.theory import parallel_capacity_samples_per_s

STEPS = 2
T_999_19 = 3.883  # two-sided 99.9% quantile of Student's t with 19 degrees of freedom


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_one_request_at_a_time_with_fixed_work_waits_as_m_d_1(rho: float) -> None:
    """Mean wait = rho * D / (2 * (1 - rho)), Pollaczek-Khinchine with fixed service D."""
    profile = affine_profile()
    service_s = (STEPS * 14 + 30) / 1000  # two rows: 10 + 2 * 2 ms a step; decode 30 ms
    expected_s = rho * service_s / (2 * (1 - rho))
    means = []
    for seed in range(20):
        gaps = np.random.default_rng(seed).exponential(service_s / rho, size=5000)
        arrivals_ns = np.rint(np.cumsum(gaps) * 1e9).astype(np.int64).tolist()
        requests = [Request(i, arrival_ns, STEPS) for i, arrival_ns in enumerate(arrivals_ns)]
        result = simulate(requests, build_policy("continuous-serial", {"batch": 1}), profile)
        waits = [(r.finished_ns - r.request.arrival_ns) / 1e9 - service_s for r in result.requests[500:]]
        means.append(np.mean(waits))
    half_width = T_999_19 * np.std(means, ddof=1) / math.sqrt(len(means))
    assert half_width < 0.15 * expected_s, "the replications are too noisy to test anything"
    assert abs(np.mean(means) - expected_s) < half_width


def saturated_rate(
    policy: Any, profile: Profile, steps: Any, samples: Any, guidance_scale: float = 7.5, gpus: Any = (0,)
) -> Any:
    """Samples per second of completions while full batches still run, first fifth dropped."""
    requests = [Request(i, 0, steps, guidance_scale=guidance_scale) for i in range(samples)]
    result = simulate(requests, policy, profile, decode_gpus=gpus)
    work = [w for w in result.work if w.kind == "step"]
    fullest = max(len(w.samples) for w in work)
    last_full_ns = max(w.end_ns for w in work if len(w.samples) == fullest)
    ends = sorted(r.finished_ns for r in result.requests if r.finished_ns <= last_full_ns)
    first = len(ends) // 5
    return (len(ends) - 1 - first) / ((ends[-1] - ends[first]) / 1e9)


COMBINATIONS = [
    # (decode ms, step slowdown, chunk slowdown, steps, batch, guided, decode lanes); in the last the decode lane limits
    (30, 1.2, 1.5, 30, 8, True, 1),
    (30, 1.2, 1.5, 30, 2, True, 1),
    (30, 2.0, 3.0, 30, 8, True, 1),
    (30, 1.0, 1.0, 20, 4, True, 1),
    (80, 1.3, 1.3, 20, 8, True, 1),
    (30, 1.2, 1.5, 8, 8, False, 1),
    (10, 1.6, 2.5, 12, 16, True, 1),
    (60, 1.4, 1.8, 50, 1, True, 1),
    (90, 1.2, 2.0, 4, 8, False, 2),
    (200, 1.3, 2.0, 20, 8, True, 1),
    (90, 1.5, 2.0, 4, 8, False, 1),
    (300, 1.2, 1.5, 30, 8, True, 1),
]


@pytest.mark.parametrize(("decode_ms", "s_u", "s_v", "steps", "batch", "guided", "lanes"), COMBINATIONS)
def test_saturation_throughput_is_the_capacity_formula_s(
    decode_ms: Any, s_u: Any, s_v: Any, steps: Any, batch: Any, guided: Any, lanes: Any
) -> None:
    slowdowns = {1: (round(s_u * 1e6), round(s_v * 1e6)), 32: (round(s_u * 1e6), round(s_v * 1e6))}
    profile = affine_profile(
        decode_ms=decode_ms, slowdowns=slowdowns, overheads={"step_dispatch": MS, "chunk_dispatch": MS // 2}
    )
    share, scale = (1.0, 7.5) if guided else (0.0, 1.0)
    parameters = {"batch": batch}
    serial = saturated_rate(build_policy("continuous-serial", parameters), profile, steps, 60 * batch, scale)
    assert serial == pytest.approx(serial_capacity_samples_per_s(profile, steps, batch, share), rel=0.01)
    policy = build_policy("continuous-parallel", parameters)
    parallel = saturated_rate(policy, profile, steps, 120 * batch, scale, gpus=(0,) * lanes)
    formula = parallel_capacity_samples_per_s(profile, steps, batch, share, lanes=lanes)
    assert parallel == pytest.approx(formula, rel=0.01)


def test_some_combinations_are_limited_by_the_decode_lane() -> None:
    limited = [c for c in COMBINATIONS if c[0] * c[2] > c[3] * (10 + 2 * (2 if c[5] else 1) * c[4]) / c[4]]
    assert len(limited) >= 2
