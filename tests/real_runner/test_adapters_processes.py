"""ControlNet services, LoRA loaders and the guidance peer as processes: the images are those of one process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from policies.registry import build_policy
from real_runner.adapters.start import open_serving
from real_runner.engine import run_real
from synerdiff.config.cluster import cluster_of
from synerdiff.core import InputError, Request, controlnets_from, loras_from
from tests.adapter_world import kinds, made_alone, same_weights, weights_of
from tests.hardware import digits_profile

torch.set_num_threads(1)
ONE = {"workers": [{"denoise_gpu": 0}]}
BOTH = ["edges", "depth"]
SERVICES = {
    "workers": [{"denoise_gpu": 0}],
    "strategies": {"controlnets": "service"},
    "controlnet_services": [{"gpu": 2, "controlnets": BOTH}, {"gpu": 3, "slots": 1}],
}
HALVES = {
    "workers": [{"denoise_gpu": 0, "guidance_gpu": 1}],
    "strategies": {"guidance": "two-gpus", "loras": "asynchronous", "lora_bound_steps": 0},
    "loras": {"loaders": 1},
}


def request(number: Any, ms: float = 0.0, steps: int = 3, guidance: float = 4.0, **more: Any) -> Any:
    return Request(number, round(ms * 1e6), steps, guidance_scale=guidance, seed=number, **more)


MIXED = [
    request(0, controlnets=controlnets_from(("edges",))),
    request(1, controlnets=controlnets_from(("depth@0.7", "edges=first.png")), loras=loras_from(("ink@0.8",))),
    request(2, loras=loras_from(("chalk", "ink@0.5"))),
    request(3, guidance=1.0, controlnets=controlnets_from(("depth=second.png",)), loras=loras_from(("chalk",))),
    request(4),
]


@pytest.fixture(scope="module")
def services(hardware: Any, folders: Any) -> Iterator[Any]:
    with open_serving(hardware, cluster_of(SERVICES), MIXED, folders, timeout_s=60) as serving:
        yield serving


@pytest.fixture(scope="module")
def halves(hardware: Any, folders: Any) -> Iterator[Any]:
    with open_serving(hardware, cluster_of(HALVES), MIXED, folders, timeout_s=60) as serving:
        yield serving


def run(hardware: Any, serving: Any, requests: Any, batch: int = 1, on_done: Any = None) -> Any:
    made = {}

    def on_image(sample: Any, state: Any, picture: Any) -> None:
        made[sample.request.request_id] = state.latent
        if on_done is not None:
            on_done(sample.request.request_id)

    policy = build_policy("continuous-serial", {"batch": batch})
    found = run_real(requests, policy, digits_profile(), hardware, serving=serving, on_image=on_image)
    assert found.error is None
    return found, made


def statuses(found: Any) -> list[Any]:
    return [record.status for record in found.result.requests]


@pytest.fixture(scope="module")
def inline(hardware: Any, folders: Any) -> Any:
    """What one process makes of the mixed requests, one at a time."""
    with open_serving(hardware, cluster_of(ONE), MIXED, folders) as serving:
        found, made = run(hardware, serving, MIXED)
    assert statuses(found) == ["done"] * len(MIXED)
    return made


def test_a_service_makes_the_same_image_as_the_workers_own_controlnet(
    hardware: Any, services: Any, inline: Any
) -> None:
    found, made = run(hardware, services, MIXED)
    assert statuses(found) == ["done"] * len(MIXED)
    assert found.faults == []
    assert all(torch.equal(made[number], inline[number]) for number in inline)
    calls = [w for w in found.result.work if w.lane == "controlnet" and w.kind == "controlnet"]
    assert {w.gpu for w in calls} == {2, 3}, "two ControlNets of a step run on two replicas"
    assert [w.rows for w in calls] == [2] * 9 + [1] * 3
    steps: dict[Any, list[Any]] = {w.samples: [] for w in found.result.work if w.kind == "step"}
    for w in found.result.work:
        if w.kind == "step":
            steps[w.samples].append((w.start_ns, w.end_ns))
    for w in calls:
        assert any(start <= w.start_ns and w.end_ns <= end for start, end in steps[w.samples]), "inside its step"
    loads = [w for w in found.result.work if w.lane == "controlnet" and w.kind == "load"]
    assert loads, "a service with slots loads what it is asked for"
    assert {w.gpu for w in loads} == {3}


def test_batches_at_a_service_are_the_same_within_rounding(hardware: Any, services: Any, folders: Any) -> None:
    requests = [request(i, controlnets=controlnets_from([BOTH[i % 2]]), steps=2 + i % 3) for i in range(6)]
    _, made = run(hardware, services, requests, batch=4)
    for asked in requests:
        assert float((made[asked.request_id] - made_alone(hardware.model, folders, asked)).abs().max()) < 2e-4


def test_two_processes_guide_as_one_does(hardware: Any, halves: Any, inline: Any) -> None:
    before = weights_of(hardware.model)
    found, made = run(hardware, halves, MIXED)
    assert statuses(found) == ["done"] * len(MIXED)
    assert found.faults == []
    for number, latent in inline.items():
        assert float((made[number] - latent).abs().max()) < 2e-4
    assert same_weights(hardware.model, before)
    guided = [asked for asked in MIXED if asked.guidance_scale > 1]
    halves_done = [w for w in found.result.work if w.kind == "half"]
    assert [(w.gpu, w.lane, w.rows) for w in halves_done] == [(1, "guidance", 1)] * 3 * len(guided)
    both = kinds(found.result, "denoise", "guidance")
    for kind in ("merge", "restore"):
        assert both.count(("denoise", kind)) == both.count(("guidance", kind)) > 0
    assert ("guidance", "controlnet") in both, "inline ControlNets run once for each half"
    assert kinds(found.result, "loader") == [("loader", "load")] * 4


def test_loading_beside_the_first_steps_with_bound_0_is_loading_before_them(
    hardware: Any, folders: Any, inline: Any
) -> None:
    described = {**ONE, "strategies": {"loras": "asynchronous", "lora_bound_steps": 0}, "loras": {"loaders": 2}}
    with open_serving(hardware, cluster_of(described), MIXED, folders) as serving:
        found, made = run(hardware, serving, MIXED)
        assert all(torch.equal(made[number], inline[number]) for number in inline)
        assert {lane for lane, _ in kinds(found.result) if "loader" in lane} == {"loader0", "loader1"}
        # With a bound, the first steps may have gone without it: one of these images was made.
        serving.bound_steps = 2
        asked = request(7, steps=5, loras=loras_from(("ink",)))
        found, made = run(hardware, serving, [asked])
        possible = [made_alone(hardware.model, folders, asked, loras_from_step=step) for step in range(3)]
        assert min(float((made[7] - latent).abs().max()) for latent in possible) < 2e-4
        assert float((possible[0] - possible[2]).abs().max()) > 0.01
        for file, words in (("missing", "there is no such LoRA"), ("torn", "not a whole safetensors file")):
            found, _ = run(
                hardware, serving, [request(0, loras=loras_from([file])), request(1, loras=loras_from(("ink",)))]
            )
            assert statuses(found) == ["failed", "done"]
            assert f"{file}.safetensors" in found.faults[0].detail
            assert words in found.faults[0].detail
        for process in serving.parts.processes.started.values():  # type: ignore[union-attr]
            process.kill()
        found, _ = run(
            hardware,
            serving,
            [request(0, loras=loras_from(("ink",))), request(1), request(2, 1, loras=loras_from(("chalk",)))],
        )
        assert statuses(found) == ["failed", "done", "failed"]
        failed = {fault.samples: fault.detail for fault in found.faults if fault.kind == "failed"}
        assert failed[("2.0",)] == "its LoRA chalk.safetensors cannot be loaded: no LoRA loader is left"
        assert [fault.kind for fault in found.faults].count("service lost") == 2
    assert all(process.poll() is not None for process in serving.parts.processes.started.values())  # type: ignore[union-attr]


def test_a_lost_service_is_replaced_by_another_and_then_fails_its_requests_alone(
    hardware: Any, services: Any, inline: Any
) -> None:
    """Last of those that use the services: it ends them."""
    processes = services.parts.processes.started
    requests = [
        request(i, controlnets=controlnets_from(("edges",))) if i != 4 else request(4, steps=8) for i in range(6)
    ]
    services.parts.controlnets._timeout_s = 5.0

    def on_done(number: Any) -> None:
        if number == 1:
            processes[1].send_signal(signal.SIGSTOP)  # It lives, and answers no more.
        kill(processes, 2 if number == 3 else None)

    found, made = run(hardware, services, requests, on_done=on_done)
    kill(processes, 1)
    assert statuses(found)[:5] == ["done"] * 5
    assert statuses(found)[5] == "failed"
    assert torch.equal(made[0], inline[0])
    lost = [fault.detail for fault in found.faults if fault.kind == "service lost"]
    assert len(lost) == 2
    assert "the ControlNet service on GPU 2" in lost[0]
    assert "the ControlNet service on GPU 3 is gone" in lost[1]
    failed = [fault for fault in found.faults if fault.kind == "failed"]
    assert [(f.samples, f.detail) for f in failed] == [
        (("5.0",), "no service is left that serves the ControlNet edges")
    ]


def test_a_worker_whose_peer_is_gone_computes_both_halves(hardware: Any, halves: Any, inline: Any) -> None:
    """Last of those that use the peer: it ends it."""
    processes = halves.parts.processes.started
    found, made = run(hardware, halves, MIXED, on_done=lambda number: kill(processes, 1 if number == 0 else None))
    assert statuses(found) == ["done"] * len(MIXED)
    for number, latent in inline.items():
        assert float((made[number] - latent).abs().max()) < 2e-4
    lost = [fault.detail for fault in found.faults if fault.kind == "service lost"]
    assert len(lost) == 1
    assert "the guidance peer on GPU 1 is gone" in lost[0]
    assert "the worker computes both halves from now on" in lost[0]


def kill(processes: Any, rank: Any) -> None:
    if rank is not None:
        processes[rank].kill()
        processes[rank].wait()


def test_a_process_that_cannot_start_is_named(hardware: Any, folders: Any) -> None:
    broken = {**SERVICES, "controlnet_services": [{"gpu": 2, "controlnets": ["blur"]}]}
    with pytest.raises(InputError, match="the ControlNet service on GPU 2 cannot start: there is no ControlNet 'blur'"):
        open_serving(hardware, cluster_of(broken), MIXED[:1], folders)
