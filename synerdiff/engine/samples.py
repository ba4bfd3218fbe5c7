"""From requests to samples, and from what became of them to records: the same in both engines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from synerdiff.core import Phase, Request, RequestRecord, Sample, SkipBudget, WorkRecord
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
