"""The runner on a GPU: streams, graphs and the decision lead make the images of the CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from policies.registry import build_policy
from real_runner.engine import run_real
from real_runner.hardware import open_hardware
from synerdiff.core import REUSE, SkipBudget
from tests.builders import requests_at
from tests.faulty import Faults, faulty, watched_chunks
from tests.hardware import digits_profile
from tests.real_runner.test_resolutions import asked, mixed_profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
]


def made_on(device: Any, policy: Any, lead_ms: int = 0, lanes: int = 1, faults: Any = None) -> Any:
    profile = digits_profile(overheads={"decision_lead": lead_ms * 1_000_000})
    made = {}
    with open_hardware("digits", device, profile, decode_lanes=lanes) as hardware:
        requests = requests_at(*(3 * i for i in range(12)), steps=5, guidance_scale=4.0)
        run_real(requests[:1], build_policy(policy), profile, hardware)
        with faulty(hardware, faults or Faults()), watched_chunks():
            run = run_real(
                requests,
                build_policy(policy),
                profile,
                hardware,
                budget=SkipBudget(0, 2, 1, REUSE),
                on_image=lambda sample, state, image: made.update({sample.name: state.latent.cpu()}),
            )
    assert run.error is None
    return run, made


@pytest.mark.parametrize(("lead_ms", "lanes"), [(0, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    "policy", ["static", "continuous-serial", "continuous-parallel", "chunked", "synerdiff-feedback"]
)
def test_graphs_on_streams_make_the_images_of_the_cpu(policy: str, lead_ms: int, lanes: int) -> None:
    run, made = made_on("cuda", policy, lead_ms, lanes)
    assert [record.status for record in run.result.requests] == ["done"] * 12
    _, expected = made_on("cpu", policy)
    assert made.keys() == expected.keys()
    for name, latent in made.items():
        assert float((latent - expected[name]).abs().max()) < 1e-2
    steps = [record for record in run.result.work if record.kind == "step"]
    for one, following in pairwise(steps):
        assert one.start_ns < one.end_ns <= following.start_ns + 2000


def test_a_broken_sample_fails_alone_on_a_gpu() -> None:
    faults = Faults()
    faults.not_a_number, faults.raises, faults.short_of_memory_once = {3}, {5}, {7}
    run, made = made_on("cuda", "continuous-parallel", 2, 1, faults)
    failed = [record.request.request_id for record in run.result.requests if record.status == "failed"]
    assert failed == [3, 5]
    assert len(made) == 10


def test_each_resolution_has_graphs_of_its_own() -> None:
    requests = asked(9)
    latents: dict[str, dict[str, torch.Tensor]] = {"cuda": {}, "cpu": {}}
    for device in ("cuda", "cpu"):
        made = latents[device]
        with open_hardware("digits", device, mixed_profile()) as hardware:
            run = run_real(
                requests,
                build_policy("continuous-parallel", {"turn": "drr"}),
                mixed_profile(),
                hardware,
                on_image=lambda sample, state, image, made=made: made.update({sample.name: state.latent.cpu()}),  # type: ignore[misc]
            )
        assert run.error is None
        assert [record.status for record in run.result.requests] == ["done"] * 9
    for name, latent in latents["cuda"].items():
        assert float((latent - latents["cpu"][name]).abs().max()) < 1e-2
