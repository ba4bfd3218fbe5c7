"""Single rules of the simpler policies, on tiny fixtures with exact times."""

from __future__ import annotations

from typing import Any

import pytest

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import PPM, InputError, Request, RunResult, SkipBudget, View, WorkerInfo
from synerdiff.profile.tables import Profile
from tests.builders import MS, affine_profile, make_profile, requests_at

PAYS, LOSES = (1_900_000, 1_900_000), (2_100_000, 2_100_000)


def both(pair: Any) -> dict[Any, Any]:
    return {1: pair, 32: pair}


def chunks_of(result: RunResult) -> list[Any]:
    return [w for w in result.work if w.kind == "chunk"]


def steps_of(result: RunResult) -> list[Any]:
    return [w for w in result.work if w.kind == "step"]


def test_chunked_runs_the_chunks_of_a_decode_back_to_back_beside_steps() -> None:
    result = simulate([Request(0, 0, 1), Request(1, 0, 9)], build_policy("chunked"), affine_profile())
    first = [c for c in chunks_of(result) if c.samples == (0,)]
    assert [c.chunk for c in first] == [0, 1, 2, 3]
    assert [c.start_ns for c in first] == [18 * MS + i * 7_500_000 for i in range(4)]
    assert not any(c.exclusive for c in first)


def test_an_unknown_chunking_is_named_with_the_known_ones() -> None:
    for name in ("chunked", "load-skip", "edf", "synerdiff", "synerdiff-feedback"):
        with pytest.raises(InputError, match="profile 'test' has no chunking 'c9'; it has whole, c4"):
            simulate(requests_at(0), build_policy(name, {"chunking": "c9"}), affine_profile())


def test_skip_cfg_spreads_the_budget_over_the_steps_after_the_warm_up() -> None:
    """6 of 24 steps, the first 4 guided: one skip in every 20/6 steps."""
    budget = SkipBudget(250_000, warmup_steps=4, longest_run=1)
    result = simulate(requests_at(0, steps=24), build_policy("skip-cfg"), affine_profile(), budget=budget)
    modes = result.requests[0].modes[0]
    assert [i for i, mode in enumerate(modes) if mode == "r"] == [7, 10, 13, 17, 20, 23]


def test_skip_cfg_makes_up_for_what_the_longest_run_forbids() -> None:
    """All 10 steps may be skipped, but only every other one: 5 are, not one less."""
    budget = SkipBudget(PPM, warmup_steps=0, longest_run=1)
    result = simulate(requests_at(0, steps=10), build_policy("skip-cfg"), affine_profile(), budget=budget)
    assert result.requests[0].modes == ("grgrgrgrgr",)


@pytest.mark.parametrize(("slowdown", "exclusive"), [(PAYS, False), (LOSES, True)])
@pytest.mark.parametrize("name", ["load-skip", "edf"])
def test_a_decode_goes_where_it_costs_less(name: str, slowdown: Any, exclusive: bool) -> None:
    profile = affine_profile(slowdowns=both(slowdown))
    result = simulate([Request(0, 0, 1), Request(1, 0, 9)], build_policy(name), profile)
    first = chunks_of(result)[0]
    assert (first.start_ns, first.exclusive) == (18 * MS, exclusive)
    if exclusive:
        assert steps_of(result)[1].start_ns == first.end_ns == 48 * MS
    # No step comes after the last denoising, so the last decode holds nothing.
    assert not chunks_of(result)[-1].exclusive


def test_placement_looks_at_the_rows_of_the_coming_step() -> None:
    """At 2 rows overlap pays, at 8 it does not; the arrival at 20 ms makes the difference."""
    slowdowns = {1: PAYS, 2: PAYS, 8: LOSES, 32: LOSES}
    profile = affine_profile(slowdowns=slowdowns)
    for images, exclusive in ((0, False), (3, True)):
        more = [Request(2, 10 * MS, 9, images=images)] if images else []
        result = simulate([Request(0, 0, 1), Request(1, 0, 9), *more], build_policy("load-skip"), profile)
        assert chunks_of(result)[0].exclusive is exclusive


def test_load_skip_skips_while_enough_samples_wait() -> None:
    """Batch 2, skip_queue 3: with 7 samples there are 5, then 3, then 1 waiting."""
    budget = SkipBudget(PPM, warmup_steps=0, longest_run=1)
    policy = build_policy("load-skip", {"batch": 2, "skip_queue": 3})
    result = simulate(requests_at(*[0] * 7, steps=4), policy, affine_profile(), budget=budget)
    modes = [record.modes[0] for record in result.requests]
    assert modes == ["grgr", "grgr", "grgr", "grgr", "gggg", "gggg", "gggg"]
    fresh: Any = build_policy("load-skip")
    assert fresh.parameters["skip_queue"] == 8


def test_edf_admits_by_deadline_and_missed_ones_last() -> None:
    """One at a time, 20 ms each: C is due first, A's deadline passes while it waits, and D has none."""
    profile = make_profile({1: 10 * MS, 2: 10 * MS}, {"whole": [MS]})
    slos = {"first": 1_000, "A": 15, "B": 900, "C": 200, "D": None}
    requests = [Request(i, 0, 2, slo_ns=None if ms is None else ms * MS) for i, ms in enumerate(slos.values())]
    requests[0] = Request(0, 0, 2, slo_ns=10 * MS)
    result = simulate(requests, build_policy("edf", {"batch": 1}), profile)
    order = sorted(range(5), key=lambda i: result.requests[i].admitted_ns)
    assert [list(slos)[i] for i in order] == ["first", "C", "B", "D", "A"]


def test_edf_skips_guidance_only_while_a_deadline_is_in_danger() -> None:
    """10 steps of 14 ms and a decode of 30 ms end at 170 ms: a deadline at 171 is safe, one at 169 is not."""
    budget = SkipBudget(500_000, warmup_steps=1, longest_run=1)
    for slo_ms, skipped in ((171, 0), (169, 1), (0.5, 0)):
        requests = [Request(0, 0, 10, slo_ns=round(slo_ms * MS))]
        result = simulate(requests, build_policy("edf"), affine_profile(), budget=budget)
        # Each skip saves 2 ms, so one is enough; a deadline that has passed puts nothing in danger.
        assert result.requests[0].skipped_steps == skipped, slo_ms


def test_edf_skips_for_a_waiting_sample_too() -> None:
    budget = SkipBudget(500_000, warmup_steps=1, longest_run=1)
    requests = [Request(0, 0, 10), Request(1, 0, 10, slo_ns=300 * MS)]
    tight = simulate(requests, build_policy("edf", {"batch": 1}), affine_profile(), budget=budget)
    assert tight.requests[1].admitted_ns == 0
    late = [Request(0, 0, 10, slo_ns=5_000 * MS), Request(1, 1, 10, slo_ns=300 * MS)]
    result = simulate(late, build_policy("edf", {"batch": 1}), affine_profile(), budget=budget)
    assert result.requests[0].skipped_steps > 0


def test_static_and_dynamic_step_what_fits_when_rows_are_lowered() -> None:
    class Lowered:
        def __init__(self, inner: Any) -> None:
            self.inner, self.NAME = inner, inner.NAME
            self.chunking = "whole"

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.inner.reset(worker, profile)

        def decide(self, view: View) -> Any:
            view.max_rows = 32 if view.now_ns == 0 else 4
            return self.inner.decide(view)

    for name in ("static", "dynamic"):
        result = simulate(requests_at(0, 0, 0, steps=3), Lowered(build_policy(name)), affine_profile())
        assert [len(step.samples) for step in steps_of(result)][:2] == [3, 2]
        assert max(step.rows for step in steps_of(result)[1:]) == 4


def test_auto_skips_as_many_as_shorten_the_step_most_per_skip() -> None:
    """Buckets of 4 and 8 rows: of four samples that may skip, two spare 10 ms and four 16 ms, so two do."""
    profile = make_profile({1: 5 * MS, 4: 24 * MS, 6: 30 * MS, 8: 40 * MS}, {"whole": [MS]})
    policy: Any = build_policy("auto", {"batch": 4})
    budget = SkipBudget(PPM, warmup_steps=1, longest_run=1)
    result = simulate(requests_at(0, 0, 0, 0, steps=5), policy, profile, budget=budget)
    assert [step.modes for step in steps_of(result)] == ["gggg", "rrgg", "ggrr", "rrgg", "ggrr"]
    three = simulate(requests_at(0, 0, 0, steps=3), build_policy("auto"), profile, budget=budget)
    # From 6 rows nothing is saved before 4: two skip, not one, and not three, which would be 3 rows in a bucket of 4.
    assert [step.modes for step in steps_of(three)] == ["ggg", "rrg", "ggg"]
    assert policy.best_skips(8, 1) == 0


def test_auto_skips_first_who_has_most_skips_left_per_step() -> None:
    profile = make_profile({1: 5 * MS, 3: 20 * MS, 4: 40 * MS}, {"whole": [MS]})
    budget = SkipBudget(500_000, warmup_steps=1, longest_run=1)
    requests = [Request(0, 0, 9), Request(1, 0, 4)]
    result = simulate(requests, build_policy("auto", {"size_weight": 0.0}), profile, budget=budget)
    assert [step.modes for step in steps_of(result)][:3] == ["gg", "gr", "rg"]


def test_auto_starts_the_next_decode_in_the_middle_of_a_step() -> None:
    requests = [Request(0, 0, 1), Request(1, 0, 1), Request(2, 0, 9)]
    profile = make_profile({1: 50 * MS, 8: 100 * MS}, {"whole": [20 * MS]}, both((1_250_000, 1_500_000)))
    result = simulate(requests, build_policy("auto"), profile)
    assert [c.start_ns // MS for c in chunks_of(result)][:2] == [100, 130]
    losing = make_profile({1: 50 * MS, 8: 100 * MS}, {"whole": [20 * MS]}, both(LOSES))
    result = simulate(requests, build_policy("auto"), losing)
    assert [(c.start_ns // MS, c.exclusive) for c in chunks_of(result)][:2] == [(100, True), (120, True)]


@pytest.mark.parametrize(("weight", "arrival_ms", "order"), [(2.0, 150, "021"), (2.0, 170, "012"), (0.0, 1, "012")])
def test_auto_lets_a_small_request_overtake_one_that_came_shortly_before(
    weight: float, arrival_ms: int, order: str
) -> None:
    """One sample at a time, steps of 10 ms: 10 steps count as 2 * 100 ms and 2 as 40, so up to 160 ms are overtaken."""
    profile = make_profile({1: 10 * MS, 2: 10 * MS}, {"whole": [MS]}, both((PPM, PPM)))
    requests = [Request(0, 0, 40), Request(1, 2 * MS, 10), Request(2, (2 + arrival_ms) * MS, 2)]
    result = simulate(requests, build_policy("auto", {"batch": 1, "size_weight": weight}), profile)
    started = sorted(result.requests, key=lambda record: record.admitted_ns)
    assert "".join(str(record.request.request_id) for record in started) == order


@pytest.mark.parametrize(("waiting", "exclusive"), [(0, True), (9, False)])
def test_auto_places_a_decode_where_all_samples_together_wait_least(waiting: int, exclusive: bool) -> None:
    """Beside, a decode of 20 ms takes 30 and holds steps up by 12: it pays for throughput, but 10 ms for the decode are
    more than 8 ms spared for one other sample."""
    slowdowns = both((5 * PPM // 3, 3 * PPM // 2))
    profile = make_profile({1: 50 * MS, 4: 50 * MS}, {"whole": [20 * MS]}, slowdowns)
    requests = [Request(0, 0, 1), Request(1, 0, 9), *(Request(2 + i, 0, 9) for i in range(waiting))]
    result = simulate(requests, build_policy("auto", {"batch": 2}), profile)
    assert chunks_of(result)[0].samples == (0,)
    assert chunks_of(result)[0].exclusive is exclusive


def test_auto_decodes_alone_what_would_lose_beside_a_step_that_may_come() -> None:
    """Nothing runs when the first decode starts; the request that comes meanwhile waits for its end."""
    profile = make_profile({1: 10 * MS, 8: 10 * MS}, {"whole": [20 * MS]}, both(LOSES))
    result = simulate([Request(0, 0, 1), Request(1, 15 * MS, 1)], build_policy("auto"), profile)
    assert [(c.start_ns // MS, c.end_ns // MS, c.exclusive) for c in chunks_of(result)] == [
        (10, 30, True),
        (40, 60, True),
    ]


def test_auto_holds_steps_back_while_decodes_are_the_bottleneck() -> None:
    """A decode takes 150 ms beside steps that feed one every 25: the queue stays below its limit, unlike elsewhere."""
    profile = make_profile({1: 10 * MS, 8: 100 * MS}, {"whole": [100 * MS]}, both((1_500_000, 1_500_000)))
    longest = {}
    for name in ("auto", "load-skip"):
        result = simulate([Request(i, 0, 1) for i in range(60)], build_policy(name, {"batch": 4}), profile)
        done, most = 0, 0
        for record in sorted(result.work, key=lambda w: w.end_ns):
            done += len(record.samples) if record.kind == "step" else -1
            most = max(most, done)
        longest[name] = most
        makespan = result.end_ns
        if name == "auto":
            auto_ns = makespan
    assert longest["auto"] <= 4 + 4
    assert longest["load-skip"] > 30
    # 60 decodes of 100 ms and the steps they cover, 25 ms each at a third of their speed: 1 / (c + D s_u (1 - 1/s_v)).
    assert auto_ns == pytest.approx(60 * (100 + 25 * 1.5 / 3) * MS, rel=0.05)


def test_auto_cuts_the_decode_so_that_it_costs_least() -> None:
    cheap = (1_100_000, 1_100_000)
    cells = make_profile({1: 10, 8: 20}, {"whole": [100], "c2": [50, 50]}, both((1_900_000, 1_900_000)))
    halves = make_profile({1: 10, 8: 20}, {"c2": [1, 1]}, both(cheap))
    cells.corun = {**cells.corun, **halves.corun}
    policy = build_policy("auto", {"batch": 4})
    simulate(requests_at(0), policy, cells)
    assert policy.chunking == "c2"
    simulate(requests_at(0), policy, cells, decode_gpus=(1,))
    assert policy.chunking == "whole"
