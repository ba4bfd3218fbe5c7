"""One queue before all workers, from which free workers take: the router that pulls (contract, rule 15).

Like a router it knows no engine: it is told what arrives and what instant it is, in ns.
"""

from __future__ import annotations

from heapq import heappop, heappush

from synerdiff.core import NS_PER_S, BatchKey, InputError, Request

NEVER = 1 << 62
"""Later than anything."""


class Group:
    """Requests of one batch key that go to a worker together, in order of arrival."""

    __slots__ = ("images", "number", "requests")

    def __init__(self, number: int) -> None:
        self.number = number
        """Of its oldest request, in order of arrival."""
        self.requests: list[Request] = []
        self.images = 0


class SharedQueue:
    """Groups of up to ``batch`` images, or with ``slots`` single requests for workers that hold fewer samples.

    Each batch key builds one group of whole requests. A request that does not fit completes the group and starts the
    next; one larger than ``batch`` is a group alone. A group is complete when it is full, when its oldest request has
    waited ``max_wait_s``, or when no request is left to arrive. Complete groups go in order of completion, ties by
    their oldest request.
    """

    NAME = "shared-queue"

    def __init__(self, batch: int | None = None, max_wait_s: float | None = None, slots: int | None = None) -> None:
        if (slots is None) == (batch is None) or (batch is None) != (max_wait_s is None):
            raise InputError(
                f"router '{self.NAME}' needs batch and max_wait_s, or slots, in the cluster file; for example "
                f"router: {{kind: {self.NAME}, batch: 8, max_wait_s: 5}}."
            )
        self.slots = slots
        """Samples below which a worker takes the oldest request; None: idle workers take groups."""
        self._batch = 1 if batch is None else batch
        self._max_wait_ns = 0 if max_wait_s is None else round(max_wait_s * NS_PER_S)
        self._arrived = 0
        self._growing: dict[BatchKey, Group] = {}
        self._complete: list[tuple[int, int, Group]] = []
        """A heap: (completed at, number, group)."""

    def arrive(self, request: Request, now_ns: int) -> None:
        """A request joins the queue."""
        key = request.batch_key
        group = self._growing.get(key)
        if group is not None and group.images + request.images > self._batch:
            self._end(key, now_ns)
            group = None
        if group is None:
            group = self._growing[key] = Group(self._arrived)
        self._arrived += 1
        group.requests.append(request)
        group.images += request.images
        if self.slots is not None or group.images >= self._batch:
            self._end(key, now_ns)

    def close(self, now_ns: int, last: bool) -> None:
        """After the arrivals of an instant: complete what has waited long enough; when ``last``, everything."""
        for key, group in list(self._growing.items()):
            if last or group.requests[0].arrival_ns + self._max_wait_ns <= now_ns:
                self._end(key, now_ns)

    def _end(self, key: BatchKey, now_ns: int) -> None:
        group = self._growing.pop(key)
        heappush(self._complete, (now_ns, group.number, group))

    @property
    def due_ns(self) -> int:
        """When the next group will have waited long enough; NEVER when none grows."""
        return min([g.requests[0].arrival_ns + self._max_wait_ns for g in self._growing.values()], default=NEVER)

    @property
    def ready(self) -> bool:
        """A complete group waits for a worker."""
        return bool(self._complete)

    @property
    def empty(self) -> bool:
        """Whether no request waits in it."""
        return not self._complete and not self._growing

    def take(self) -> list[Request]:
        """The requests of the first complete group, which leaves the queue."""
        return heappop(self._complete)[2].requests
