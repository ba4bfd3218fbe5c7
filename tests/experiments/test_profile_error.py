"""The band of a run when all times of its profile are off, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from policies.continuous import ContinuousSerial
from synerdiff.config.cluster import cluster_of
from synerdiff.core import InputError, Request, WorkerInfo
from synerdiff.experiments.profile_error import asked_band, at_times, banded
from synerdiff.experiments.run import Prepared, RunSpec, execute, prepare
from synerdiff.profile.folder import write_profile
from synerdiff.profile.scaling import own_band
from synerdiff.profile.tables import Band, Profile, Spread
from tests.builders import affine_profile, requests_at

TOLD: set[int] = set()


class Listens(ContinuousSerial):
    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        TOLD.add(profile.step_ns(1))
        super().reset(worker, profile)


ALONE = tuple(Request(i, i * 10_000_000_000, 8, guidance_scale=1.0) for i in range(40))
"""8 steps of 12 ms and a decode of 30 ms, ten seconds apart."""


def prepared(profile: Profile | None = None, **fields: object) -> Prepared:
    given = {"profile": profile or affine_profile(), "source": ALONE, "policy": "continuous-serial", **fields}
    return prepare(RunSpec(**given))  # type: ignore[arg-type]


def test_a_request_alone_is_off_by_what_the_times_are() -> None:
    found = banded(prepared(), Band(low=0.9, high=1.25, meaning="by hand"))
    assert found["times"] == [0.9, 1.25]
    assert found["source"] == "by hand"
    for name in ("mean", "p50", "p99"):
        assert found[f"request_latency_{name}_s"] == pytest.approx([0.126 * 0.9, 0.126 * 1.25])
    one = execute(prepared()).described["run"]["policy_capacity_per_s"]
    assert found["policy_capacity_per_s"] == pytest.approx([one / 0.9, one / 1.25], rel=1e-3)
    assert found["state"] == ["stable", "stable"]


def test_arrivals_stay_and_longer_times_may_saturate() -> None:
    """At load 0.9 of the believed times, 1.2 times as long ones are offered 1.08 of what they sustain."""
    run = prepared(parameters={"batch": 1}, rate_per_s=0.9 / 0.126)
    found = banded(run, Band(low=0.5, high=1.2))
    assert found["state"] == ["stable", "saturated"]


def test_the_policy_plans_with_the_times_that_it_believes() -> None:
    """A policy of the test's own writes down the step that it is told."""
    TOLD.clear()
    banded(prepared(policy=f"{__name__}:Listens"), Band(low=0.5, high=2.0))
    assert {12_000_000} == TOLD


def test_the_band_that_is_meant() -> None:
    run = prepared()
    assert asked_band("2%", run) == Band(low=0.98, high=1.02, meaning="as was asked for")
    assert asked_band("0", run) is None
    assert asked_band(None, run) is None, "a profile whose cells have no spread"
    spread = replace(run.profile, steps={1: Spread(100, 90, 110, 50)}, chunks={"whole": (Spread(100, 40, 160, 50),)})
    own = own_band(spread)
    assert own is not None
    assert (own.low, own.high) == pytest.approx(((0.9 * 0.4) ** 0.5, (1.1 * 1.6) ** 0.5))
    stated = Band(low=0.9, high=1.3, meaning="published")
    assert own_band(replace(spread, head=spread.head.model_copy(update={"band": stated}))) == stated


def test_a_long_run_has_a_band_only_when_it_is_asked_for() -> None:
    stated = Band(low=0.9, high=1.3)
    profile = affine_profile()
    profile.head = profile.head.model_copy(update={"band": stated})
    run = prepared(profile)
    long = replace(run, served=[replace(ALONE[0], images=2001)])
    assert (asked_band(None, run), asked_band(None, long), asked_band("own", long)) == (stated, None, stated)


@pytest.mark.parametrize("text", ["2", "-1%", "91%", "nan%", "much", ""])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="allowed are own, 0 and a share up to 90%, like 2%"):
        asked_band(text, prepared())


def test_own_needs_a_profile_that_says_it() -> None:
    with pytest.raises(InputError, match="does not say how far its times may be off"):
        asked_band("own", prepared())


def test_workers_with_times_of_their_own_are_off_too(tmp_path: Path) -> None:
    write_profile(tmp_path / "q", replace(affine_profile(base_ms=30), name="q"))
    cluster = cluster_of({"workers": [{"count": 1}, {"count": 1, "profile": str(tmp_path / "q")}]})
    spec = RunSpec(
        profile=affine_profile(), source=tuple(requests_at(0, 0, steps=3)), policy="continuous-serial", cluster=cluster,
        router="round-robin",
    )  # fmt: skip
    run = prepare(spec)
    mine, others = ([r.finished_ns for r in execute(own).result.requests] for own in (run, at_times(run, 2.0)))
    assert others == [2 * finished_ns for finished_ns in mine]
    assert mine[0] < mine[1]
