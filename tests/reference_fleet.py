"""A shared queue before workers that serve whole groups under `static`, once more as a plain loop over instants.

It shares with the engine the profile's tables and nothing else: no worker, no rounds, no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from synerdiff.core import PPM, Request
from synerdiff.profile.tables import Profile


def serve_group(group: list[Request], start: int, profile: Profile, speed_ppm: int, host: int, batch: int) -> Any:
    """({request: finished}, end): batches of ``batch`` images, each to its end with pads, then decode after decode."""
    step_dispatch, chunk_dispatch, copy = (
        profile.overhead_ns(name) for name in ("step_dispatch", "chunk_dispatch", "result_copy")
    )
    images = [request for request in group for _ in range(request.images)]
    finished: dict[int, int] = {}
    now = start + profile.overhead_ns("text_encode")
    while images:
        part, images = images[:batch], images[batch:]
        rows = sum(2 if request.guidance_scale > 1 else 1 for request in part)
        solo = -(-profile.steps[rows].median * PPM // speed_ppm)
        now += max(request.steps for request in part) * (solo + step_dispatch)
        for request in sorted(part, key=lambda request: request.steps):  # stable: ties in step order
            now += -(-profile.chunks["whole"][0].median * PPM // speed_ppm) + chunk_dispatch + host
            finished[request.request_id] = max(finished.get(request.request_id, 0), now + copy)
    return finished, now


def reference_shared_queue(
    requests: Sequence[Request], profile: Profile, workers: Sequence[tuple[int, int]], batch: int, wait: int
) -> tuple[dict[int, int], dict[int, int]]:
    """({request: finished}, {request: worker}); ``workers``: (speed ppm, host ns) of each."""
    todo = list(requests)
    growing: dict[Any, list[Request]] = {}
    complete: list[tuple[int, int, list[Request]]] = []
    free_at = [0] * len(workers)
    finished: dict[int, int] = {}
    worker_of: dict[int, int] = {}
    now = 0

    def size(group: list[Request]) -> int:
        return sum(request.images for request in group)

    def end(key: Any) -> None:
        group = growing.pop(key)
        complete.append((now, group[0].request_id, group))

    while todo or growing or complete:
        while todo and todo[0].arrival_ns == now:
            request = todo.pop(0)
            key = request.batch_key
            if key in growing and size(growing[key]) + request.images > batch:
                end(key)
            growing.setdefault(key, []).append(request)
            if size(growing[key]) >= batch:
                end(key)
        for key in list(growing):
            if not todo or growing[key][0].arrival_ns + wait <= now:
                end(key)
        complete.sort(key=lambda entry: entry[:2])
        while complete and any(at <= now for at in free_at):
            index = min((at, index) for index, at in enumerate(free_at) if at <= now)[1]
            group = complete.pop(0)[2]
            ends, free_at[index] = serve_group(group, now, profile, *workers[index], batch)
            finished |= ends
            worker_of |= {request.request_id: index for request in group}
        coming = [request.arrival_ns for request in todo[:1]]
        coming += [group[0].arrival_ns + wait for group in growing.values()]
        coming += [at for at in free_at if at > now] if complete else []
        if coming:
            now = min(coming)
    return finished, worker_of
