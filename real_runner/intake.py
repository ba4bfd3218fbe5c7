"""The sender: open-loop arrivals against absolute deadlines, each prepared (prompt, noise) as it comes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from real_runner.account import one_line
from synerdiff.core import NS_PER_S, Request
from synerdiff.device.lanes import Lane, Work
from synerdiff.diffusion.denoisers.controlnet import ControlUse
from synerdiff.diffusion.model import DiffusionModel, SampleState

LOOKAHEAD = 512
"""Requests that the sender knows ahead, so that it never depends on the engine being quick."""

ControlsOf = Callable[[Request], tuple[ControlUse, ...]]
"""The ControlNets that steer a request, with their images; raises for an image that cannot be had."""


def no_controls(request: Request) -> tuple[ControlUse, ...]:
    return ()


class Entry(NamedTuple):
    """One request that has been sent and prepared, or has failed in it."""

    request: Request
    lag_ns: int
    """How long after its intended arrival it was sent."""
    prepare_ns: int
    entered_ns: int
    """On the monotonic clock; never before the intended arrival."""
    states: list[SampleState]
    failure: str


class _Sent(NamedTuple):
    lag_ns: int
    began_ns: int
    states: list[SampleState]


class Intake:
    """Sends requests in order on a lane of its own, whatever the engine does; ``zero_ns`` is the trace's 0."""

    def __init__(
        self,
        lane: Lane,
        model: DiffusionModel,
        requests: Sequence[Request],
        zero_ns: int,
        stop: threading.Event,
        controls_of: ControlsOf,
    ) -> None:
        self._lane, self._model, self._requests = lane, model, requests
        self._controls_of = controls_of
        self._zero_ns, self._stop = zero_ns, stop
        self._sent: deque[Work[_Sent]] = deque()
        self._submitted = 0
        self._refill()

    @property
    def head(self) -> Work[_Sent] | None:
        """The next request's work, None when no request is left."""
        return self._sent[0] if self._sent else None

    def ready(self) -> list[Entry]:
        """Requests that have entered since the last call, in trace order."""
        entries = []
        while self._sent and self._sent[0].done():
            work = self._sent.popleft()
            request = self._requests[self._submitted - len(self._sent) - 1]
            entries.append(self._entry(request, work))
        self._refill()
        return entries

    def _refill(self) -> None:
        while self._submitted < len(self._requests) and len(self._sent) < LOOKAHEAD:
            request = self._requests[self._submitted]
            self._sent.append(self._lane.submit(partial(self._send, request)))
            self._submitted += 1

    def _send(self, request: Request) -> _Sent:
        due_ns = self._zero_ns + request.arrival_ns
        while not self._stop.is_set() and (left_ns := due_ns - time.monotonic_ns()) > 0:
            self._stop.wait(left_ns / NS_PER_S)
        began_ns = time.monotonic_ns()
        if self._stop.is_set():
            return _Sent(0, began_ns, [])
        return _Sent(began_ns - due_ns, began_ns, self._prepare(request))

    def _prepare(self, request: Request) -> list[SampleState]:
        seed = seed_of(request)
        prompt = self._model.prompts.default_prompt(seed)
        condition = self._model.encode_prompt(prompt)
        controls = self._controls_of(request)
        states = [
            self._model.start(seed, request.steps, request.guidance_scale, prompt, image=image, condition=condition)
            for image in range(request.images)
        ]
        for state in states:
            state.controls = controls
        return states

    def _entry(self, request: Request, work: Work[_Sent]) -> Entry:
        entered_ns = max(work.end_ns, self._zero_ns + request.arrival_ns)
        try:
            sent = work.result()
        except Exception as error:  # it concerns this request alone
            return Entry(request, 0, 0, entered_ns, [], one_line(error))
        return Entry(request, sent.lag_ns, work.end_ns - sent.began_ns, entered_ns, sent.states, "")


def seed_of(request: Request) -> int:
    """The request's seed, else its number."""
    return request.request_id if request.seed is None else request.seed
