"""Routers and caches by hand."""

from __future__ import annotations

from typing import Any

import pytest

from policies.routers import AdapterAffinity, LeastWork, RoundRobin, ShortestQueue, WorkerState, build_router
from synerdiff.core import InputError, Request, loras_from
from synerdiff.engine.adapters import Cache
from tests.swift_builders import cluster, serve

PLAIN = Request(0, 0, 4)


def workers(*described: tuple[int, int, str]) -> list[WorkerState]:
    """(samples, steps left, LoRA files as letters) of each worker."""
    states = []
    for index, (samples, steps_left, loras) in enumerate(described):
        state = WorkerState(index)
        state.samples, state.steps_left, state.loras = samples, steps_left, frozenset(loras)
        states.append(state)
    return states


def test_round_robin_takes_turns_and_starts_anew_after_a_reset() -> None:
    router = RoundRobin()
    router.reset(3)
    states = workers((9, 9, ""), (0, 0, ""), (0, 0, ""))
    assert [router.route(PLAIN, states) for _ in range(5)] == [0, 1, 2, 0, 1]
    router.reset(3)
    assert router.route(PLAIN, states) == 0


def test_the_shortest_queue_counts_samples_and_the_least_work_counts_steps() -> None:
    states = workers((3, 5, ""), (2, 60, ""), (2, 7, ""))
    assert ShortestQueue().route(PLAIN, states) == 1
    assert LeastWork().route(PLAIN, states) == 0


def test_affinity_prefers_the_worker_with_most_of_the_files_unless_its_queue_is_much_longer() -> None:
    router = AdapterAffinity(slack=2)
    wish = Request(0, 0, 4, loras=loras_from(("x@0.8", "y")))
    assert router.route(wish, workers((0, 0, ""), (2, 0, "x"), (2, 0, "xy"))) == 2
    assert router.route(wish, workers((0, 0, ""), (1, 0, "x"), (3, 0, "xy"))) == 1
    assert router.route(wish, workers((0, 0, ""), (3, 0, "x"), (3, 0, "xy"))) == 0
    # Nobody has it: its home among those with short queues, here worker 1, and worker 0 once 1 is too busy (z).
    assert router.route(Request(0, 0, 4, loras=loras_from(("z",))), workers((0, 0, ""), (1, 0, ""))) == 1
    assert router.route(Request(0, 0, 4, loras=loras_from(("z",))), workers((0, 0, ""), (3, 0, ""))) == 0
    assert router.route(PLAIN, workers((2, 0, "xy"), (1, 0, ""), (1, 0, "x"))) == 1


def test_unknown_routers_and_slacks_are_refused() -> None:
    with pytest.raises(InputError, match="there is no router 'fastest'; known are round-robin, shortest-queue"):
        build_router("fastest")
    with pytest.raises(InputError, match="slack is -1; a whole number of at least 0 is allowed"):
        AdapterAffinity(slack=-1)


def test_routers_see_queues_and_work_as_they_are_at_the_arrival() -> None:
    seen = []

    class Watch:
        def reset(self, workers: Any) -> None:
            pass

        def route(self, request: Any, workers: Any) -> int:
            seen.append([(w.samples, w.steps_left, sorted(w.loras)) for w in workers])
            return 0

    requests = [
        Request(0, 0, 3, images=2, loras=loras_from(("x",))),
        Request(1, 450, 2, loras=loras_from(("x",))),
        Request(2, 10**6, 1),
    ]
    serve(requests, cluster(2), "continuous-serial", router=Watch())
    # At 450 the first image (250 load, 20 merge, steps of 100) has taken one of its three steps.
    assert seen[:2] == [[(0, 0, []), (0, 0, [])], [(2, 5, ["x"]), (0, 0, [])]]
    # Without a wish for LoRAs they are not looked up; the queue is empty again.
    assert [(samples, left) for samples, left, _ in seen[2]] == [(0, 0), (0, 0)]


def test_affinity_divides_files_among_caches() -> None:
    # x is at home on worker 0 and z on worker 1; the shortest queue sends every lone request to worker 0.
    requests = [Request(i, 2000 * i, 1, loras=loras_from("xz"[i % 2])) for i in range(8)]
    described = cluster(2, storage={"device_cache_mib": 400})
    spread = serve(requests, described, "continuous-serial", router=ShortestQueue())
    assert (spread.worker_of, spread.lora_reads) == ([0] * 8, 8)
    kept = serve(requests, described, "continuous-serial", router=AdapterAffinity())
    assert (kept.worker_of, kept.lora_reads) == ([0, 1] * 4, 2)


def play(cache: Cache, names: str) -> str:
    """What each use was: h for a hit, m for a miss, after which the name is put in."""
    found = ""
    for name in names:
        hit = cache.use(name)
        if not hit:
            cache.put(name)
        found += "h" if hit else "m"
    return found


def test_lru_drops_what_was_used_longest_ago() -> None:
    # a b, a again; c takes b's place; a is there, b takes c's place.
    cache = Cache(2, "lru")
    assert play(cache, "abacab") == "mmhmhm"
    assert cache.names == {"a", "b"}


def test_lfu_drops_what_was_used_least_often_and_forgets_its_count() -> None:
    # a twice, b once: c takes b's place, b takes c's, though c is the more recent of equals only by use.
    cache = Cache(2, "lfu")
    assert play(cache, "aabcb") == "mhmmm"
    assert cache.names == {"a", "b"}
    # b comes back with a count of one: used twice more it outlives a (2) when c comes.
    assert play(cache, "bbc") == "hhm"
    assert cache.names == {"b", "c"}


def test_ties_in_frequency_go_to_the_one_used_longest_ago() -> None:
    cache = Cache(2, "lfu")
    assert play(cache, "abc") == "mmm"
    assert cache.names == {"b", "c"}


def test_sizes_count_and_what_is_too_large_is_not_kept() -> None:
    cache = Cache(10, "lru")
    for name, size in (("a", 4), ("b", 4), ("c", 8), ("d", 11)):
        cache.put(name, size)
    assert cache.names == {"c"}
    assert cache.free == 2
