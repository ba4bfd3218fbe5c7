"""The sender: arrivals against absolute deadlines, each prepared (prompt, noise) as it comes.

In a closed loop a request also waits for a place, which the engine frees.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

from real_runner.account import one_line
from synerdiff.core import NS_PER_S, Request
from synerdiff.device.lanes import Lane, Work
from synerdiff.diffusion.conditioning import PromptEncoder
from synerdiff.diffusion.denoisers.controlnet import ControlUse
from synerdiff.diffusion.model import DiffusionModel, SampleState

LOOKAHEAD = 512
"""Requests that the sender knows ahead, so that it never depends on the engine being quick."""

STOP_POLL_S = 0.05
"""How often a sender that waits for a place looks whether the run was stopped."""
ModelOf = Callable[[Request], DiffusionModel]
"""The model at the request's resolution."""
ControlsOf = Callable[[Request], tuple[ControlUse, ...]]
"""The ControlNets that steer a request, with their images; raises for an image that cannot be had."""


def no_controls(request: Request) -> tuple[ControlUse, ...]:
    """The ControlNets of a request in a run without any."""
    return ()


class Entry(NamedTuple):
    """One request that has been sent and prepared, or has failed in it."""

    sent_ns: int
    """When it was to be sent: its arrival, in a closed loop not before a place was free; from the trace's 0."""
    lag_ns: int
    """How long after that it was sent."""
    prepare_ns: int
    entered_ns: int
    """On the monotonic clock; never before ``sent_ns``."""
    states: list[SampleState]
    failure: str


class _Sent(NamedTuple):
    sent_ns: int
    lag_ns: int
    began_ns: int
    states: list[SampleState]
    failure: str = ""


class Intake:
    """Sends requests in order on a lane of its own; ``zero_ns`` is the trace's 0.

    ``most``: so many places are free at first, and a request waits for one; None: none does (an open loop).
    """

    def __init__(
        self,
        lane: Lane,
        model_of: ModelOf,
        requests: Sequence[Request],
        zero_ns: int,
        stop: threading.Event,
        controls_of: ControlsOf,
        most: int | None = None,
    ) -> None:
        self._free_ns: SimpleQueue[int] | None = None if most is None else SimpleQueue()
        """When places became free, from the trace's 0."""
        for _ in range(min(most or 0, len(requests))):
            self.free(0)
        self._lane, self._model_of, self._requests = lane, model_of, requests
        self._controls_of = controls_of
        self._zero_ns, self._stop = zero_ns, stop
        self._sent: deque[Work[_Sent]] = deque()
        self._submitted = 0
        self._refill()

    @property
    def head(self) -> Work[_Sent] | None:
        """The next request's work, None when no request is left."""
        return self._sent[0] if self._sent else None

    def free(self, at_ns: int) -> None:
        """A place became free at that instant, counted from the trace's 0."""
        if self._free_ns is not None:
            self._free_ns.put(at_ns)

    def ready(self) -> list[Entry]:
        """Requests that have entered since the last call, in trace order."""
        entries = []
        while self._sent and self._sent[0].done():
            entries.append(self._entry(self._sent.popleft()))
        self._refill()
        return entries

    def _refill(self) -> None:
        while self._submitted < len(self._requests) and len(self._sent) < LOOKAHEAD:
            request = self._requests[self._submitted]
            self._sent.append(self._lane.submit(partial(self._send, request)))
            self._submitted += 1

    def _send(self, request: Request) -> _Sent:
        sent_ns = max(request.arrival_ns, self._place_ns())
        due_ns = self._zero_ns + sent_ns
        while not self._stop.is_set() and (left_ns := due_ns - time.monotonic_ns()) > 0:
            self._stop.wait(left_ns / NS_PER_S)
        began_ns = time.monotonic_ns()
        if self._stop.is_set():
            return _Sent(sent_ns, 0, began_ns, [])
        try:
            return _Sent(sent_ns, began_ns - due_ns, began_ns, self._prepare(request))
        except Exception as error:  # it concerns this request alone
            return _Sent(sent_ns, 0, began_ns, [], one_line(error))

    def _place_ns(self) -> int:
        """Wait for a place; when it became free."""
        while self._free_ns is not None and not self._stop.is_set():
            try:
                return self._free_ns.get(timeout=STOP_POLL_S)
            except Empty:
                continue
        return 0

    def _prepare(self, request: Request) -> list[SampleState]:
        seed, model = seed_of(request), self._model_of(request)
        prompt, negative = prompts_of(request, model.prompts)
        condition = model.encode_prompt(prompt, negative)
        controls = self._controls_of(request)
        states = [
            model.start(seed, request.steps, request.guidance_scale, prompt, image=image, condition=condition)
            for image in range(request.images)
        ]
        for state in states:
            state.controls = controls
        return states

    def _entry(self, work: Work[_Sent]) -> Entry:
        sent = work.result()
        entered_ns = max(work.end_ns, self._zero_ns + sent.sent_ns)
        return Entry(sent.sent_ns, sent.lag_ns, work.end_ns - sent.began_ns, entered_ns, sent.states, sent.failure)


def prompts_of(request: Request, encoder: PromptEncoder) -> tuple[str, str]:
    """(prompt, negative prompt) that the request is drawn with.

    A model of classes (digits) knows no texts: then the seed's own prompt is taken, and no negative one.
    """
    prompt = request.prompt if request.prompt and encoder.knows(request.prompt) else ""
    negative = request.negative_prompt if request.negative_prompt and encoder.knows(request.negative_prompt) else ""
    return prompt or encoder.default_prompt(seed_of(request)), negative


def seed_of(request: Request) -> int:
    """The request's seed, else its number."""
    return request.request_id if request.seed is None else request.seed
