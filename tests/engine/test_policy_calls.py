"""Whatever a policy raises, exits with or returns is one sentence with policy, hook, time and the user's frames."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from policies.registry import build_policy
from synerdiff.core import ChunkLaunch, ContractError, Decision, InputError, Request, View, WorkerInfo
from synerdiff.profile.tables import Profile
from tests.builders import Script, make_profile
from tests.engine.conftest import Play

PROFILE = make_profile({2: 100, 4: 150}, {"whole": [40], "c2": [20, 20]})
REQUESTS = [Request(0, 0, steps=1)]
G = "guided"


class Mine:
    """A user's policy; each hook does what the test says."""

    def __init__(self, reset: Callable[[], Any] = lambda: None, decide: Callable[[], Any] = lambda: None) -> None:
        self.on_reset, self.on_decide = reset, decide
        self.chunking = "whole"

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.on_reset()

    def decide(self, view: View) -> Any:
        return self.on_decide()


def helper() -> None:
    raise KeyError("lost\nand more")


def refused(play: Play, policy: Any) -> str:
    with pytest.raises(ContractError) as error:
        play(REQUESTS, policy, PROFILE)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("leave", [lambda: sys.exit(0), helper, lambda: 1 // 0, lambda: dict[str, int]()["none"]])
def test_what_decide_raises_names_hook_time_and_own_frames(play: Play, leave: Callable[[], Any]) -> None:
    text = refused(play, Mine(decide=leave))
    assert re.match(r"policy 'Mine' at 0\.000000000 s: decide raised \w+( \(.*\))? \[decide in test_policy_calls", text)
    assert "rounds.py" not in text
    assert "worker_run.py" not in text


def test_frames_are_those_of_the_user_s_files(play: Play) -> None:
    text = refused(play, Mine(decide=helper))
    assert re.search(r"\(.*lost.*\) \[decide in test_policy_calls\.py, line \d+, helper in test_policy_calls\.py", text)


class Unsayable(Exception):
    def __str__(self) -> str:
        raise ValueError


class Beyond(BaseException):
    pass


def again(depth: int = 0) -> None:
    again(depth + 1)


@pytest.mark.parametrize("error", [Unsayable, Beyond, GeneratorExit, MemoryError])
def test_whatever_is_raised_is_one_sentence(play: Play, error: type[BaseException]) -> None:
    def leave() -> None:
        raise error

    assert f"decide raised {error.__name__} [" in refused(play, Mine(decide=leave))


def test_many_frames_are_cut(play: Play) -> None:
    text = refused(play, Mine(decide=again))
    assert "decide raised RecursionError" in text
    assert len(text) < 600


def test_what_reset_raises_names_the_hook(play: Play) -> None:
    text = refused(play, Mine(reset=lambda: sys.exit("enough")))
    assert text.startswith("policy 'Mine': reset raised SystemExit (enough) [reset in test_policy_calls.py")
    broken = Mine()
    broken.chunking = 7  # type: ignore[assignment]
    assert refused(play, broken) == ("policy 'Mine': after reset its chunking is 7; profile 'test' has whole, c2.")


def test_an_input_error_of_reset_stays_one(play: Play) -> None:
    with pytest.raises(InputError, match="policy 'dynamic': batch is 9"):
        play(REQUESTS, build_policy("dynamic", {"batch": 9}), PROFILE)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "decide returned None; a Decision is needed"),
        (3, "decide returned 3; a Decision is needed"),
        ("step", "decide returned 'step'; a Decision is needed"),
        ((), "decide returned a tuple; a Decision is needed"),
        ((number for number in range(0)), "decide returned a generator; a Decision is needed"),
        (Decision(admit=[0]), "admit is a list; a tuple is needed"),  # type: ignore[arg-type]
        (Decision(reject=None), "reject is None; a tuple is needed"),  # type: ignore[arg-type]
        (Decision(step=(number for number in range(0))), "step is a generator; a tuple is needed"),  # type: ignore[arg-type]
        (Decision(chunks=ChunkLaunch), "chunks is a type; a tuple is needed"),  # type: ignore[arg-type]
        (Decision(pad_rows=1.0), "pad_rows is 1.0; a whole number is needed"),  # type: ignore[arg-type]
        (Decision(pad_rows=True), "pad_rows is True; a whole number is needed"),
        (Decision(wake_at_ns=float("nan")), "wake_at_ns is nan; a whole number is needed"),  # type: ignore[arg-type]
        (Decision(wake_at_ns=1e9), "wake_at_ns is 1000000000.0; a whole number is needed"),  # type: ignore[arg-type]
        (Decision(admit=(0,), step=(0,)), "its decision cannot be read ("),  # type: ignore[arg-type]
        (Decision(admit=(0,), step=((0.0, G),)), "sample id 0.0 is unknown"),  # type: ignore[arg-type]
        (Decision(admit=(False,)), "sample id False is unknown"),
        (Decision(admit=(0,), step=((0, None),)), "mode None is not allowed for sample 0.0 now"),  # type: ignore[arg-type]
        (Decision(admit=(0,), step=((0, 5),)), "mode 5 is not allowed for sample 0.0 now"),  # type: ignore[arg-type]
    ],
)
def test_what_is_returned_of_a_wrong_type_is_refused(play: Play, found: Any, words: str) -> None:
    text = refused(play, Mine(decide=lambda: found))
    assert text.startswith("policy 'Mine' at 0.000000000 s: " + words)


@pytest.mark.parametrize(
    "launch",
    [
        ChunkLaunch(0, 1.0),  # type: ignore[arg-type]
        ChunkLaunch(0, 1, 0.0),  # type: ignore[arg-type]
        ChunkLaunch(0, 1, 0, 1),  # type: ignore[arg-type]
        (0, 1, 0, False, False),
        7,
    ],
)
def test_a_launch_of_a_wrong_type_is_refused(play: Play, launch: Any) -> None:
    policy = Script(Decision(admit=(0,), step=((0, G),)), Decision(chunks=(launch,)))  # type: ignore[arg-type]
    assert "is no ChunkLaunch of a sample" in refused(play, policy)


def test_decisions_that_bring_nothing_forward_end_the_run(play: Play) -> None:
    class Fidgety:
        chunking = "whole"
        asked = 0

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            pass

        def decide(self, view: View) -> Decision:
            self.asked += 1
            return Decision(wake_at_ns=view.now_ns + 1)

    policy = Fidgety()
    with pytest.raises(ContractError, match="10000 decisions in a row started, admitted, rejected and ended nothing"):
        play(REQUESTS, policy, PROFILE)
    assert policy.asked == 10_000


def test_decisions_count_anew_after_progress(play: Play) -> None:
    class Slow:
        """Wakes 9,000 times before each of its steps."""

        chunking = "whole"
        asked = 0

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.serial = build_policy("continuous-serial")
            self.serial.reset(worker, profile)

        def decide(self, view: View) -> Decision:
            self.asked += 1
            if view.denoise_free and self.asked % 9_000:
                return Decision(wake_at_ns=view.now_ns + 1)
            return self.serial.decide(view)

    result = play([Request(0, 0, steps=2)], Slow(), PROFILE)
    assert [record.status for record in result.requests] == ["done"]
