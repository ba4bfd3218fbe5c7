"""Seeded generators against what their parameters promise."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synerdiff.core import InputError, Request
from traces.generate import (
    generate,
    generate_trace,
    loadgen_schedule_ns,
    mmpp_arrivals,
    renewal_arrivals,
    session_arrivals,
)
from traces.gentd26_parameters import gentd26_parameters
from traces.native import write_trace
from traces.spec import TraceSpec, trace_spec

DAY_S = 86_400
MEASURED_DISPERSION = {60: 3.753, 600: 27.383, 3600: 139.523}
"""GenTD26's own index of dispersion by window (s)."""


def times_s(requests: list[Request]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([request.arrival_ns for request in requests]) / 1e9


def dispersion(times: np.ndarray[Any, np.dtype[np.float64]], window_s: float, span_s: float) -> float:
    counts = np.bincount((times // window_s).astype(int), minlength=int(span_s // window_s))[: int(span_s // window_s)]
    return float(counts.var() / counts.mean())


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "poisson", "requests": 300, "rate_per_s": 3.0},
        {"kind": "gamma", "duration_s": 100.0, "cv": 3.0, "mix": "unguided-8"},
        {"kind": "mmpp", "requests": 300, "loras": "gentd26"},
        {"kind": "gentd26-like", "requests": 300, "mix": "fixed", "steps": 7},
    ],
    ids=lambda fields: fields["kind"],
)
def test_same_seed_same_bytes(tmp_path: Path, fields: dict[str, Any]) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_trace(tmp_path / f"{name}.csv", generate(seed=seed, **fields))
    first, again, other = ((tmp_path / f"{name}.csv").read_bytes() for name in "abc")
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["poisson", "gamma", "mmpp", "gentd26-like"])
def test_number_order_and_ids(kind: str) -> None:
    requests = generate(kind, seed=3, requests=500)
    assert [request.request_id for request in requests] == list(range(500))
    assert all(a.arrival_ns <= b.arrival_ns for a, b in pairwise(requests))
    duration_s = 3 * DAY_S if kind == "gentd26-like" else 400
    within = generate(kind, seed=3, duration_s=float(duration_s))
    assert 0 <= within[0].arrival_ns <= within[-1].arrival_ns < duration_s * 10**9
    assert len(within) > 20


def test_another_mix_leaves_the_arrivals_alone() -> None:
    for kind in ("poisson", "gentd26-like"):
        one = generate(kind, seed=5, requests=200)
        other = generate(kind, seed=5, requests=200, mix="fixed", steps=4, images=2, guidance_scale=1.0)
        assert [request.arrival_ns for request in one] == [request.arrival_ns for request in other]
        assert {(request.steps, request.images, request.guidance_scale) for request in other} == {(4, 2, 1.0)}


def test_poisson_has_its_rate_and_is_poisson() -> None:
    n = 200_000
    gaps = np.diff(times_s(generate("poisson", seed=11, requests=n, rate_per_s=4.0)))
    assert gaps.mean() == pytest.approx(0.25, rel=5 / n**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.02)
    # P(gap > t) = exp(-rate t)
    for t in (0.05, 0.25, 1.0):
        expected = np.exp(-4 * t)
        assert (gaps > t).mean() == pytest.approx(expected, abs=5 * (expected * (1 - expected) / n) ** 0.5)
    assert dispersion(np.cumsum(gaps), 10, gaps.sum()) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma_gaps_have_their_cv_and_its_square_is_the_dispersion(cv: float) -> None:
    n = 400_000
    spec = TraceSpec(kind="gamma", requests=n, rate_per_s=10.0, cv=cv)
    times = renewal_arrivals(np.random.default_rng(2), spec)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.1, rel=5 * cv / n**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)
    # Renewal theory: the index of dispersion tends to cv^2 over long windows.
    assert dispersion(times, 20, times[-1]) == pytest.approx(cv**2, rel=0.12, abs=0.02)


def test_mmpp_has_the_rate_and_the_dispersion_of_theory() -> None:
    spec = TraceSpec(
        kind="mmpp", duration_s=1_000_000.0, rate_per_s=1.0, burst_ratio=6.0, burst_share=0.25, burst_s=20.0
    )
    times = mmpp_arrivals(np.random.default_rng(4), spec)
    calm = 1.0 / (0.75 + 0.25 * 6)
    burst = 6 * calm
    leave_burst, leave_calm = 1 / 20, 1 / 60
    # Heffes and Lucantoni (1986): index of dispersion over long windows of a two-state MMPP.
    both = leave_burst + leave_calm
    limit = 1 + 2 * (burst - calm) ** 2 * leave_burst * leave_calm / (
        both**2 * (burst * leave_calm + calm * leave_burst)
    )
    window_s = 500
    # ... and over a window t: the same times 1 - (1 - exp(-both t)) / (both t).
    expected = 1 + (limit - 1) * (1 - (1 - np.exp(-both * window_s)) / (both * window_s))
    assert len(times) == pytest.approx(1_000_000, rel=0.02)
    assert dispersion(times, window_s, 1_000_000) == pytest.approx(expected, rel=0.12)


@pytest.fixture(scope="module")
def like_gentd26() -> list[list[Request]]:
    """Four seeds of the 22 days that the parameters describe."""
    return [generate("gentd26-like", seed=seed, duration_s=22.0 * DAY_S) for seed in range(4)]


def test_gentd26_like_has_the_rate_profile_and_burstiness_of_the_trace(like_gentd26: list[list[Request]]) -> None:
    fitted = gentd26_parameters()
    span_s = 22 * DAY_S
    times = [times_s(requests) for requests in like_gentd26]
    assert np.mean([len(t) for t in times]) / span_s == pytest.approx(fitted.rate_per_s, rel=0.1)
    for window_s, measured in MEASURED_DISPERSION.items():
        mean = np.mean([dispersion(t, window_s, span_s) for t in times])
        assert mean == pytest.approx(measured, rel=0.3), window_s
    by_hour: Any = sum(np.bincount((t % DAY_S // 3600).astype(int), minlength=24) for t in times)
    assert by_hour.argmax() in (23, 0)  # the two busiest hours of the profile differ by 4%
    assert np.corrcoef(by_hour, fitted.hour_profile)[0, 1] > 0.97
    peaks = [np.bincount((t // 3600).astype(int)).max() / (len(t) / (22 * 24)) for t in times]
    assert np.mean(peaks) == pytest.approx(9.2, rel=0.2)


def test_gentd26_like_sessions_have_the_fitted_size_and_gaps() -> None:
    fitted = gentd26_parameters()
    spec = TraceSpec(kind="gentd26-like", duration_s=44.0 * DAY_S)
    times, sessions = session_arrivals(np.random.default_rng(1), spec, fitted)
    sizes = np.bincount(sessions)
    sizes = sizes[sizes > 0]
    assert fitted.requests_per_session == pytest.approx(4.543, abs=0.001)
    assert sizes.mean() == pytest.approx(4.543, rel=0.1)
    assert (sizes == 1).mean() == pytest.approx(fitted.session_requests[1], abs=0.02)
    order = np.lexsort((times, sessions))
    same = sessions[order][1:] == sessions[order][:-1]
    log_gaps = np.log(np.diff(times[order])[same])
    assert log_gaps.mean() == pytest.approx(fitted.gap_log_mean, abs=0.03)
    assert log_gaps.std() == pytest.approx(fitted.gap_log_sd, abs=0.03)


def test_gentd26_like_asks_for_what_the_trace_asked_for(like_gentd26: list[list[Request]]) -> None:
    requests = [request for seed in like_gentd26 for request in seed]
    n = len(requests)
    steps = Counter(request.steps for request in requests)
    images = Counter(request.images for request in requests)
    loras = Counter(len(request.loras) for request in requests)
    joint = Counter((request.steps, request.images) for request in requests)
    # Requests of a session repeat each other, so about a quarter of them count as independent.
    for counts, value, share in (
        (steps, 30, 0.907),
        (steps, 40, 0.051),
        (images, 1, 0.578),
        (images, 4, 0.192),
        (images, 8, 0.148),
        (images, 2, 0.082),
        (loras, 0, 0.832),
        (loras, 1, 0.156),
        (loras, 2, 0.0095),
        (joint, (30, 8), 0.1272),
    ):
        assert counts[value] / n == pytest.approx(share, abs=5 * (share * (1 - share) / (n / 8)) ** 0.5), value  # type: ignore[index]
    assert {request.guidance_scale for request in requests} == {7.5}
    used = Counter(use.file for request in requests for use in request.loras)
    assert used.total() > 10_000
    top = [count / used.total() for _, count in used.most_common()]
    assert top[0] == pytest.approx(0.05, abs=0.02)
    assert sum(top[:10]) == pytest.approx(0.294, abs=0.04)  # GenTD26: 29.4%
    assert sum(top[:100]) == pytest.approx(0.768, abs=0.05)  # GenTD26: 76.8%
    assert max(used, key=lambda name: used[name]) in ("L0000", "L0001", "L0002")


def test_requests_of_a_session_repeat_each_other_as_fitted() -> None:
    fitted = gentd26_parameters()
    spec = TraceSpec(kind="gentd26-like", seed=6, duration_s=22.0 * DAY_S)
    requests = generate_trace(spec)
    stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence(6).spawn(3)[0]))
    sessions = session_arrivals(stream, spec, fitted)[1]
    last: dict[int, Request] = {}
    same = pairs = 0
    for request, session in zip(requests, sessions.tolist(), strict=True):
        if session in last:
            pairs += 1
            same += (request.steps, request.images) == (last[session].steps, last[session].images)
        last[session] = request
    by_chance = sum(share**2 for share in fitted.steps_images.values())
    repeat = fitted.repeat_steps_images
    assert same / pairs == pytest.approx(repeat + (1 - repeat) * by_chance, abs=0.02)


def test_mixes_and_loras_of_other_kinds() -> None:
    for mix, steps in (("unguided-4", 4), ("unguided-8", 8)):
        requests = generate("poisson", requests=4000, mix=mix)
        assert {(request.steps, request.guidance_scale) for request in requests} == {(steps, 1.0)}
        assert Counter(request.images for request in requests)[1] / 4000 == pytest.approx(0.578, abs=0.04)
        assert all(request.loras == () for request in requests)
    guided = generate("poisson", requests=4000, mix="guided-20-50")
    counts = Counter(request.steps for request in guided)
    assert (min(counts), max(counts), len(counts)) == (20, 50, 31)
    assert {request.guidance_scale for request in guided} == {7.5}
    assert sum(request.steps for request in guided) / 4000 == pytest.approx(35, abs=0.6)
    with_loras = generate("poisson", requests=4000, loras="gentd26")
    assert sum(bool(request.loras) for request in with_loras) / 4000 == pytest.approx(0.168, abs=0.03)
    names = [[use.file for use in request.loras] for request in with_loras]
    assert all(len(set(request)) == len(request) for request in names)
    assert all(request.loras == () for request in generate("gentd26-like", requests=200, loras="none"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "uniform", "requests": 1}, "kind is 'uniform'; it must be 'poisson', 'gamma', 'mmpp', "),
        ({"kind": "poisson"}, "give either requests or duration_s"),
        ({"kind": "poisson", "requests": 1, "duration_s": 1.0}, "give either requests or duration_s"),
        ({"kind": "poisson", "requests": 0}, "requests is 0; it must be greater than or equal to 1"),
        ({"kind": "poisson", "requests": True}, "requests is True; it must be a valid integer"),
        ({"kind": "poisson", "requests": 1, "rate_per_s": float("nan")}, "rate_per_s is nan; it must be a finite"),
        ({"kind": "poisson", "requests": 1, "rate": 2}, "there is no field 'rate'; known are kind, seed"),
        ({"kind": "poisson", "requests": 1, "cv": 2.0}, "cv belongs to kind 'gamma', and kind is 'poisson'"),
        ({"kind": "gamma", "requests": 1, "burst_s": 2.0}, "burst_s belongs to kind 'mmpp'"),
        ({"kind": "gamma", "requests": 1, "steps": 2}, "steps belongs to mix 'fixed', and mix is 'gentd26'"),
        ({"kind": "poisson", "requests": 1, "mix": "fixed", "steps": 0}, "steps is 0; it must be greater"),
        ({"kind": "poisson", "duration_s": 1e9}, "exceeds 2000000 requests"),
        ({"kind": "poisson", "requests": 2_000_000, "rate_per_s": 1e-6}, "would arrive after 1000000000 s"),
        ({"kind": "poisson", "duration_s": 0.001}, "No request arrives within 0.001 s"),
        ({"kind": "gentd26-like", "duration_s": 0.001}, "No request arrives within 0.001 s"),
        ({"kind": "mmpp", "duration_s": 0.001}, "No request arrives within 0.001 s"),
        ({"requests": 1}, "kind is missing"),
    ],
)
def test_bad_descriptions_get_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        generate_trace(trace_spec(fields, "here"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mlperf_schedule_is_loadgens_to_the_nanosecond() -> None:
    """The public H100 run (Inference v4.1, SDXL Server) logged a count of 9703 and a duration of 600100727873 ns."""
    seed = 14962580496156340209
    arrivals, next_ns = loadgen_schedule_ns(seed, 16.2, 600.0)
    assert (len(arrivals), next_ns) == (9703, 600_100_727_873)
    assert arrivals[-2] < 600 * 10**9 <= arrivals[-1]
    # By hand: the twister's first outputs are 261333752 and 3375688894, hence u = 0.785964 and a gap of 95.16 ms.
    u = (261333752 + 3375688894 * 2**32) / 2**64
    assert arrivals[:2] == [0, math.floor(-math.log(1 - u) / 16.2 * 10**9)] == [0, 95_161_123]
    requests = generate("mlperf", seed=seed, rate_per_s=16.2, duration_s=600.0, steps=20, guidance_scale=8.0)
    assert [request.arrival_ns for request in requests] == arrivals
    assert {(request.steps, request.guidance_scale, request.images) for request in requests} == {(20, 8.0, 1)}


def test_mlperf_goes_on_until_there_are_enough() -> None:
    few, _ = loadgen_schedule_ns(7, 5.0, 10.0)
    more, _ = loadgen_schedule_ns(7, 5.0, 10.0, min_requests=len(few) + 40)
    assert len(more) == len(few) + 40
    assert more[: len(few)] == few
    # LoadGen seeds with 32 bits of the seed's 64.
    assert loadgen_schedule_ns(7 + 5 * 2**32, 5.0, 10.0)[0] == few
    with pytest.raises(InputError, match="over 100 requests"):
        loadgen_schedule_ns(7, 50.0, 10.0, most=100)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kind": "mlperf", "requests": 5, "rate_per_s": 1.0}, "needs duration_s and rate_per_s"),
        ({"kind": "mlperf", "duration_s": 5.0}, "needs duration_s and rate_per_s"),
        ({"kind": "poisson", "requests": 5, "min_requests": 3}, "min_requests belongs to kind 'mlperf'"),
        ({"kind": "mlperf", "duration_s": 5.0, "rate_per_s": 1.0, "seed": 2**64}, "seed"),
    ],
)
def test_what_does_not_fit_an_mlperf_schedule(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        trace_spec(fields, "trace generate")
