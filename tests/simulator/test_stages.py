"""Stages apart and workers of several GPUs (contract, rules 20 and 21): by hand, against the one-worker engine, and
against a plain second implementation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from policies.registry import POLICIES, build_policy
from policies.routers import build_router
from simulator import ClusterResult, simulate
from synerdiff.config.cluster import Cluster, cluster_of
from synerdiff.core import PPM, InputError, Request
from synerdiff.profile.sizes import CARRIED, carried
from synerdiff.profile.tables import Corun, Head, Profile, Spread
from tests.builders import exact, make_profile
from tests.swift_builders import serve

FREE = {"latent_bytes": 0, "embedding_bytes": 0}
"""Ways that take no time."""
LINK = {"gb_per_s": 1.0, "latency_us": 0.0}
"""A byte a nanosecond."""
HALF = {"count": 1, "speed": 0.5}
OVERHEADS = {"step_dispatch": 1, "chunk_dispatch": 2, "text_encode": 30, "result_copy": 4, "sample_host": 5}


def apart(workers: int = 1, **stages: Any) -> Cluster:
    """A cluster with stages, and a link that moves a byte a nanosecond."""
    return cluster_of({"workers": {"count": workers}, "stages": stages, "link": LINK})


def work(result: ClusterResult, kind: str) -> list[tuple[int, int, int]]:
    return [(w.gpu, w.start_ns, w.end_ns) for w in result.run.work if w.kind == kind]


def finishes(result: ClusterResult) -> list[int]:
    return [record.finished_ns for record in result.run.requests]


def headed(steps: dict[int, int], decode: int, head: Head) -> Profile:
    return replace(make_profile(steps, {"whole": [decode]}), head=head)


def undisturbed(**more: Any) -> Profile:
    """Steps and decodes that do not slow each other."""
    own = Spread(PPM, PPM, PPM, 1)
    profile = make_profile({1: 60, 2: 100, 4: 150}, {"whole": [70]}, **more)
    return replace(profile, corun={("whole", 0): {rows: Corun(own, own, held_out=False) for rows in (1, 2, 4)}})


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_queues_and_transfers_by_hand() -> None:
    profile = make_profile({2: 100}, {"whole": [70]}, overheads=OVERHEADS)
    requests = [Request(0, 0, 1), Request(1, 0, 1), Request(2, 10, 1)]
    found = serve(
        requests,
        apart(2, encode=1, decode=1, latent_bytes=9, embedding_bytes=3),
        "continuous-serial",
        profile=profile,
    )
    # One encoder, 30 each; GPUs 0 and 1 denoise, 2 encodes, 3 decodes.
    assert work(found, "encode") == [(2, 0, 30), (2, 30, 60), (2, 60, 90)]
    # Two embeddings of 3 bytes, then a step of 100 + 1: the second goes to the other worker, the third to the idle one
    # again, round robin.
    assert work(found, "step") == [(0, 36, 137), (1, 66, 167), (0, 137, 238)]
    # 9 bytes; the decoder takes 70 + 2 and is held for 5.
    assert work(found, "chunk") == [(3, 146, 218), (3, 223, 295), (3, 300, 372)]
    assert finishes(found) == [218 + 5 + 4, 295 + 5 + 4, 372 + 5 + 4]
    assert found.gpus == 4
    assert found.run.end_ns == 372


def test_a_decoder_of_its_own_speed_and_an_idle_one_first() -> None:
    profile = make_profile({2: 100, 4: 100}, {"whole": [70]})
    found = serve(
        [Request(0, 0, 1, images=2)],
        apart(1, decode={"count": 2, "speed": 0.5}, **FREE),
        POLICIES["continuous-serial"],
        profile=profile,
    )
    assert work(found, "chunk") == [(1, 100, 240), (2, 100, 240)]


def test_latents_grow_with_pixels_and_decoders_serve_in_order_of_hand_over() -> None:
    large = headed({2: 100}, 50, Head(resolutions=((128, 64),)))
    profile = replace(
        headed({2: 100}, 50, Head(resolutions=((64, 64), (128, 64)))),
        others={(128, 64): large},
    )
    requests = [Request(0, 0, 1, height=128, width=64), Request(1, 1, 1, height=64, width=64)]
    found = serve(
        requests, apart(2, decode=1, latent_bytes=40, embedding_bytes=0), "continuous-serial", profile=profile
    )
    # 80 bytes take until 180; the 40 of the other are there at 141 and wait for their turn.
    assert work(found, "chunk") == [(2, 180, 230), (2, 230, 280)]


def test_a_closed_loop_sends_when_a_decoder_has_finished() -> None:
    profile = make_profile({2: 100}, {"whole": [70]})
    cluster = apart(1, decode=1, **FREE)
    found = serve(
        [Request(0, 0, 1), Request(1, 0, 1)], cluster, "continuous-serial", profile=profile, max_concurrency=1
    )
    assert [record.request.arrival_ns for record in found.run.requests] == [0, 170]
    assert finishes(found) == [170, 340]


# --- against the one-worker engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_everything_on_one_gpu_without_contention_is_the_one_worker_engine(seed: int) -> None:
    profile = undisturbed(overheads={**OVERHEADS, "sample_host": 0})
    source = random.Random(seed)
    requests, now = [], 0
    for number in range(40):
        now += source.choice([0, 20, 150, 400])
        requests.append(Request(number, now, source.randint(1, 4), source.randint(1, 2), source.choice([1.0, 7.5])))
    alone = simulate(requests, POLICIES["continuous-parallel"](batch=2), profile)
    pair: Any = partial(build_policy, "continuous-parallel", {"batch": 2})
    split = serve(requests, apart(1, encode=40, decode=1, **FREE), pair, profile=profile).run
    assert split.requests == alone.requests
    own = [record for record in split.work if record.kind != "encode"]
    assert [record._replace(gpu=0) for record in own] == alone.work
    assert split.end_ns == alone.end_ns


# --- against a second implementation ----------------------------------------------------------------------------------


def in_stages(requests: list[Request], profile: Profile, counts: Sequence[int], latents: int, prompt: int) -> list[int]:
    """When each request is finished: one sample at a time on each worker, round robin, stage after stage; ``counts`` of
    workers, encoders and decoders."""
    workers, encoders, decoders = counts
    encode, host, copy = (profile.overhead_ns(name) for name in ("text_encode", "sample_host", "result_copy"))
    free = [0] * encoders
    encoded = []
    for request in requests:
        place = min(range(encoders), key=lambda i: (max(free[i], request.arrival_ns), i))
        free[place] = max(free[place], request.arrival_ns) + encode
        encoded.append((free[place], request.request_id))
    handed = []
    ready = [0] * workers
    entered = [0] * workers
    for turn, (at, number) in enumerate(sorted(encoded)):
        request, worker = requests[number], turn % workers
        rows = 2 if request.guidance_scale > 1 else 1
        entered[worker] = max(entered[worker], at + rows * prompt)
        for image in range(request.images):
            ready[worker] = max(ready[worker], entered[worker]) + request.steps * (
                profile.step_ns(rows) + profile.overhead_ns("step_dispatch")
            )
            handed.append((ready[worker], worker, number, image))
    free = [0] * decoders
    finished = [0] * len(requests)
    for at, _, number, _ in sorted(handed):
        place = min(range(decoders), key=lambda i: (max(free[i], at + latents), i))
        end = max(free[place], at + latents) + profile.chunk_ns("whole", 0) + profile.overhead_ns("chunk_dispatch")
        free[place] = end + host
        finished[number] = max(finished[number], end + host + copy)
    return finished


@pytest.mark.parametrize("seed", range(12))
def test_stages_agree_with_a_plain_second_implementation(seed: int) -> None:
    source = random.Random(seed)
    profile = make_profile({1: 60, 2: 100}, {"whole": [source.choice([30, 250])]}, overheads=OVERHEADS)
    requests, now = [], 0
    for number in range(60):
        now += source.choice([0, 7, 40, 300])
        requests.append(Request(number, now, source.randint(1, 3), source.randint(1, 3), source.choice([1.0, 7.5])))
    counts = [source.randint(1, 3) for _ in range(3)]
    sizes = source.choice([(0, 0), (13, 400)])
    cluster = apart(counts[0], encode=counts[1], decode=counts[2], latent_bytes=sizes[0], embedding_bytes=sizes[1])
    found = serve(requests, cluster, "continuous-serial", profile=profile)
    assert finishes(found) == in_stages(requests, profile, counts, *sizes)


# --- every policy, and what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lead", [0, 20])
def test_every_policy_serves_workers_that_only_denoise(policy: str, lead: int) -> None:
    profile = undisturbed(overheads={**OVERHEADS, "decision_lead": lead})
    requests = [Request(number, 40 * number, 1 + number % 3, slo_ns=900) for number in range(30)]
    for router in (build_router("shortest-queue"), build_router("shared-queue", slots=4)):
        cluster = apart(2, encode=1, decode=1, **FREE)
        found = serve(requests, cluster, POLICIES[policy], profile=profile, router=router)
        assert {record.status for record in found.run.requests} <= {"done", "rejected"}
        done = [record for record in found.run.requests if record.status == "done"]
        assert len(work(found, "chunk")) == len(done) > 20
        assert all(r.admitted_ns < r.denoised_ns <= r.decode_started_ns < r.finished_ns for r in done)


def test_sizes_are_the_models_or_given() -> None:
    profile = headed({2: 1}, 1, Head(model="sdxl", resolutions=((1024, 768),)))
    none: dict[str, int | None] = {"latent_bytes": None, "embedding_bytes": None}
    assert carried(profile, none) == (4 * 128 * 96 * 2, (77 * 2048 + 1280) * 2)
    assert carried(profile, {**none, "latent_bytes": 0}) == (0, (77 * 2048 + 1280) * 2)
    unknown = headed({2: 1}, 1, Head(model="mine"))
    with pytest.raises(InputError, match=r"stages.latent_bytes is missing, and the model 'mine'.*sd15, sdxl"):
        carried(unknown, none)
    assert CARRIED["sd15"].channels == 4


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "name the GPUs of encode, of decode or of both"),
        ({"decode": 0}, "decode"),
        ({"decode": {"count": 1, "gpu": 2}}, "gpu"),
        ({"denoise": 2}, "denoise"),
    ],
)
def test_what_no_stage_is(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster_of({"workers": {"count": 1}, "stages": stages})
    with pytest.raises(InputError, match=r"workers\[0\] has decode_gpus"):
        cluster_of({"workers": [{"denoise_gpu": 0, "decode_gpus": [1]}], "stages": {"decode": 1}})


def test_a_link_without_a_speed_is_refused() -> None:
    profile = make_profile({2: 100}, {"whole": [70]})
    cluster = cluster_of({"workers": {"count": 1}, "stages": {"decode": 1, **FREE}})
    with pytest.raises(InputError, match=r"stages apart need link.gb_per_s"):
        serve([Request(0, 0, 1)], cluster, "continuous-serial", profile=profile, adapters=None)


# --- workers of several GPUs, and of several profiles -----------------------------------------------------------------


def test_a_worker_of_four_gpus_takes_steps_in_the_times_of_its_degree() -> None:
    profile = make_profile({2: 100}, {"whole": [70]})
    profile = replace(profile, degrees={4: {2: exact(30)}})
    cluster = cluster_of({"workers": [{"count": 1, "degree": 4}, {"count": 1}]})
    assert [entry.denoise_gpu for entry in cluster.workers] == [0, 4]
    assert len(cluster.gpus) == 5
    found = serve([Request(0, 0, 2), Request(1, 0, 2)], cluster, "continuous-serial", profile=profile)
    assert work(found, "step") == [(0, 0, 30), (4, 0, 100), (0, 30, 60), (4, 100, 200)]
    assert work(found, "chunk") == [(0, 60, 130), (4, 200, 270)]
    with pytest.raises(InputError, match="no step times on 2 GPUs"):
        serve([Request(0, 0, 2)], cluster_of({"workers": {"count": 1, "degree": 2}}), "static", profile=profile)


@pytest.mark.parametrize("degree", [True, 2.0, 3, "2", None])
def test_a_degree_is_a_whole_number_of_gpus(degree: object) -> None:
    with pytest.raises(InputError, match=r"degree.* 1, 2, 4 or 8"):
        cluster_of({"workers": {"count": 1, "degree": degree}})


def test_workers_of_several_profiles_encode_step_and_decode_in_their_own_times() -> None:
    fast = make_profile({2: 100, 4: 120}, {"whole": [50]}, overheads={"text_encode": 5})
    slow = replace(make_profile({2: 300, 4: 350}, {"whole": [90]}, overheads={"text_encode": 8}), name="slow")
    cluster = cluster_of({"workers": [{"count": 1}, {"count": 1, "profile": "slow", "speed": 2.0}]})
    assert cluster.profiles == ["slow"]
    found = serve(
        [Request(0, 0, 1), Request(1, 0, 1)], cluster, "continuous-serial", profile=fast, profiles={"slow": slow}
    )
    assert work(found, "step") == [(0, 5, 105), (1, 8, 158)]
    assert finishes(found) == [155, 203]


def test_the_declared_cost_of_what_has_not_ended_decides_and_a_slower_card_holds_less() -> None:
    profile = headed({2: 100}, 10, Head(resolutions=((64, 64),)))
    other = headed({2: 400}, 10, Head(resolutions=((128, 128),)))
    profile = replace(profile, head=Head(resolutions=((64, 64), (128, 128))), others={(128, 128): other})

    def square(number: int, steps: int, side: int) -> Request:
        return Request(number, number, steps, height=side, width=side)

    requests = [square(0, 2, 128), square(1, 2, 64), square(2, 2, 64), square(3, 6, 64)]
    equal, halved = cluster_of({"workers": {"count": 2}}), cluster_of({"workers": [{"count": 1}, HALF]})

    def served_by(asked: list[Request], cluster: Cluster) -> list[int]:
        router = build_router("declared-cost")
        return serve(asked, cluster, "continuous-serial", profile=profile, router=router).worker_of

    # In steps of 64x64: 8 on worker 0, 2 and 2 on worker 1; six more make 14 there or 10 here, at half the speed 20.
    assert served_by(requests, equal) == [0, 1, 1, 1]
    assert served_by(requests, halved) == [0, 1, 1, 0]
