"""LoRAs and ControlNets in the worker's own process: images, weights, records, and what goes wrong."""

from __future__ import annotations

import re
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.registry import build_policy
from real_runner.adapters.loras import LoraStore, SourceLost
from real_runner.adapters.serving import Folders, image_channels
from real_runner.adapters.start import open_serving
from real_runner.engine import run_real
from synerdiff.config.cluster import LoraStorage, cluster_of
from synerdiff.core import InputError, Request, controlnets_from, loras_from
from tests.adapter_world import kinds, made_alone, same_weights, weights_of
from tests.builders import requests_at
from tests.hardware import digits_profile

torch.set_num_threads(1)
ONE = {"workers": [{"denoise_gpu": 0}]}


def run(
    hardware: Any, folders: Any, requests: Any, policy: str = "dynamic", described: Any = ONE, batch: int = 8
) -> Any:
    made = {}
    with open_serving(hardware, cluster_of(described), requests, folders) as serving:
        found = run_real(
            requests,
            build_policy(policy, {"batch": batch}),
            digits_profile(),
            hardware,
            serving=serving,
            on_image=lambda sample, state, picture: made.update({sample.name: state.latent}),
        )
    assert found.error is None
    return found, made


def request(number: Any, ms: float = 0.0, steps: int = 4, guidance: float = 4.0, **more: Any) -> Any:
    return Request(number, round(ms * 1e6), steps, guidance_scale=guidance, seed=number, **more)


def test_images_have_their_loras_and_controlnets_and_weights_come_back(hardware: Any, folders: Any) -> None:
    requests = [
        request(0, loras=loras_from(("ink@0.8",))),
        request(1, loras=loras_from(("chalk", "ink@0.5")), controlnets=controlnets_from(("edges",))),
        request(2, controlnets=controlnets_from(("depth@0.7", "edges=first.png"))),
        request(3, controlnets=controlnets_from(("edges@1.5=second.png",)), images=2),
        request(4, guidance=1.0, controlnets=controlnets_from(("depth",))),
        request(5),
    ]
    before = weights_of(hardware.model)
    found, made = run(hardware, folders, requests)
    assert found.faults == []
    assert [record.status for record in found.result.requests] == ["done"] * len(requests)
    assert same_weights(hardware.model, before)
    plain = {}
    for asked in requests:
        for image in range(asked.images):
            latent = made[f"{asked.request_id}.{image}"]
            assert float((latent - made_alone(hardware.model, folders, asked, image)).abs().max()) < 2e-4
            plain[image] = made_alone(hardware.model, folders, request(asked.request_id, steps=asked.steps), image)
            if asked.loras or asked.controlnets:
                assert float((latent - plain[image]).abs().max()) > 0.05, "the adapters can be seen"


def test_records_show_what_stands_before_a_step(hardware: Any, folders: Any) -> None:
    requests = [
        request(0, loras=loras_from(("ink",))),
        request(1, loras=loras_from(("chalk", "ink@0.5"))),
        request(2, controlnets=controlnets_from(("edges",))),
    ]
    found, _ = run(hardware, folders, requests, "continuous-serial", batch=1)
    work = found.result.work
    order = [(w.kind, w.samples) for w in work if w.lane == "denoise" or w.lane == "loader"]
    before_steps = [order[i : i + 2] for i in range(len(order))]
    assert [("load", (0,)), ("merge", (0,))] in before_steps
    assert [("merge", (0,)), ("step", (0,))] in before_steps
    assert kinds(found.result, "loader") == [("loader", "load")] * 3, "nothing is cached by default"
    assert [w.samples for w in work if w.kind == "merge"] == [(0,), (1,), (1,)]
    assert sum(w.kind == "controlnet" for w in work) == 4
    assert {w.rows for w in work if w.kind == "controlnet"} == {2}
    assert sum(w.kind == "restore" for w in work) == 2
    spans = sorted((w.start_ns, w.end_ns) for w in work if w.lane == "denoise")
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "one thing at a time"


def test_samples_with_other_loras_never_share_a_step(hardware: Any, folders: Any) -> None:
    requests = [
        request(i, loras=loras_from(loras)) for i, loras in enumerate([("ink",), ("ink@0.5",), (), ("ink",), ()])
    ]
    found, _ = run(hardware, folders, requests, "continuous-parallel")
    for record in found.result.work:
        if record.kind == "step":
            assert len({requests[sample].loras for sample in record.samples}) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"loras": loras_from(("missing",))}, ("missing.safetensors", "there is no such LoRA")),
        ({"loras": loras_from(("ink", "torn"))}, ("torn.safetensors", "not a whole safetensors file")),
        ({"loras": loras_from(("wide",))}, ("LoRA wide", "changes a weight of")),
        ({"loras": loras_from(("../outside",))}, ("../outside.safetensors", "lies outside the folder of LoRAs")),
        (
            {"controlnets": controlnets_from(("edges=missing.png",))},
            ("missing.png", "there is no such conditioning picture"),
        ),
        (
            {"controlnets": controlnets_from(("edges=../loras/torn.safetensors",))},
            ("lies outside the folder of conditioning pictures",),
        ),
    ],
)
def test_an_adapter_that_cannot_be_had_fails_its_request_alone(
    hardware: Any, folders: Any, more: dict[str, Any], words: Any
) -> None:
    before = weights_of(hardware.model)
    found, made = run(hardware, folders, [request(0), request(1, **more), request(2, 1, loras=loras_from(("chalk",)))])
    assert [record.status for record in found.result.requests] == ["done", "failed", "done"]
    assert [(fault.kind, fault.samples) for fault in found.faults] == [("failed", ("1.0",))]
    for word in words:
        assert word in found.faults[0].detail
    assert same_weights(hardware.model, before)
    assert set(made) == {"0.0", "2.0"}


@pytest.mark.parametrize(
    ("storage", "reads", "copies"),
    [({}, 3, 3), ({"host_cache_mib": 100}, 1, 3), ({"device_cache_mib": 100}, 1, 1), ({"host_cache_mib": 0.01}, 3, 3)],
)
def test_cached_files_are_not_read_again(
    hardware: Any, folders: Any, storage: dict[Any, Any] | dict[str, Any], reads: int, copies: int
) -> None:
    described = cluster_of({**ONE, "loras": storage})
    requests = [request(0, steps=1, loras=loras_from(("ink",)))]
    with open_serving(hardware, described, requests, folders) as serving:
        for _ in range(3):
            run_real(requests, build_policy("dynamic"), digits_profile(), hardware, serving=serving)
        assert (serving.parts.loras.reads, serving.parts.loras.copies) == (reads, copies)  # type: ignore[union-attr]


def test_what_cannot_be_served_is_refused_before_the_start(hardware: Any, folders: Any) -> None:
    def refused(match: Any, asked: Any, where: Any = folders, described: Any = ONE) -> None:
        with pytest.raises(InputError, match=match):
            run(hardware, where, [asked], described=described)

    refused(
        "request 0 asks for LoRAs; give their folder with --loras", request(0, loras=loras_from(("ink",))), Folders()
    )
    refused("there is no ControlNet 'blur'", request(0, controlnets=controlnets_from(("blur",))))
    only_nets = Folders(controlnets=folders.controlnets)
    refused(
        "give the folder of their conditioning images", request(0, controlnets=controlnets_from(("edges",))), only_nets
    )
    refused("has 2 workers", request(0), described={"workers": [{"denoise_gpu": 0}, {"denoise_gpu": 1}]})
    refused("every decode lane is on", request(0), described={"workers": [{"denoise_gpu": 0, "decode_gpus": [1]}]})
    refused("the links that it has", request(0), described={**ONE, "link": {"latency_us": 1}})
    refused("the storage that it has", request(0), described={**ONE, "loras": {"storage_gb_per_s": 1}})
    refused("files have the sizes that they have", request(0), described={**ONE, "loras": {"sizes_mib": {"ink": 1}}})
    slots = {"workers": [{"denoise_gpu": 0, "controlnet_slots": 1}]}
    refused("a worker holds all ControlNets of its trace", request(0), described=slots)
    with pytest.raises(InputError, match="request 0 asks for LoRAs or ControlNets; say where they are"):
        run_real(requests_at(0, loras=loras_from(("a",))), build_policy("static"), digits_profile(), hardware)


class SlowSource:
    """Files that come when it is too late."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.let_go = threading.Event()

    def read(self, file: Any) -> None:
        self.asked.append(file)
        self.let_go.wait(30)
        raise SourceLost("it was too slow anyway")


def test_a_lora_that_does_not_come_fails_its_request_at_the_bound(hardware: Any, folders: Any) -> None:
    source = SlowSource()
    requests = [request(0, steps=4, loras=loras_from(("ink",))), request(1, steps=2)]
    with open_serving(hardware, cluster_of(ONE), requests, folders, timeout_s=0.3) as serving:
        parts = serving.parts
        parts.loras = LoraStore(
            LoraStorage(),
            [source],  # type: ignore[list-item]
            torch.device("cpu"),
            0,
            parts.clock,
            parts.ledger,
            background=True,
        )
        serving.asynchronous, serving.bound_steps = True, 2
        found = run_real(requests, build_policy("static"), digits_profile(), hardware, serving=serving)
        source.let_go.set()
    assert source.asked == ["ink"]
    assert [record.status for record in found.result.requests] == ["failed", "done"]
    assert found.result.requests[0].modes == ("ggg",), "two steps without it, and the one that failed"
    assert [fault.detail for fault in found.faults] == ["its LoRA ink.safetensors has not been loaded after 0.3 s"]


def test_a_controlnet_whose_channels_are_unknown_fails_its_request(hardware: Any, folders: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its config\.json does not say how many conditioning_channels it reads"):
        image_channels(tmp_path)
    assert image_channels(folders.controlnets / "edges").channels == 1


def test_torchrun_must_start_as_many_processes_as_there_are_roles(
    hardware: Any, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    described = {**ONE, "strategies": {"loras": "asynchronous"}}
    match = "torchrun started 3 processes; this run needs 2: the worker on GPU 0, LoRA loader 0."
    with pytest.raises(InputError, match=re.escape(match)):
        open_serving(hardware, cluster_of(described), [request(0)], folders)
