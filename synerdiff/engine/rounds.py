"""The order of one instant, the same in both engines (contract, rules 4, 5, 8 and 23).

An engine reports what has ended and starts what is to start. It looks when something may have happened, calls `take`,
and `decide` when that says so. Times are in ns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from synerdiff.core import Decision, LaneView
from synerdiff.engine.policy import PolicyCalls
from synerdiff.engine.worker import Step, Worker

NEVER = 1 << 62
"""Later than anything: when what has not been timed ends."""


class Lanes(Protocol):
    """What an engine does with one worker's lanes. An end that it reports is accounted for by then."""

    def end_step(self, now_ns: int) -> int:
        """When the running step ended; -1: none has."""

    def end_chunks(self, now_ns: int) -> int:
        """When the latest of the chunks that have ended did, each launch's next one started; -1: none has."""

    def enter(self, now_ns: int) -> int:
        """Let what has arrived join waiting; when the latest did; -1: nothing has."""

    def early_ns(self) -> int:
        """When the decision that follows the running step closes; later than anything while that is unknown."""

    def start_step(self, step: Step, cause_ns: int) -> None:
        """A step starts, made possible at ``cause_ns``."""

    def start_chunk(self, lane: LaneView, cause_ns: int) -> None:
        """The next chunk of the lane's launch starts, made possible at ``cause_ns``."""


class Rounds:
    """One worker's rounds. ``lead_ns``: how long before a step's end the decision that follows it closes."""

    __slots__ = ("_step_ended", "decisions", "lanes", "lead_ns", "on_decision", "policy", "worker")

    def __init__(self, worker: Worker, policy: PolicyCalls, lanes: Lanes, lead_ns: int) -> None:
        self.worker, self.policy, self.lanes, self.lead_ns = worker, policy, lanes, lead_ns
        self.decisions = 0
        """How often the policy was asked."""
        self.on_decision: Callable[[Decision, int, int], None] | None = None
        """Told of each decision, when it was asked for and why, before what it wants is started."""
        self._step_ended = False

    def require_unwritten(self, now_ns: int) -> None:
        """ContractError when the policy has written to what it may only read; called before records are made."""
        self.worker.require_unwritten(now_ns)
        self.policy.require_unwritten(now_ns)

    def take(self, now_ns: int) -> int:
        """Everything that has happened by now, in the contract's order.

        Returns when the latest of what the policy is to be asked about happened; -1: it is not to be asked.
        """
        return self.take_arrivals(now_ns, self.take_ends(now_ns))

    def take_ends(self, now_ns: int) -> int:
        """The first part of `take`: the step's end, chunk ends, and what was committed to start then."""
        worker, lanes = self.worker, self.lanes
        cause_ns = -1
        end_ns = lanes.end_step(now_ns)
        if end_ns >= 0 and worker.next_step is None and worker.exclusive_lane is None:
            cause_ns = end_ns
        chunk_ns = lanes.end_chunks(now_ns)
        if chunk_ns > cause_ns:
            cause_ns = chunk_ns
        if not self.lead_ns:
            return cause_ns
        self._step_ended = end_ns >= 0
        if self._step_ended:
            starting = worker.start_committed()
            if worker.step is not None:
                lanes.start_step(worker.step, end_ns)
            for lane in starting:
                lanes.start_chunk(lane, end_ns)
        return cause_ns

    def take_arrivals(self, now_ns: int, cause_ns: int) -> int:
        """The second part: arrivals, the wake, and the decision that closes early."""
        worker = self.worker
        entered_ns = self.lanes.enter(now_ns)
        if entered_ns > cause_ns and not worker.denoise_held:
            cause_ns = entered_ns
        wake_ns = worker.wake_ns
        if wake_ns is not None and wake_ns <= now_ns:
            worker.wake_ns = None
            cause_ns = max(cause_ns, wake_ns)
        # A step that has only just started is shown as done in a round of its own.
        if self.lead_ns and not self._step_ended and (early_ns := self.early_ns()) <= now_ns:
            worker.show_step_done()
            cause_ns = max(cause_ns, early_ns, 0)
        return cause_ns

    def early_ns(self) -> int:
        """When the decision that follows the running step closes; NEVER without a lead, a step, or once it has."""
        step = self.worker.step
        return self.lanes.early_ns() if self.lead_ns and step is not None and not step.shown_done else NEVER

    def decide(self, now_ns: int, cause_ns: int, closed: bool) -> None:
        """Ask the policy once and start what it wants now. Raises ContractError."""
        worker, lanes = self.worker, self.lanes
        self.decisions += 1
        decision = self.policy.decide(worker.look(now_ns, closed))
        try:
            step, starting = worker.apply(decision, now_ns)
        except (TypeError, ValueError, AttributeError) as error:
            raise self.policy.unreadable(now_ns, error) from error
        if self.on_decision is not None:
            self.on_decision(decision, now_ns, cause_ns)
        if step is not None:
            lanes.start_step(step, cause_ns)
        for lane in starting:
            lanes.start_chunk(lane, cause_ns)
