"""Every breach of the policy contract is an error that names policy, time and reason."""

from __future__ import annotations

from typing import Any

import pytest

from synerdiff.core import (
    CONDITIONAL,
    GUIDED,
    NO_SKIPS,
    REUSE,
    ChunkLaunch,
    ContractError,
    Decision,
    LoraUse,
    Request,
    SkipBudget,
)
from tests.builders import Script, make_profile

PROFILE = make_profile({2: 100, 4: 150}, {"whole": [40], "c2": [20, 20]})
G, C, R = GUIDED, CONDITIONAL, REUSE
START = Decision(admit=(0,), step=((0, G),))
"""Sample 0 is denoised from 0 to 100."""


def check_refused(play: Any, reason: Any, *decisions: Any, requests: Any = None, budget: Any = NO_SKIPS) -> None:
    requests = requests or [Request(0, 0, steps=1), Request(1, 0, steps=1)]
    with pytest.raises(ContractError, match=rf"policy 'script' at [0-9.]+ s: {reason}"):
        play(requests, Script(*decisions, chunking="c2"), PROFILE, lanes=2, budget=budget)


@pytest.mark.parametrize(
    ("reason", "decision"),
    [
        ("sample id 7 is unknown", Decision(admit=(7,))),
        ("sample id -1 is unknown", Decision(reject=(-1,))),
        ("sample id '0.0' is unknown", Decision(admit=("0.0",))),  # type: ignore[arg-type]
        ("sample id True is unknown", Decision(admit=(True,))),
        ("sample 0.0 cannot be admitted: it is active", Decision(admit=(0, 0))),
        ("sample 0.0 cannot be rejected: it is active", Decision(admit=(0,), reject=(0,))),
        ("sample 0.0 cannot be stepped: it is waiting", Decision(step=((0, G),))),
        ("sample 0.0 is in the step twice", Decision(admit=(0,), step=((0, G), (0, G)))),
        ("sample 0.0 cannot be decoded: it is waiting", Decision(chunks=(ChunkLaunch(0, 1),))),
        ("mode reuse is not allowed for sample 0.0 now; allowed: guided", Decision(admit=(0,), step=((0, R),))),
        ("mode sideways is not allowed for sample 0.0 now", Decision(admit=(0,), step=((0, "sideways"),))),  # type: ignore[arg-type]
        ("pad_rows is 2 without a step", Decision(pad_rows=2)),
        ("pad_rows is -1", Decision(admit=(0,), step=((0, G),), pad_rows=-1)),
        ("the step has 5 rows; at most 4 are possible", Decision(admit=(0,), step=((0, G),), pad_rows=3)),
        ("wake_at_ns is 0, which is not after now", Decision(wake_at_ns=0)),
        ("it launched nothing while nothing runs, nothing can arrive and no wake is set; 2 samples wait", Decision()),
        ("it launched nothing while nothing runs", Decision(admit=(0,))),
    ],
)
def test_a_first_decision_that_is_wrong(play: Any, reason: str, decision: Any) -> None:
    check_refused(play, reason, decision)


@pytest.mark.parametrize(
    ("reason", "decision"),
    [
        ("there is no decode lane 2; lanes count from 0 to 1", Decision(chunks=(ChunkLaunch(0, 1, 2),))),
        ("there is no decode lane -1", Decision(chunks=(ChunkLaunch(0, 1, -1),))),
        ("3 chunks of sample 0.0 were launched; 2 are left", Decision(chunks=(ChunkLaunch(0, 3),))),
        ("0 chunks of sample 0.0 were launched; 2 are left", Decision(chunks=(ChunkLaunch(0, 0),))),
        (
            "sample 0.0 is being decoded on another lane",
            Decision(chunks=(ChunkLaunch(0, 1), ChunkLaunch(0, 1, 1))),
        ),
        (
            "an exclusive launch needs the denoise lane idle",
            Decision(admit=(1,), step=((1, G),), chunks=(ChunkLaunch(0, 1, exclusive=True),)),
        ),
    ],
)
def test_a_decision_after_a_step_that_is_wrong(play: Any, reason: str, decision: Any) -> None:
    check_refused(play, reason, START, decision)


def test_lanes_hold_one_piece_at_a_time(play: Any) -> None:
    requests = [Request(i, 0, steps=1) for i in range(3)]
    both = Decision(admit=(0, 1), step=((0, G), (1, G)))
    check_refused(
        play,
        "decode lane 0 is busy with sample 0.0",
        both,
        Decision(chunks=(ChunkLaunch(0, 2), ChunkLaunch(1, 2))),
        requests=requests,
    )
    check_refused(
        play,
        "a step was decided while the denoise lane is busy or held",
        both,
        Decision(admit=(2,), step=((2, G),), chunks=(ChunkLaunch(0, 1),)),
        Decision(step=((2, G),)),
        requests=requests,
    )
    check_refused(
        play,
        "a step was decided while the denoise lane is busy or held",
        both,
        Decision(admit=(2,), chunks=(ChunkLaunch(0, 2, exclusive=True),)),
        Decision(step=((2, G),)),
        requests=requests,
    )
    check_refused(
        play,
        "an exclusive launch needs the denoise lane idle",
        both,
        Decision(chunks=(ChunkLaunch(0, 2, 0, exclusive=True), ChunkLaunch(1, 2, 1, exclusive=True))),
        requests=requests,
    )


def test_samples_of_different_keys_do_not_share_a_step(play: Any) -> None:
    for field in ({"base_model": "other"}, {"loras": (LoraUse("style"),)}, {"height": 64, "width": 64}):
        requests = [Request(0, 0, steps=1), Request(1, 0, steps=1, **field)]
        check_refused(
            play, "sample 1.0 has batch key", Decision(admit=(0, 1), step=((0, G), (1, G))), requests=requests
        )


def test_an_unguided_sample_takes_conditional_steps_only(play: Any) -> None:
    requests = [Request(0, 0, steps=1, guidance_scale=1.0)]
    reason = "sample 0.0 is unguided and takes only conditional steps, not"
    check_refused(play, f"{reason} guided", Decision(admit=(0,), step=((0, G),)), requests=requests)
    check_refused(play, f"{reason} reuse", Decision(admit=(0,), step=((0, R),)), requests=requests)


def skip(mode: Any) -> Any:
    return Decision(step=((0, mode),))


@pytest.mark.parametrize(
    ("budget", "decisions"),
    [
        # floor(4 * 0.49) = 1 skip: the second is one too many.
        (SkipBudget(490_000, 0, 4, CONDITIONAL), [Decision(admit=(0,), step=((0, C),)), skip(C)]),
        # Two warm-up steps.
        (SkipBudget(1_000_000, 2, 4, CONDITIONAL), [START, skip(C)]),
        # At most one in a row.
        (SkipBudget(1_000_000, 0, 1, CONDITIONAL), [Decision(admit=(0,), step=((0, C),)), skip(C)]),
        # Reuse needs an earlier guided step.
        (SkipBudget(1_000_000, 0, 4, REUSE), [Decision(admit=(0,), step=((0, R),))]),
        # The budget names the mode.
        (SkipBudget(1_000_000, 0, 4, REUSE), [START, skip(C)]),
        # A calibration names the steps: of 4, only the third.
        (SkipBudget(1_000_000, 0, 4, "reuse", {4: frozenset({2})}), [START, skip(R)]),  # type: ignore[arg-type]
    ],
)
def test_the_engine_owns_the_skip_budget(play: Any, budget: Any, decisions: list[Any]) -> None:
    check_refused(
        play,
        "mode (conditional|reuse) is not allowed for sample 0.0",
        *decisions,
        requests=[Request(0, 0, 4)],
        budget=budget,
    )


def test_a_budget_is_spent_as_allowed_and_recorded(play: Any) -> None:
    budget = SkipBudget(500_000, 1, 1, REUSE)
    policy = Script(START, skip(R), skip(G), skip(R), skip(G), Decision(chunks=(ChunkLaunch(0, 2),)), chunking="c2")
    result = play([Request(0, 0, steps=5)], policy, PROFILE, budget=budget)
    assert result.requests[0].modes == ("grgrg",)
    assert result.requests[0].skipped_steps == 2
    assert [w.modes for w in result.work if w.kind == "step"] == ["g", "r", "g", "r", "g"]
    assert [w.rows for w in result.work if w.kind == "step"] == [2, 1, 2, 1, 2]


def test_a_rejected_image_rejects_its_request(play: Any) -> None:
    policy = Script(
        Decision(admit=(0,), reject=(1,), step=((0, G),)), Decision(chunks=(ChunkLaunch(0, 2),)), chunking="c2"
    )
    record = play([Request(0, 0, steps=1, images=2)], policy, PROFILE).requests[0]
    assert (record.status, record.finished_ns) == ("rejected", -1)


def test_a_step_decided_again_as_the_same_object_is_checked_again_once_a_member_has_left(play: Any) -> None:
    """Both take two steps; sample 0 ends after the second, and the very same step is then refused."""
    both = ((0, G), (1, G))
    requests = [Request(0, 0, steps=2), Request(1, 0, steps=3)]
    decisions = (Decision(admit=(0, 1), step=both), Decision(step=both), Decision(step=both))
    check_refused(play, "sample 0.0 cannot be stepped: it is decoding", *decisions, requests=requests)


def test_a_step_decided_again_as_the_same_object_may_not_have_a_skip_that_is_spent(play: Any) -> None:
    """Half of four steps may be skipped, one at a time: the same skipping step twice in a row is refused."""
    skipping = ((0, R),)
    decisions = (Decision(admit=(0,), step=((0, G),)), Decision(step=skipping), Decision(step=skipping))
    budget = SkipBudget(500_000, warmup_steps=1, longest_run=1)
    check_refused(play, "mode reuse is not allowed", *decisions, requests=[Request(0, 0, steps=4)], budget=budget)
