"""Which worker serves a request: routers, their protocol and their registry.

A router maps a request and the workers as they are to the index of one worker. Like a policy it knows no clock, no
random numbers and no engine; it may remember what it did. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Set
from hashlib import blake2b
from typing import Any, Protocol

from policies.shared_queue import SharedQueue
from synerdiff.core import InputError, Request
from synerdiff.profile.tables import Profile


class WorkerState:
    """What a router sees of a worker. Engines write it, routers only read it."""

    __slots__ = ("cost_left", "index", "loras", "profile", "samples", "steps_left")

    def __init__(self, index: int, profile: Profile | None = None) -> None:
        self.index = index
        self.profile = profile
        """Times at the worker's own speed."""
        self.samples = 0
        """Samples given to it that have not ended."""
        self.steps_left = 0
        """Denoising steps that these have yet to take."""
        self.cost_left = 0
        """Declared cost of the samples that have not ended."""
        self.loras: Set[str] = frozenset()
        """Files on its GPU, on their way there, or in its host cache."""


class Router(Protocol):
    """``route`` is asked once per request, at its arrival, before anything else of that instant."""

    def reset(self, workers: int) -> None: ...

    def route(self, request: Request, workers: list[WorkerState]) -> int:
        """Index of the worker that gets the request."""


class RoundRobin:
    """One worker after the other."""

    NAME = "round-robin"

    def reset(self, workers: int) -> None:
        self.last = -1

    def route(self, request: Request, workers: list[WorkerState]) -> int:
        self.last = (self.last + 1) % len(workers)
        return self.last


class ShortestQueue:
    """The worker with the fewest samples that have not ended."""

    NAME = "shortest-queue"

    def reset(self, workers: int) -> None:
        pass

    def route(self, request: Request, workers: list[WorkerState]) -> int:
        return min(workers, key=_queue).index


class LeastWork:
    """The worker whose samples have the least denoising left: steps, each as long as its largest step alone."""

    NAME = "least-work"

    def reset(self, workers: int) -> None:
        pass

    def route(self, request: Request, workers: list[WorkerState]) -> int:
        return min(workers, key=lambda worker: (worker.steps_left * _step_ns(worker), worker.index)).index


def declared_cost(request: Request) -> int:
    """Of one image: steps x pixels, what a request itself says of its work (llm-d-router#2053)."""
    return request.steps * (1 if request.size is None else request.size[0] * request.size[1])


class DeclaredCost:
    """The worker with the least declared cost, steps x pixels x images, of samples that have not ended, by the time of
    its own full step: a card twice as fast may hold twice as much."""

    NAME = "declared-cost"

    def reset(self, workers: int) -> None:
        pass

    def route(self, request: Request, workers: list[WorkerState]) -> int:
        own = declared_cost(request) * request.images
        return min(workers, key=lambda worker: ((worker.cost_left + own) * _step_ns(worker), worker.index)).index


class AdapterAffinity:
    """The worker that has most of the request's LoRA files, among those whose queue is not much longer.

    A worker with more than ``slack`` samples above the shortest queue is left out, so that a popular LoRA spreads.
    Among equals the home of the first LoRA: the worker whose number, hashed with the file's name, comes out highest
    (rendezvous hashing), so that files divide up among caches and not all go to the first idle worker. Without LoRAs
    the shortest queue.
    """

    NAME = "adapter-affinity"

    def __init__(self, slack: int = 2) -> None:
        if isinstance(slack, bool) or not isinstance(slack, int) or slack < 0:
            raise InputError(f"router '{self.NAME}': slack is {slack!r}; a whole number of at least 0 is allowed.")
        self.slack = slack

    def reset(self, workers: int) -> None:
        pass

    def route(self, request: Request, workers: list[WorkerState]) -> int:
        if not request.loras:
            return min(workers, key=_queue).index
        wanted = {use.file for use in request.loras}
        first = request.loras[0].file
        most = min(worker.samples for worker in workers) + self.slack
        near = [worker for worker in workers if worker.samples <= most]
        return max(near, key=lambda worker: (len(wanted & worker.loras), _score(first, worker.index))).index


def _score(file: str, worker: int) -> bytes:
    return blake2b(f"{worker}/{file}".encode(), digest_size=8).digest()


def _step_ns(worker: WorkerState) -> int:
    return 1 if worker.profile is None else worker.profile.step_ns(worker.profile.max_rows)


def _queue(worker: WorkerState) -> tuple[int, int]:
    return worker.samples, worker.index


ROUTERS: dict[str, type[Router]] = {
    "round-robin": RoundRobin,
    "shortest-queue": ShortestQueue,
    "least-work": LeastWork,
    "declared-cost": DeclaredCost,
    "adapter-affinity": AdapterAffinity,
}


ROUTER_PARAMETERS = {AdapterAffinity.NAME: ("slack",), SharedQueue.NAME: ("batch", "max_wait_s", "slots")}


def build_router(name: str, **parameters: Any) -> Router | SharedQueue:
    """A fresh router; InputError lists the known ones, and the parameters that it has."""
    routers: dict[str, type[Router] | type[SharedQueue]] = {**ROUTERS, SharedQueue.NAME: SharedQueue}
    if name not in routers:
        raise InputError(f"there is no router '{name}'; known are {', '.join(routers)}.")
    known = ROUTER_PARAMETERS.get(name, ())
    for parameter in parameters:
        if parameter not in known:
            raise InputError(f"router '{name}' has no {parameter}; it has {', '.join(known) or 'no parameters'}.")
    return routers[name](**parameters)
