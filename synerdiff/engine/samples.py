"""From requests to samples, and from what became of them to records: the same in both engines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from synerdiff.core import Phase, Request, RequestRecord, Sample, SkipBudget, WorkRecord
from synerdiff.engine.rounds import NEVER
from synerdiff.profile.tables import Profile


def make_samples(requests: Sequence[Request], profile: Profile, budget: SkipBudget) -> list[Sample]:
    """All samples by id, requests in trace order, then images."""
    text_encode_ns = profile.overhead_ns("text_encode")
    samples: list[Sample] = []
    for request in requests:
        entered_ns = request.arrival_ns + text_encode_ns
        for image in range(request.images):
            samples.append(Sample(len(samples), request, image, entered_ns, budget))
    return samples


class ClosedLoop:
    """At most so many requests in the system (contract, rule 17); ``most`` None: as the trace says (an open loop).

    A request is sent at max(its arrival in the trace, the instant at which a place is free), in trace order. Its place
    is free when its last sample has ended, at ``finished`` for one that is done. Times are ns.
    """

    def __init__(
        self, requests: Sequence[Request], samples: Sequence[Sample], most: int | None, text_encode_ns: int
    ) -> None:
        self.requests = list(requests)
        """In trace order; those that have been sent with the sending as their arrival."""
        self.sent = 0
        self.now_ns = 0
        """The instant of the round that is under way."""
        self._closed = most is not None
        self._free_ns = [0] * (len(requests) if most is None else min(most, len(requests)))
        """When each place that is not taken is free: a heap."""
        self._text_encode_ns = text_encode_ns
        self._samples: list[list[Sample]] = [[] for _ in requests]
        self._request_of: list[int] = []
        for index, request in enumerate(requests):
            first = len(self._request_of)
            self._samples[index] = list(samples[first : first + request.images])
            self._request_of += [index] * request.images
        self._left = [request.images for request in requests]
        self._last_ns = [0] * len(requests)
        self._entered_ns = 0

    @property
    def due_ns(self) -> int:
        """When the next request is sent, NEVER where all are or a place must become free first."""
        if not self.unsent or not self._free_ns:
            return NEVER
        return max(self.requests[self.sent].arrival_ns, self._free_ns[0])

    @property
    def unsent(self) -> bool:
        """Whether requests are left to send."""
        return self.sent < len(self.requests)

    def send(self, now_ns: int) -> list[tuple[Request, list[Sample]]]:
        """What is sent by now and has not been before, in trace order, with its samples."""
        self.now_ns = now_ns
        due: list[tuple[Request, list[Sample]]] = []
        while (at_ns := self.due_ns) <= now_ns:
            heappop(self._free_ns)
            due.append(self.send_next(at_ns))
        return due

    def send_next(self, at_ns: int) -> tuple[Request, list[Sample]]:
        """The next request, sent at that instant, from which its latency and its deadline count."""
        index, samples = self.sent, self._samples[self.sent]
        request = self.requests[index]
        self.sent += 1
        self._entered_ns = at_ns + self._text_encode_ns
        if self._closed:
            request = self.requests[index] = replace(request, arrival_ns=at_ns, intended_ns=request.arrival_ns)
            for sample in samples:
                sample.send(request, self._entered_ns)
        return request, samples

    def ended(self, sample: Sample) -> None:
        """A sample has ended: done at its ``finished``, otherwise now."""
        free_ns = self.freed_ns(sample, sample.finished_ns if sample.phase is Phase.DONE else self.now_ns)
        if free_ns >= 0:
            heappush(self._free_ns, free_ns)

    def freed_ns(self, sample: Sample, at_ns: int) -> int:
        """A sample has ended at that instant; when the place of its request is free, -1 while others have it."""
        index = self._request_of[sample.id]
        self._left[index] -= 1
        self._last_ns[index] = max(self._last_ns[index], at_ns)
        return -1 if self._left[index] else self._last_ns[index]

    def stuck(self, now_ns: int) -> bool:
        """Whether nothing more is sent, nor has yet to enter, unless something that runs ends."""
        return self.unsent and not self._free_ns and self._entered_ns <= now_ns


def request_records(requests: Sequence[Request], samples: Sequence[Sample]) -> list[RequestRecord]:
    """One record per request; its stages are those of its last-finishing sample, ties to the higher image."""
    records: list[RequestRecord] = []
    position = 0
    for request in requests:
        images = samples[position : position + request.images]
        position += request.images
        phases = {sample.phase for sample in images}
        skipped = sum(sample.skips_spent for sample in images)
        modes = tuple([sample.modes for sample in images])
        if phases == {Phase.DONE}:
            last = max(images, key=lambda sample: (sample.finished_ns, sample.image))
            stages = (last.admitted_ns, last.denoised_ns, last.decode_started_ns, last.finished_ns)
            records.append(RequestRecord(request, *stages, "done", skipped, modes))
            continue
        status = next((str(p) for p in (Phase.REJECTED, Phase.FAILED) if p in phases), "unfinished")
        records.append(RequestRecord(request, status=status, skipped_steps=skipped, modes=modes))
    return records


def sorted_work(records: Iterable[WorkRecord]) -> list[WorkRecord]:
    """By start, denoise first, lane, end."""
    return sorted(
        records,
        key=lambda record: (record.start_ns, record.kind != "step", len(record.lane), record.lane, record.end_ns),
    )
