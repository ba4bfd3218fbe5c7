"""Hand-computed timelines, to the nanosecond, for the corners of the contract."""

from __future__ import annotations

from typing import Any

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import GUIDED, ChunkLaunch, Decision, Request, RunResult, View
from tests.builders import Script, make_profile


def spans(result: RunResult, lane: Any = None) -> list[Any]:
    return [(w.lane, w.start_ns, w.end_ns) for w in result.work if lane is None or w.lane == lane]


def test_one_request_alone_is_the_sum_of_its_parts() -> None:
    profile = make_profile(
        {2: 100},
        {"whole": [40]},
        overheads={"step_dispatch": 3, "chunk_dispatch": 5, "text_encode": 7, "result_copy": 11},
    )
    result = simulate([Request(0, 1000, steps=2)], build_policy("continuous-serial"), profile)
    assert spans(result) == [("denoise", 1007, 1110), ("denoise", 1110, 1213), ("decode0", 1213, 1258)]
    record = result.requests[0]
    assert (record.admitted_ns, record.denoised_ns, record.decode_started_ns) == (1007, 1213, 1213)
    assert record.finished_ns == 1258 + 11


def test_a_step_launched_on_an_idle_lane_takes_longer() -> None:
    # Without a decision lead every step is decided at its start: each pays 9, which a chunk beside it slows too.
    profile = make_profile(
        {2: 100, 4: 200}, {"whole": [40]}, {2: (2_000_000, 1_000_000), 4: (1, 1)}, launches={2: 9, 4: 50}
    )
    result = simulate([Request(0, 0, steps=2)], build_policy("continuous-serial"), profile)
    assert spans(result) == [("denoise", 0, 109), ("denoise", 109, 218), ("decode0", 218, 258)]
    policy = Script(
        Decision(admit=(0, 1), step=((0, GUIDED),)),
        Decision(step=((1, GUIDED),), chunks=(ChunkLaunch(0, 1),)),
        Decision(),
        Decision(chunks=(ChunkLaunch(1, 1),)),
    )
    result = simulate([Request(0, 0, steps=1), Request(1, 0, steps=1)], policy, profile)
    # Beside the chunk of 40 the step does 20 of its 109; 89 are left.
    assert spans(result, "denoise") == [("denoise", 0, 109), ("denoise", 109, 109 + 40 + 89)]


def test_a_step_committed_beside_another_pays_no_launch() -> None:
    profile = make_profile({2: 100}, {"whole": [40]}, launches={2: 9}, overheads={"decision_lead": 10})
    result = simulate([Request(0, 0, steps=3)], build_policy("continuous-serial"), profile)
    # The first is launched on an idle lane. The next two are decided 10 before the ends of the running ones.
    assert spans(result) == [
        ("denoise", 0, 109),
        ("denoise", 109, 209),
        ("denoise", 209, 309),
        ("decode0", 309, 349),
    ]
    again = simulate([Request(0, 0, 1), Request(1, 500, 1)], build_policy("continuous-serial"), profile)
    assert spans(again, "denoise") == [("denoise", 0, 109), ("denoise", 500, 609)]


def test_a_launch_is_looked_up_at_the_bucket_and_neither_drawn_nor_scaled() -> None:
    profile = make_profile({2: 100, 8: 400}, {"whole": [40]}, launches={8: 50})
    assert [profile.launch_ns(rows) for rows in (1, 2, 3, 8)] == [0, 0, 50, 50]
    assert profile.on_worker(2_000_000).launch_ns(8) == 50
    eager = make_profile({2: 100, 8: 400}, {"whole": [40]}, launches={4: 10, 8: 50}, eager=True)
    assert [eager.launch_ns(rows) for rows in (2, 4, 5, 8)] == [0, 10, 20, 50]
    drawn = simulate(
        [Request(0, 0, steps=1)],
        build_policy("continuous-serial"),
        make_profile({2: 100}, {"whole": [40]}, launches={2: 9}),
        dispersion_seed=1,
    )
    assert spans(drawn, "denoise") == [("denoise", 0, 109)], "a spread of no width draws its median"


def test_a_chunk_that_outlasts_its_step_runs_on_beside_the_next_at_that_step_s_slowdown() -> None:
    # Rows 2: step 100 slowed by 1.5, chunk 200 slowed by 2. Rows 4: step 120 slowed by 1.25, chunk slowed by 4.
    profile = make_profile({2: 100, 4: 120}, {"whole": [200]}, {2: (1_500_000, 2_000_000), 4: (1_250_000, 4_000_000)})
    policy = Script(
        Decision(admit=(0, 1, 2), step=((0, GUIDED),)),
        Decision(step=((1, GUIDED),), chunks=(ChunkLaunch(0, 1),)),
        Decision(step=((1, GUIDED), (2, GUIDED))),
        Decision(step=((2, GUIDED),)),
        Decision(),
        Decision(chunks=(ChunkLaunch(1, 1), ChunkLaunch(2, 1, 1))),
    )
    requests = [Request(0, 0, steps=1), Request(1, 0, steps=2), Request(2, 0, steps=2)]
    result = simulate(requests, policy, profile, decode_gpus=(0, 0))
    # Step of 1 beside the chunk: 100 -> 250. The chunk has done floor(150/2) = 75 of 200; 125 are left.
    # Step of 1 and 2 beside it: 250 -> 400, the chunk at 1/4: floor(150/4) = 37 done, 88 left.
    # Step of 2: 400 -> 550, both again at the slowdowns of 2 rows: the chunk has done floor(150/2) = 75 more.
    # From 550 nothing contends: the 13 left run alone and end at 563.
    assert spans(result) == [
        ("denoise", 0, 100),
        ("denoise", 100, 250),
        ("decode0", 100, 563),
        ("denoise", 250, 400),
        ("denoise", 400, 550),
    ] + [("decode0", 563, 763), ("decode1", 563, 763)]
    assert policy.asked == [0, 100, 250, 400, 550, 563]


def test_slowdowns_add_over_decode_lanes_and_another_gpu_does_not_contend() -> None:
    profile = make_profile({2: 100, 4: 100}, {"whole": [80]}, {2: (1_200_000, 1_500_000), 4: (1_200_000, 1_500_000)})

    def decode_the_last(view: View) -> Any:
        ready = any(sample.id == 2 and not sample.launched for sample in view.decoding)
        return Decision(chunks=(ChunkLaunch(2, 1),)) if ready else Decision()

    def run(gpus: Any) -> Any:
        policy = Script(
            Decision(admit=(0, 1, 2), step=((0, GUIDED), (1, GUIDED))),
            Decision(step=((2, GUIDED),), chunks=(ChunkLaunch(0, 1), ChunkLaunch(1, 1, 1))),
            *[decode_the_last] * 3,
        )
        requests = [Request(0, 0, steps=1), Request(1, 0, steps=1), Request(2, 0, steps=1)]
        return simulate(requests, policy, profile, decode_gpus=gpus).work

    same = run((0, 0))
    # Beside two chunks the step is slowed by 1 + 0.2 + 0.2; both chunks end at 100 + 120 = 220, then 1/1.0 speed.
    # By 220 the step has done floor(120 / 1.4) = 85; 15 are left.
    assert [(w.lane, w.start_ns, w.end_ns) for w in same][1:4] == [
        ("denoise", 100, 235),
        ("decode0", 100, 220),
        ("decode1", 100, 220),
    ]
    apart = run((0, 1))
    # Only lane 0 contends: chunk 0 ends at 220, chunk 1 at 180, and the step has done floor(120 / 1.2) = 100 at 220.
    assert [(w.gpu, w.lane, w.start_ns, w.end_ns) for w in apart][1:4] == [
        (0, "denoise", 100, 220),
        (0, "decode0", 100, 220),
        (1, "decode1", 100, 180),
    ]
