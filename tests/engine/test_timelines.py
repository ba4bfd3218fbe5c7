"""Hand-computed timelines, to the nanosecond, for the corners of the contract, on both engines."""

from __future__ import annotations

from typing import Any

import pytest

from policies.registry import build_policy
from synerdiff.core import GUIDED, ChunkLaunch, Decision, Request, RunResult, View
from tests.builders import Script, make_profile


def spans(result: RunResult, lane: Any = None) -> list[Any]:
    return [(w.lane, w.start_ns, w.end_ns) for w in result.work if lane is None or w.lane == lane]


def test_an_exclusive_launch_holds_the_denoise_lane_and_runs_chunk_after_chunk(play: Any) -> None:
    profile = make_profile({2: 100}, {"whole": [90], "c3": [20, 30, 40]})
    policy = Script(
        Decision(admit=(0,), step=((0, GUIDED),)),
        Decision(chunks=(ChunkLaunch(0, 3, exclusive=True),)),
        Decision(),
        Decision(),
        chunking="c3",
    )
    late = Request(1, 150, steps=1)
    with pytest.raises(Exception, match="launched nothing while nothing runs"):
        play([Request(0, 0, steps=1), late], policy, profile)
    # Asked after each chunk, but not by the arrival at 150, for the denoise lane is held.
    assert policy.asked == [0, 100, 120, 150, 190]


def test_an_arrival_during_an_exclusive_launch_does_not_ask(play: Any) -> None:
    profile = make_profile({2: 100}, {"whole": [90], "c3": [20, 30, 40]})
    policy = Script(
        Decision(admit=(0,), step=((0, GUIDED),)),
        Decision(chunks=(ChunkLaunch(0, 3, exclusive=True),)),
        Decision(),
        Decision(),
        lambda view: Decision(admit=(1,), step=((1, GUIDED),)),
        Decision(chunks=(ChunkLaunch(1, 3),)),
        chunking="c3",
    )
    result = play([Request(0, 0, steps=1), Request(1, 135, steps=1)], policy, profile)
    assert policy.asked == [0, 100, 120, 150, 190, 290, 310, 340]
    assert [(w.chunk, w.start_ns, w.end_ns, w.exclusive) for w in result.work if w.kind == "chunk"] == [
        (0, 100, 120, True),
        (1, 120, 150, True),
        (2, 150, 190, True),
        (0, 290, 310, False),
        (1, 310, 340, False),
        (2, 340, 380, False),
    ]


def test_everything_of_one_instant_is_taken_before_the_policy_is_asked_once(play: Any) -> None:
    # At 100 a step ends, a chunk ends, a request arrives and a wake is due.
    profile = make_profile({2: 50}, {"whole": [50]})
    seen = []

    def look(view: View) -> Any:
        seen.append(
            (
                view.now_ns,
                [s.id for s in view.step_done],
                [s.id for s in view.chunk_done],
                [s.id for s in view.arrived],
                [(s.id, reason) for s, reason in view.gone],
                view.closed,
            )
        )
        return Decision(admit=(2,), step=((2, GUIDED),), chunks=(ChunkLaunch(1, 1),))

    policy = Script(
        Decision(admit=(0,), step=((0, GUIDED),)),
        Decision(admit=(1,), step=((1, GUIDED),), chunks=(ChunkLaunch(0, 1),), wake_at_ns=100),
        look,
        Decision(chunks=(ChunkLaunch(2, 1),)),
    )
    requests = [Request(0, 0, steps=1), Request(1, 0, steps=1), Request(2, 100, steps=1)]
    play(requests, policy, profile)
    assert seen == [(100, [1], [0], [2], [(0, "done")], True)]
    assert policy.asked == [0, 50, 100, 150]


def test_the_wake_asks_and_a_later_decision_replaces_it(play: Any) -> None:
    profile = make_profile({2: 50}, {"whole": [10]})
    policy = Script(
        Decision(wake_at_ns=30),
        Decision(wake_at_ns=200),
        Decision(admit=(0,), step=((0, GUIDED),)),
        Decision(chunks=(ChunkLaunch(0, 1, exclusive=True),)),
        lambda view: Decision(admit=(1,), step=((1, GUIDED),), wake_at_ns=140),
        Decision(),
        Decision(chunks=(ChunkLaunch(1, 1),), wake_at_ns=10_000),
    )
    result = play([Request(0, 0, steps=1), Request(1, 40, steps=1)], policy, profile)
    # 0: wake at 30; 30: wake at 200; 40: the arrival asks, its decision clears the wake; 90 and 100: as usual;
    # 140: the wake in the middle of a step; 150: its end. The wake left at 10,000 does not prolong the run.
    assert policy.asked == [0, 30, 40, 90, 100, 140, 150]
    assert result.end_ns == 160


def test_decisions_close_early_and_take_effect_at_the_real_end(play: Any) -> None:
    profile = make_profile({2: 100, 4: 100}, {"whole": [30]}, overheads={"decision_lead": 20})
    policy = build_policy("continuous-parallel")
    asked = []
    decide = policy.decide
    policy.decide = lambda view: asked.append(view.now_ns) or decide(view)  # type: ignore[func-returns-value, method-assign]
    # 1 arrives at 70: in time for the decision at 80. 2 arrives at 90: too late, it joins the step from 200.
    requests = [Request(0, 0, steps=2), Request(1, 70, steps=1), Request(2, 90, steps=1)]
    result = play(requests, policy, profile)
    assert [(w.start_ns, w.end_ns, w.samples) for w in result.work if w.kind == "step"] == [
        (0, 100, (0,)),
        (100, 200, (0, 1)),
        (200, 300, (2,)),
    ]
    # At 180 the policy launches the decode of 0, which the running step frees: it starts at 200. Sample 1's decode
    # waits for the lane: asked at 230, launched at once. At 280 the decode of 2 is committed for 300.
    assert spans(result, "decode0") == [("decode0", 200, 230), ("decode0", 230, 260), ("decode0", 300, 330)]
    assert [r.admitted_ns for r in result.requests] == [0, 80, 180]
    assert asked == [0, 80, 180, 230, 260, 280, 300]


def test_an_early_decision_without_a_step_is_asked_again_at_the_real_end(play: Any) -> None:
    profile = make_profile({2: 100}, {"whole": [30]}, overheads={"decision_lead": 20})
    policy = build_policy("continuous-serial")
    result = play([Request(0, 0, steps=1), Request(1, 95, steps=1)], policy, profile)
    # At 80 the exclusive decode of 0 is committed; it runs 100-130 and holds the lane although 1 waits since 95.
    assert spans(result) == [("denoise", 0, 100), ("decode0", 100, 130), ("denoise", 130, 230), ("decode0", 230, 260)]


def test_a_step_shorter_than_the_lead_is_decided_on_at_its_start(play: Any) -> None:
    profile = make_profile({2: 10}, {"whole": [5]}, overheads={"decision_lead": 20})
    asked = []
    policy = build_policy("continuous-serial")
    decide = policy.decide
    policy.decide = lambda view: asked.append(view.now_ns) or decide(view)  # type: ignore[func-returns-value, method-assign]
    result = play([Request(0, 0, steps=2)], policy, profile)
    assert asked == [0, 0, 10]  # a second round at the very start of each step; at 20 the decode is committed already
    assert spans(result) == [("denoise", 0, 10), ("denoise", 10, 20), ("decode0", 20, 25)]


def test_the_images_of_a_request_are_samples_and_it_is_done_with_the_last(play: Any) -> None:
    profile = make_profile({2: 100, 4: 150, 6: 170}, {"whole": [30]})
    result = play([Request(0, 0, steps=1, images=3)], build_policy("continuous-serial", {"batch": 2}), profile)
    assert spans(result) == [
        ("denoise", 0, 150),
        ("decode0", 150, 180),
        ("decode0", 180, 210),
        ("denoise", 210, 310),
        ("decode0", 310, 340),
    ]
    record = result.requests[0]
    assert (record.admitted_ns, record.denoised_ns, record.decode_started_ns, record.finished_ns) == (
        210,
        310,
        310,
        340,
    )
    assert [w.rows for w in result.work] == [4, 0, 0, 2, 0]


def test_static_pads_finished_samples_and_waits_for_batch_delay_or_the_end(play: Any) -> None:
    profile = make_profile({2: 100, 4: 150, 6: 200}, {"whole": [30]})
    policy = build_policy("static", {"batch": 2, "max_wait_s": 1e-6})
    requests = [Request(0, 0, steps=1), Request(1, 400, steps=2), Request(2, 5000, steps=1), Request(3, 9000, steps=1)]
    result = play(requests, policy, profile)
    # Two at 400; the short one pads the second step; decoded one by one from 700; 2 waits its full 1,000 ns;
    # 3 is the last arrival, so it does not wait.
    assert [(w.lane, w.start_ns, w.end_ns, w.rows, w.pad_rows) for w in result.work] == [
        ("denoise", 400, 550, 4, 0),
        ("denoise", 550, 700, 4, 2),
        ("decode0", 700, 730, 0, 0),
        ("decode0", 730, 760, 0, 0),
        ("denoise", 6000, 6100, 2, 0),
        ("decode0", 6100, 6130, 0, 0),
        ("denoise", 9000, 9100, 2, 0),
        ("decode0", 9100, 9130, 0, 0),
    ]


def test_dynamic_lets_nobody_join_until_the_batch_is_empty(play: Any) -> None:
    profile = make_profile({2: 100, 4: 150}, {"whole": [30]})
    requests = [Request(0, 0, steps=2), Request(1, 10, steps=1), Request(2, 20, steps=1)]
    result = play(requests, build_policy("dynamic", {"batch": 2}), profile)
    assert [(w.lane, w.start_ns, w.end_ns, w.samples) for w in result.work] == [
        ("denoise", 0, 100, (0,)),
        ("denoise", 100, 200, (0,)),
        ("decode0", 200, 230, (0,)),
        ("denoise", 230, 380, (1, 2)),
        ("decode0", 380, 410, (1,)),
        ("decode0", 410, 440, (2,)),
    ]


def test_continuous_admission_does_not_overtake_across_batch_keys(play: Any) -> None:
    profile = make_profile({2: 100, 4: 150}, {"whole": [30]})
    requests = [
        Request(0, 0, steps=2),
        Request(1, 10, steps=1, base_model="other"),
        Request(2, 20, steps=1),
    ]
    result = play(requests, build_policy("continuous-serial"), profile)
    assert [w.samples for w in result.work if w.kind == "step"] == [(0,), (0,), (1,), (2,)]


def test_buckets_cost_the_next_larger_one_and_eager_profiles_interpolate(play: Any) -> None:
    times = {2: 100, 6: 201}
    request = [Request(0, 0, steps=1, images=2)]
    policy = build_policy("continuous-serial")
    bucketed = play(request, policy, make_profile(times, {"whole": [30]}))
    eager = play(request, policy, make_profile(times, {"whole": [30]}, eager=True))
    assert bucketed.work[0].end_ns == 201
    assert eager.work[0].end_ns == 151  # 150.5, halves up
    assert bucketed.work[0].rows == eager.work[0].rows == 4
