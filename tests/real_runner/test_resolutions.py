"""Several resolutions on hardware: buckets, images, adapters and limits of each, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies.registry import build_policy
from real_runner.adapters.start import open_serving
from real_runner.engine import run_real
from real_runner.hardware import Hardware
from synerdiff.cli import main
from synerdiff.config.cluster import cluster_of
from synerdiff.core import REUSE, InputError, Request, SkipBudget, controlnets_from, loras_from
from synerdiff.profile.folder import combined, write_profile
from synerdiff.profile.tables import Profile
from tests.adapter_world import made_alone, save_picture
from tests.builders import affine_profile
from tests.hardware import digits_hardware, digits_profile
from tests.real_runner.test_images import by_diffusers

torch.set_num_threads(1)
SMALL, LARGE = (32, 32), (48, 32)
ONE = cluster_of({"workers": [{"denoise_gpu": 0}]})


def mixed_profile() -> Profile:
    small, large = digits_profile(), affine_profile(6, 2, 6)
    large.head = small.head.model_copy(update={"resolutions": (LARGE,)})
    return combined([small, replace(large, row_buckets=(1, 2, 4, 6))], "both")


@pytest.fixture(scope="module")
def hardware() -> Iterator[Hardware]:
    with digits_hardware(mixed_profile()) as opened:
        yield opened


def asked(count: int, **fields: Any) -> list[Request]:
    """Every third is large; the first has no resolution of its own."""
    sizes = [LARGE if number % 3 == 1 else SMALL for number in range(count)]
    return [
        Request(i, i * 3_000_000, 3 + i % 3, guidance_scale=(4.0, 1.0)[i % 4 == 3], seed=i, height=h, width=w, **fields)
        for i, (h, w) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("static", {"max_wait_s": 0.01}),
        ("continuous-serial", {"turn": "drr"}),
        ("continuous-parallel", {"turn": "srtf"}),
        ("synerdiff", {}),
        ("load-skip", {"skip_queue": 1}),
        ("edf", {}),
        ("auto", {}),
    ],
)
def test_images_of_each_resolution_are_those_of_diffusers(policy: str, parameters: Any, hardware: Hardware) -> None:
    requests, made = asked(6), {}
    run = run_real(
        requests,
        build_policy(policy, parameters),
        mixed_profile(),
        hardware,
        budget=SkipBudget(500_000, 1, 1, REUSE),
        on_image=lambda sample, state, picture: made.update({sample.request.request_id: (state, picture)}),
    )
    assert run.error is None
    assert run.faults == []
    assert [record.status for record in run.result.requests] == ["done"] * 6
    for record in run.result.requests:
        request = record.request
        state, picture = made[request.request_id]
        latent, pixels = by_diffusers(hardware.at(request), request, 0, record.modes[0])
        assert float((state.latent - latent).abs().max()) < 2e-4
        assert np.asarray(picture).shape == request.size
        assert int(np.abs(np.asarray(picture).astype(int) - pixels.squeeze().astype(int)).max()) <= 1
    for work in run.result.work:
        if work.kind == "step":
            assert len({requests[sample].size for sample in work.samples}) == 1


def test_each_resolution_pads_to_buckets_of_its_own(hardware: Hardware) -> None:
    large = hardware.models[LARGE]
    assert hardware.model.row_buckets == digits_profile().row_buckets
    assert large.row_buckets == (1, 2, 4, 6)
    assert large.unet is hardware.model.unet
    assert large.latent_shape == (1, 4, 12, 8)


def test_a_step_of_the_smaller_limit_stays_within_it(hardware: Hardware) -> None:
    requests = [replace(request, height=LARGE[0], width=LARGE[1], arrival_ns=0) for request in asked(6)]
    run = run_real(
        [*requests, Request(6, 0, 3, height=32, width=32)], build_policy("dynamic"), mixed_profile(), hardware
    )
    assert run.error is None
    assert max(work.rows for work in run.result.work if work.kind == "step") <= 6


def test_loras_and_controlnets_work_at_each_resolution(hardware: Hardware, folders: Any) -> None:
    generator = np.random.default_rng(6)
    save_picture(folders.images / "tall.png", generator.integers(0, 256, LARGE, dtype=np.uint8))
    small = {"height": 32, "width": 32}
    large = {"height": 48, "width": 32}
    requests = [
        Request(0, 0, 4, seed=0, loras=loras_from(("ink@0.8",)), **small),  # type: ignore[arg-type]
        Request(1, 0, 4, seed=1, loras=loras_from(("ink@0.8",)), **large),  # type: ignore[arg-type]
        Request(2, 0, 4, seed=2, controlnets=controlnets_from(("edges=tall.png",)), **large),  # type: ignore[arg-type]
        Request(3, 0, 4, seed=3, controlnets=controlnets_from(("edges",)), **small),  # type: ignore[arg-type]
        Request(4, 0, 4, seed=4, controlnets=controlnets_from(("edges",)), **large),  # type: ignore[arg-type]
    ]
    made = {}
    with open_serving(hardware, ONE, requests, folders) as serving:
        run = run_real(
            requests,
            build_policy("continuous-parallel"),
            mixed_profile(),
            hardware,
            serving=serving,
            on_image=lambda sample, state, picture: made.update({sample.request.request_id: state.latent}),
        )
    assert run.error is None
    # The picture of seed 4 is 32x32, which its own request refuses and no other.
    assert [record.status for record in run.result.requests] == ["done"] * 4 + ["failed"]
    assert "has 48x32 pixels (height x width); this one has 32x32" in run.faults[0].detail
    for request in requests[:4]:
        alone = made_alone(hardware.at(request), folders, request)
        assert float((made[request.request_id] - alone).abs().max()) < 2e-4


def test_sides_that_the_model_cannot_make_are_refused() -> None:
    odd = affine_profile(6, 2, 6)
    odd.head = digits_profile().head.model_copy(update={"resolutions": ((36, 32),)})
    with pytest.raises(InputError, match="multiples of 8 pixels up to 16384, not 36x32"):
        digits_hardware(combined([digits_profile(), odd], "both")).close()


def test_the_command_runs_a_trace_of_several_resolutions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_profile(tmp_path / "p", mixed_profile())
    trace = tmp_path / "t.csv"
    rows = [f"{0.01 * i},3,{h},{w}" for i, (h, w) in enumerate([SMALL, LARGE, SMALL, LARGE])]
    trace.write_text("\n".join(["arrival_s,steps,height,width", *rows]) + "\n")
    out, images = tmp_path / "out", tmp_path / "images"
    options = ["--profile", str(tmp_path / "p"), "--trace", str(trace), "--policy", "auto", "--max-concurrency", "2"]
    assert main(["run", *options, "--out", str(out), "--images", str(images)]) == 0
    assert len(list(images.glob("*.png"))) == 4
