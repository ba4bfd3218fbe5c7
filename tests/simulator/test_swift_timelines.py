"""Hand-computed timelines of services, LoRA loading and guidance on two GPUs, to the nanosecond."""

from __future__ import annotations

from typing import Any

import pytest

from synerdiff.core import ChunkLaunch, Decision, Request, View, WorkerInfo, controlnets_from, loras_from
from synerdiff.profile.tables import Profile
from tests.builders import make_profile
from tests.swift_builders import LORA, cluster, serve, spans, toy_adapters

SERIAL = "continuous-serial"


def test_inline_controlnets_run_one_after_the_other_before_the_forward() -> None:
    result = serve([Request(0, 0, 1, controlnets=controlnets_from(("a", "b")))], cluster(), SERIAL)
    # Two rows: each ControlNet 30, the step 100, then the decode.
    assert spans(result) == [
        (0, "denoise", "controlnet", 0, 30),
        (0, "denoise", "controlnet", 30, 60),
        (0, "denoise", "step", 60, 160),
        (0, "decode0", "chunk", 160, 200),
    ]


def test_the_decoder_waits_for_the_residuals_of_a_service() -> None:
    described = cluster(services=[{"controlnets": ["a"]}], controlnets="service")
    result = serve(
        [Request(0, 0, 2, controlnets=controlnets_from(("a",)))],
        described,
        SERIAL,
        adapters=toy_adapters(residual_add={1: 2, 2: 3}),
    )
    # Latents of 2 rows arrive at 5 + 20, the forward takes 30, residuals 5 + 30: at 90. The encoder ended at 40.
    # The decoder takes 60 and 3 more to add the residuals: the step ends at 153, the second at 306.
    assert spans(result) == [
        (0, "denoise", "step", 0, 153),
        (200, "controlnet", "controlnet", 25, 55),
        (0, "denoise", "step", 153, 306),
        (200, "controlnet", "controlnet", 178, 208),
        (0, "decode0", "chunk", 306, 346),
    ]


def test_what_service_and_encoder_take_beside_each_other_counts_where_it_is_known() -> None:
    described = cluster(services=[{"controlnets": ["a"]}], controlnets="service")
    known = toy_adapters(
        controlnet_forward_beside={2: 45}, denoise_encoder_beside={1: 44, 2: 50}, denoise_decoder_beside={2: 61}
    )
    result = serve([Request(0, 0, 1, controlnets=controlnets_from(("a",)))], described, SERIAL, adapters=known)
    # Latents to 25, the forward to 70, residuals to 105 while the encoder ended at 50; the decoder takes 61.
    assert spans(result, "controlnet", "denoise") == [
        (0, "denoise", "step", 0, 166),
        (200, "controlnet", "controlnet", 25, 70),
    ]
    slow = toy_adapters(denoise_encoder_beside={2: 110})
    result = serve([Request(0, 0, 1, controlnets=controlnets_from(("a",)))], described, SERIAL, adapters=slow)
    assert spans(result, "denoise") == [(0, "denoise", "step", 0, 170)]
    inline = serve([Request(0, 0, 1, controlnets=controlnets_from(("a",)))], cluster(), SERIAL, adapters=known)
    assert spans(inline, "denoise")[-1][4] == 130


def test_a_quick_service_hides_behind_the_encoder() -> None:
    described = cluster(services=[{"controlnets": ["a"]}], controlnets="service")
    quick = toy_adapters(controlnet_forward={2: 1}, latent_bytes={1: 0}, residual_bytes={1: 0}, link_latency={0: 0})
    result = serve([Request(0, 0, 1, controlnets=controlnets_from(("a",)))], described, SERIAL, adapters=quick)
    assert spans(result, "denoise") == [(0, "denoise", "step", 0, 100)]


@pytest.mark.parametrize(("services", "second_call"), [([["a"], ["b"]], (201, 25, 55)), ([["a", "b"]], (200, 55, 85))])
def test_residuals_share_the_incoming_link_and_calls_share_a_replica(
    services: list[list[str]], second_call: Any
) -> None:
    described = cluster(services=[{"controlnets": names} for names in services], controlnets="service")
    result = serve([Request(0, 0, 1, controlnets=controlnets_from(("a", "b")))], described, SERIAL)
    calls = [(gpu, start, end) for gpu, _, _, start, end in spans(result, "controlnet")]
    assert calls == [(200, 25, 55), second_call]
    # a's residuals come in from 55 to 90, b's from 90 to 125 (also when b's forward ends at 85), the decoder takes 60.
    assert spans(result, "denoise") == [(0, "denoise", "step", 0, 185)]


def test_two_workers_queue_for_one_replica_and_spread_over_two() -> None:
    requests = [
        Request(0, 0, 1, controlnets=controlnets_from(("a",))),
        Request(1, 10, 1, controlnets=controlnets_from(("a",))),
    ]
    one = serve(requests, cluster(2, [{"controlnets": ["a"]}], controlnets="service"), SERIAL)
    # The second call reaches the replica at 35 and starts when the first ends, at 55; residuals at 85 + 35.
    assert spans(one, "controlnet") == [
        (200, "controlnet", "controlnet", 25, 55),
        (200, "controlnet", "controlnet", 55, 85),
    ]
    assert spans(one, "denoise") == [(0, "denoise", "step", 0, 150), (1, "denoise", "step", 10, 180)]
    two = serve(requests, cluster(2, [{"controlnets": ["a"]}] * 2, controlnets="service"), SERIAL)
    assert spans(two, "denoise") == [(0, "denoise", "step", 0, 150), (1, "denoise", "step", 10, 160)]
    assert one.worker_of == [0, 1]
    assert [w.samples for w in one.run.work if w.lane == "controlnet"] == [(0,), (1,)]


def test_a_service_with_slots_loads_what_it_lacks_in_place_of_the_least_recently_used() -> None:
    described = cluster(services=[{"controlnets": ["a"], "slots": 1}], controlnets="service")
    requests = [
        Request(0, 0, 1, controlnets=controlnets_from(("a",))),
        Request(1, 1000, 1, controlnets=controlnets_from(("b",))),
    ]
    result = serve(requests, described, SERIAL)
    # b is loaded from 1025 to 1525; its forward ends at 1555, residuals at 1590.
    assert spans(result, "controlnet")[1:] == [
        (200, "controlnet", "load", 1025, 1525),
        (200, "controlnet", "controlnet", 1525, 1555),
    ]
    assert spans(result, "denoise")[1] == (0, "denoise", "step", 1000, 1650)
    assert result.controlnet_loads == 1


def test_a_worker_with_slots_loads_inline_controlnets_and_waits() -> None:
    from synerdiff.config.cluster import cluster_of

    described = cluster_of({"workers": [{"denoise_gpu": 0, "controlnet_slots": 1}]})
    result = serve([Request(0, 0, 2, controlnets=controlnets_from(("a", "b")))], described, SERIAL)
    # Each step loads a and then b in its place: 500 twice, then 30 + 30 + 100.
    assert spans(result, "denoise", "loader")[:5] == [
        (0, "loader", "load", 0, 500),
        (0, "loader", "load", 500, 1000),
        (0, "denoise", "controlnet", 1000, 1030),
        (0, "denoise", "controlnet", 1030, 1060),
        (0, "denoise", "step", 1060, 1160),
    ]
    assert result.controlnet_loads == 4


LORA_STEPS = {
    # Steps take 100, the LoRA is there at 250, a merge takes 20, the image has 5 steps.
    ("synchronous", 0): [(270, 370), (370, 470), (470, 570), (570, 670), (670, 770)],
    ("asynchronous", 0): [(270, 370), (370, 470), (470, 570), (570, 670), (670, 770)],
    ("asynchronous", 2): [(0, 100), (100, 200), (270, 370), (370, 470), (470, 570)],
    ("asynchronous", 3): [(0, 100), (100, 200), (200, 300), (320, 420), (420, 520)],
    ("asynchronous", 9): [(0, 100), (100, 200), (200, 300), (320, 420), (420, 520)],
}


@pytest.mark.parametrize(("loading", "bound"), LORA_STEPS)
def test_a_lora_is_merged_when_it_is_there_and_at_the_latest_at_the_bound(loading: str, bound: int) -> None:
    described = cluster(loras=loading, lora_bound_steps=bound)
    result = serve([Request(0, 0, 5, loras=loras_from(("x@0.8",)))], described, SERIAL)
    steps = [(start, end) for _, _, kind, start, end in spans(result, "denoise") if kind == "step"]
    assert steps == LORA_STEPS[loading, bound]
    merged = [(start, end) for _, _, kind, start, end in spans(result, "denoise") if kind == "merge"]
    after = next(start for start, _ in steps if start >= 250)
    assert merged == [(after - 20, after)]
    assert spans(result, "loader") == [(0, "loader", "load", 0, 250)]
    # The image is decoded first; the LoRA is taken out when the lane has nothing else to do.
    assert result.run.requests[0].finished_ns == steps[-1][1] + 40


def test_two_loras_are_loaded_and_merged_in_turn_or_side_by_side() -> None:
    request = Request(0, 0, 1, loras=loras_from(("x", "y")))
    more = toy_adapters(lora_merge_more={LORA: 9})
    serial = serve([request], cluster(), SERIAL, adapters=more)
    # One after the other: 250, merge 20, 250, merge 20 + 9 because the weights hold one already.
    assert spans(serial)[:5] == [
        (0, "loader", "load", 0, 250),
        (0, "denoise", "merge", 250, 270),
        (0, "loader", "load", 270, 520),
        (0, "denoise", "merge", 520, 549),
        (0, "denoise", "step", 549, 649),
    ]
    described = cluster(storage={"loaders": 2}, loras="asynchronous", lora_bound_steps=0)
    beside = serve([request], described, SERIAL, adapters=more)
    assert spans(beside, "loader0", "loader1") == [(0, "loader0", "load", 0, 250), (0, "loader1", "load", 0, 250)]
    assert spans(beside, "denoise")[:3] == [
        (0, "denoise", "merge", 250, 270),
        (0, "denoise", "merge", 270, 299),
        (0, "denoise", "step", 299, 399),
    ]


def test_weights_are_restored_after_the_image_and_a_next_step_waits_for_that() -> None:
    requests = [Request(0, 0, 1, loras=loras_from(("x",))), Request(1, 415, 1)]
    result = serve(requests, cluster(), SERIAL)
    # x: 250 + 20, step to 370, decode to 410, restore to 417. The second request comes at 415 and waits for 417.
    assert spans(result, "denoise") == [
        (0, "denoise", "merge", 250, 270),
        (0, "denoise", "step", 270, 370),
        (0, "denoise", "restore", 410, 417),
        (0, "denoise", "step", 417, 517),
    ]


def test_a_step_with_other_adapters_restores_first_and_equal_ones_stay() -> None:
    requests = [
        Request(0, 0, 1, loras=loras_from(("x",))),
        Request(1, 5, 1, loras=loras_from(("x",))),
        Request(2, 6, 1),
    ]
    result = serve(requests, cluster(), SERIAL)
    kinds = [(kind, start, end) for _, _, kind, start, end in spans(result, "denoise")]
    # The second image finds x in the weights (370 + decode 40); before the third x is taken out.
    assert kinds == [
        ("merge", 250, 270),
        ("step", 270, 370),
        ("step", 410, 510),
        ("restore", 550, 557),
        ("step", 557, 657),
    ]
    assert result.lora_requested == 2
    assert (result.lora_reads, result.lora_copies) == (1, 1)


def test_a_scale_of_one_is_the_same_adapter() -> None:
    # One merge and no restore between them: both are x at scale 1.
    requests = [Request(0, 0, 1, loras=loras_from(["x"])), Request(1, 5, 1, loras=loras_from(["x@1"]))]
    result = serve(requests, cluster(), SERIAL)
    assert [kind for _, _, kind, _, _ in spans(result, "denoise")] == ["merge", "step", "step", "restore"]
    assert result.run.requests[1].finished_ns == 550


def test_another_scale_needs_a_merge_but_no_load() -> None:
    requests = [Request(0, 0, 1, loras=loras_from(("x@1",))), Request(1, 5, 1, loras=loras_from(("x@0.5",)))]
    result = serve(requests, cluster(), SERIAL)
    kinds = [(kind, start, end) for _, _, kind, start, end in spans(result, "denoise")]
    assert kinds[2:5] == [("restore", 410, 417), ("merge", 417, 437), ("step", 437, 537)]
    assert result.lora_reads == 1


@pytest.mark.parametrize(
    ("caches", "second_load"),
    [({}, [(1000, 1250)]), ({"host_cache_mib": 400}, [(1000, 1050)]), ({"device_cache_mib": 400}, [])],
)
def test_caches_spare_the_read_or_the_whole_load(
    caches: dict[Any, Any] | dict[str, Any], second_load: list[Any]
) -> None:
    requests = [Request(0, 0, 1, loras=loras_from(("x",))), Request(1, 1000, 1, loras=loras_from(("x",)))]
    result = serve(requests, cluster(storage=caches), SERIAL)
    assert [(start, end) for *_, start, end in spans(result, "loader")] == [(0, 250), *second_load]


def test_storage_bandwidth_of_the_cluster_takes_the_place_of_the_profile_s_read() -> None:
    result = serve([Request(0, 0, 1, loras=loras_from(("x",)))], cluster(storage={"storage_gb_per_s": 2}), SERIAL)
    assert spans(result, "loader") == [(0, "loader", "load", 0, LORA // 2 + 50)]


def test_the_halves_of_the_guidance_run_on_two_gpus_and_come_together() -> None:
    result = serve([Request(0, 0, 1)], cluster(guidance="two-gpus"), SERIAL)
    # One row each: 60; the other row's latents go there in 5 + 10 and its prediction comes back in 5 + 8.
    assert spans(result) == [
        (0, "denoise", "step", 0, 88),
        (100, "guidance", "half", 15, 75),
        (0, "decode0", "chunk", 88, 128),
    ]
    beside = toy_adapters(
        denoise_forward_beside={1: 75, 2: 100}
    )  # where encoder and decoder of a row take 50, a step 60
    result = serve([Request(0, 0, 1)], cluster(guidance="two-gpus"), SERIAL, adapters=beside)
    assert spans(result, "guidance", "denoise") == [
        (0, "denoise", "step", 0, 113),
        (100, "guidance", "half", 15, 100),
    ]
    alone = serve([Request(0, 0, 1, guidance_scale=1.0)], cluster(guidance="two-gpus"), SERIAL, adapters=beside)
    assert spans(alone, "denoise") == [(0, "denoise", "step", 0, 60)]
    assert result.gpus == 2


def test_unguided_samples_need_no_second_half() -> None:
    result = serve([Request(0, 0, 1, guidance_scale=1.0)], cluster(guidance="two-gpus"), SERIAL)
    assert spans(result, "denoise", "guidance") == [(0, "denoise", "step", 0, 60)]


def test_all_three_strategies_together() -> None:
    described = cluster(
        services=[{"controlnets": ["a"]}, {"controlnets": ["a"]}],
        controlnets="service",
        guidance="two-gpus",
        loras="asynchronous",
        lora_bound_steps=9,
    )
    result = serve(
        [Request(0, 0, 5, controlnets=controlnets_from(("a",)), loras=loras_from(("x",)))], described, SERIAL
    )
    # A half: latents 15, forward 15, residuals 20: at 50; encoder to 20; decoder 30 and what else a step takes, 10: 90.
    # The other half gets its latents 15 later and its prediction takes 13: 118 a step. The LoRA (250) is there at 354
    # and merged on both GPUs: 374.
    assert spans(result, "denoise") == [
        (0, "denoise", "step", 0, 118),
        (0, "denoise", "step", 118, 236),
        (0, "denoise", "step", 236, 354),
        (0, "denoise", "merge", 354, 374),
        (0, "denoise", "step", 374, 492),
        (0, "denoise", "step", 492, 610),
        (0, "denoise", "restore", 650, 657),
    ]
    assert spans(result, "guidance")[2:4] == [(100, "guidance", "half", 251, 341), (100, "guidance", "merge", 354, 374)]
    # The second half's call comes at 30, when the first one has just ended.
    assert spans(result, "controlnet")[:2] == [
        (200, "controlnet", "controlnet", start, start + 15) for start in (15, 30)
    ]


def test_a_chunk_contends_with_what_runs_on_its_gpu_and_not_with_a_wait() -> None:
    profile = make_profile({2: 100}, {"whole": [60]}, {2: (2_000_000, 2_000_000)})

    class Script:
        chunking = "whole"

        def reset(self, worker: WorkerInfo, profile: Profile) -> None:
            self.left = [
                Decision(admit=(0,), step=((0, "guided"),)),  # type: ignore[arg-type]
                Decision(admit=(1,), step=((1, "guided"),), chunks=(ChunkLaunch(0, 1),)),  # type: ignore[arg-type]
                Decision(),
                Decision(chunks=(ChunkLaunch(1, 1),)),
            ]

        def decide(self, view: View) -> Any:
            return self.left.pop(0)

    described = cluster(services=[{"controlnets": ["a"]}], controlnets="service")
    requests = [Request(0, 0, 1), Request(1, 0, 1, controlnets=controlnets_from(("a",)))]
    result = serve(requests, described, Script, profile=profile)
    # From 100 the chunk runs beside the encoder (40 of work) at half speed: to 180, 40 done. The residuals come at 190:
    # for 10 ns nothing else runs there, 50 done. Beside the decoder the last 10 take 20: 210. By then the decoder
    # has done 10 of 60 and runs on alone: 260.
    assert spans(result, "denoise", "decode0") == [
        (0, "denoise", "step", 0, 100),
        (0, "denoise", "step", 100, 260),
        (0, "decode0", "chunk", 100, 210),
        (0, "decode0", "chunk", 260, 320),
    ]
