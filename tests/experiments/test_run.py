"""The way from a run's description to its result: load, rate, limits and capacity, on one worker and on many."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from synerdiff.config.cluster import cluster_of
from synerdiff.core import NS_PER_S, Decision, InputError, Request, View, WorkerInfo
from synerdiff.experiments.run import Outcome, Planned, Prepared, RunSpec, execute, prepare
from synerdiff.profile.tables import Profile
from synerdiff.results.folder import state
from tests.builders import affine_profile

REQUESTS = tuple(Request(i, i * i * 10_000_000 + 40_000_000, 8, 1 + i % 2) for i in range(60))
TWO_WORKERS = cluster_of({"workers": [{"denoise_gpu": 0}, {"denoise_gpu": 1}]})


def spec(**fields: object) -> RunSpec:
    known: dict[str, object] = {"profile": affine_profile(), "source": REQUESTS, "policy": "continuous-serial"}
    return RunSpec(**{**known, **fields})  # type: ignore[arg-type]


def shifted(by_s: int) -> tuple[Request, ...]:
    return tuple(replace(request, arrival_ns=request.arrival_ns + by_s * NS_PER_S) for request in REQUESTS)


def facts(outcome: Outcome) -> dict[str, object]:
    run: dict[str, object] = outcome.described["run"]
    return run


def test_a_policy_plans_with_a_copy() -> None:
    planning = affine_profile(base_ms=12)
    run = prepare(spec(planning=planning))
    for policy in (run.policy(), run.policy()):
        assert isinstance(policy, Planned)
        assert policy.planning == planning
        policy.planning.steps.clear()  # type: ignore[attr-defined]
    assert planning == affine_profile(base_ms=12)


class RejectsAll:
    chunking = "whole"

    def reset(self, worker: WorkerInfo, profile: Profile) -> None: ...

    def decide(self, view: View) -> Decision:
        return Decision(reject=tuple(sample.id for sample in view.waiting))


def test_a_description_survives_the_way_to_another_process() -> None:
    described = spec(cluster=TWO_WORKERS, load=0.5)
    assert pickle.loads(pickle.dumps(described)) == described


def test_a_trace_that_starts_late_has_the_same_load() -> None:
    """100 hours of nothing ahead of the first request once made the same arrivals 4,500 times as fast."""
    now, late = (execute(prepare(spec(source=source, load=0.5))) for source in (REQUESTS, shifted(360_000)))
    assert late.prepared.time_scale == now.prepared.time_scale
    assert late.summary["request_latency_mean_s"] == pytest.approx(now.summary["request_latency_mean_s"], rel=1e-6)
    as_it_is = prepare(spec(source=shifted(360_000), time_scale=now.prepared.time_scale))
    assert as_it_is.load == pytest.approx(0.5)
    assert as_it_is.rate_per_s == pytest.approx(now.prepared.rate_per_s)


def test_load_is_the_rate_over_what_continuous_serial_sustains_at_the_stated_batch() -> None:
    prepared = prepare(spec(rate_per_s=3.0))
    assert prepared.rate_per_s == pytest.approx(3.0)
    # 90 images in 60 requests; a full batch of 8 guided samples is a step of 42 ms, a decode takes 30 ms.
    sustained = 1 / (8 * 0.042 / 8 + 0.030) * 60 / 90
    assert prepared.load == pytest.approx(3.0 / sustained)
    assert facts(execute(prepared))["load_batch"] == 8


def test_a_fleet_has_the_load_of_its_workers_and_says_what_its_policy_sustains() -> None:
    """At batch 1 the workers are busier than the load, which is priced at the stated batch, says."""
    one, two = (
        execute(prepare(spec(cluster=cluster, parameters={"batch": 1}, load=0.4))) for cluster in (None, TWO_WORKERS)
    )
    rates = [outcome.prepared.rate_per_s for outcome in (one, two)]
    assert rates[1] == pytest.approx(2 * (rates[0] or 0))
    for outcome, workers in ((one, 1), (two, 2)):
        # A request of 1.5 images on average, 8 steps of 14 ms and a decode of 30 ms each.
        assert facts(outcome)["policy_capacity_per_s"] == pytest.approx(workers / (1.5 * 0.142), rel=0.03)
        assert facts(outcome)["policy_load"] == pytest.approx(0.4 * 0.142 / 0.072, rel=0.03)
    assert set(two.frames[0]["worker"]) == {0, 1}
    assert facts(two)["requests_by_worker"] == two.frames[0]["worker"].value_counts().sort_index().tolist()
    assert set(one.frames[0]["worker"]) == {0}


@pytest.mark.parametrize(
    ("fields", "own", "source", "limits"),
    [
        ({}, False, "3 times the latency alone", (3 * 0.142, 3 * 0.204)),
        ({"slo_seconds": 2.5}, False, "as was asked for", (2.5, 2.5)),
        ({"slo_multiple": 5.0}, False, "5 times the latency alone", (5 * 0.142, 5 * 0.204)),
        ({"slo_seconds": 2.5}, True, "as the trace says, else as was asked for", (1.0, 2.5)),
    ],
)
def test_the_latency_limit_is_told_and_where_it_comes_from(
    fields: dict[str, object], own: bool, source: str, limits: tuple[float, float]
) -> None:
    requests = (replace(REQUESTS[0], slo_ns=NS_PER_S if own else None), *REQUESTS[1:])
    outcome = execute(prepare(spec(source=requests, **fields)))
    run = facts(outcome)
    assert run["slo"] == source
    assert (run["slo_lowest_s"], run["slo_highest_s"]) == pytest.approx(limits)
    assert any("SLO" in line and source in line for line in outcome.lines())


def test_what_is_printed_tells_how_the_trace_was_stretched_and_what_cannot_be_claimed() -> None:
    text = "\n".join(execute(prepare(spec(load=0.99))).lines())
    assert "times as fast" in text
    assert "continuous-serial sustains at batch 8" in text
    assert "(cannot be claimed)" in text
    assert "51 of 51 measured requests: 459, all done, are needed (a trace of 538)" in text
    assert "no interval" in text


@pytest.mark.parametrize(
    ("policy_load", "throughput", "rising", "word"),
    [
        (0.8, 1.0, True, "stable"),
        (0.8, 0.9, False, "stable"),
        (0.8, 0.9, True, "saturated"),
        (0.95, 1.0, False, "near saturation"),
        (1.01, 1.0, False, "saturated"),
    ],
)
def test_a_backlog_that_grew_is_told(policy_load: float, throughput: float, rising: bool, word: str) -> None:
    summary = {"achieved_request_rate": throughput, "offered_request_rate": 1.0, "latency_rises": rising}
    assert state(policy_load, summary) == word


def test_a_run_that_served_nothing_has_no_latency_and_no_capacity() -> None:
    outcome = execute(prepare(spec(policy=f"{__name__}:RejectsAll")))
    assert outcome.summary["rejected_count"] == 60
    assert outcome.summary["request_latency_mean_s"] is None
    assert facts(outcome)["policy_capacity_per_s"] is None
    assert outcome.lines()


def test_fewer_steps_keep_the_deadlines_and_the_load() -> None:
    full, fewer = (prepare(spec(steps_scale=scale, slo_multiple=3.0, load=0.5)) for scale in (1.0, 0.5))
    assert {request.steps for request in fewer.served} == {4}
    assert [r.slo_ns for r in fewer.served] == [r.slo_ns for r in full.served]
    assert [r.arrival_ns for r in fewer.served] == [r.arrival_ns for r in full.served]


def test_a_run_at_once_takes_its_requests_over_and_over() -> None:
    prepared: Prepared = prepare(spec(source=REQUESTS[:2], load=0.5)).at_once(7)
    assert [(r.request_id, r.arrival_ns, r.images) for r in prepared.served] == [
        *((0, 0, 1), (1, 0, 2), (2, 0, 1), (3, 0, 2), (4, 0, 1))
    ]
    assert prepared.load is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load": 0.5, "rate_per_s": 1.0}, "--load and --rate exclude each other"),
        ({"rate_per_s": 1.0, "time_scale": 2.0}, "--rate and --time-scale exclude each other"),
        ({"rate_per_s": -1.0}, "The rate is -1 per second"),
        ({"router": "nearest"}, "there is no router 'nearest'"),
        ({"load": 0.5, "source": (Request(0, 5, 4), Request(1, 5, 4))}, "all requests arrive at once"),
        ({"source": (Request(0, 0, 4, height=64, width=64),)}, "request 0 asks for 64x64 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(spec(**fields))
