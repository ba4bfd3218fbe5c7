"""Every policy's images on hardware are those that diffusers' own parts make from the same seed, steps and modes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from policies.registry import POLICIES, build_policy
from real_runner.engine import run_real
from real_runner.intake import seed_of
from synerdiff.core import CONDITIONAL, REUSE, SkipBudget
from synerdiff.diffusion.model import image_seed
from tests.builders import requests_at
from tests.hardware import digits_profile

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def expected(hardware: Any) -> Any:
    """What diffusers makes of (request, image, letters), made once: most policies give most samples the same modes."""
    known = {}

    def find(request: Any, image: Any, letters: Any) -> Any:
        if (request, image, letters) not in known:
            known[request, image, letters] = by_diffusers(hardware.model, request, image, letters)
        return known[request, image, letters]

    return find


def mixed_requests() -> list[Any]:
    """A burst with different steps, guidance, seeds and numbers of images, and two latecomers."""
    kinds = [(5, 4.0, 1, 11), (7, 2.0, 2, 12), (4, 1.0, 1, None), (6, 7.5, 1, 14), (8, 4.0, 3, 15), (5, 1.0, 1, 16)]
    kinds += [(6, 3.0, 1, None), (9, 4.0, 1, 18), (6, 5.0, 1, 19), (7, 1.0, 2, 20)]
    arrivals = [0, 0, 5, 5, 10, 20, 20, 40, 90, 120]
    requests = [
        requests_at(*[0] * i, ms, steps=steps, guidance_scale=guidance, images=images, seed=seed)[-1]
        for i, (ms, (steps, guidance, images, seed)) in enumerate(zip(arrivals, kinds, strict=True))
    ]
    requests[1] = replace(requests[1], prompt="9", negative_prompt="4")
    requests[2] = replace(requests[2], prompt="a class that digits lacks")
    return requests


@torch.inference_mode()
def by_diffusers(model: Any, request: Any, image: Any, letters: Any) -> Any:
    """(latent, uint8 pixels) by diffusers' scheduler, UNet, VAE and image processor, one step at a time."""
    from diffusers import DDIMScheduler
    from diffusers.image_processor import VaeImageProcessor

    scheduler = DDIMScheduler.from_config(model.solver._scheduler.config)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(request.steps)
    seed = seed_of(request)
    condition = model.encode_prompt("9", "4") if request.negative_prompt else model.encode_prompt(str(seed % 10))
    both = torch.cat([condition.unconditional_tokens, condition.tokens])
    generator = torch.Generator().manual_seed(image_seed(seed, image))
    latent = torch.randn(model.latent_shape, generator=generator) * scheduler.init_noise_sigma
    difference = None
    for timestep, letter in zip(scheduler.timesteps, letters, strict=True):
        scaled = scheduler.scale_model_input(latent, timestep)
        if letter == "g":
            unguided, guided = model.unet(torch.cat([scaled] * 2), timestep, both).sample.chunk(2)
            difference = guided - unguided
            noise = unguided + request.guidance_scale * difference
        else:
            noise = model.unet(scaled, timestep, condition.tokens).sample
            if letter == "r":
                noise = noise + (request.guidance_scale - 1) * difference
        latent = scheduler.step(noise, timestep, latent).prev_sample
    decoded = model.vae.decode(latent / model.vae.config.scaling_factor).sample
    pixels = VaeImageProcessor().postprocess(decoded, output_type="np")[0]
    return latent, (pixels * 255).round().astype(np.uint8)


@pytest.mark.parametrize("skip_mode", [REUSE, CONDITIONAL])
@pytest.mark.parametrize("name", POLICIES)
def test_images_of_every_policy_are_those_of_diffusers(name: str, skip_mode: Any, hardware: Any, expected: Any) -> None:
    requests = mixed_requests()
    made = {}
    run = run_real(
        requests,
        build_policy(name),
        digits_profile(),
        hardware,
        budget=SkipBudget(500_000, 2, 1, skip_mode),
        on_image=lambda sample, state, picture: made.update({sample.name: (state, picture)}),
    )
    assert run.error is None
    assert run.faults == []
    assert [record.status for record in run.result.requests] == ["done"] * len(requests)
    assert len(made) == sum(request.images for request in requests)
    for record in run.result.requests:
        for image, letters in enumerate(record.modes):
            state, picture = made[f"{record.request.request_id}.{image}"]
            assert len(letters) == record.request.steps
            latent, pixels = expected(record.request, image, letters)
            assert float((state.latent - latent).abs().max()) < 2e-4
            assert int(np.abs(np.asarray(picture).astype(int) - pixels.squeeze().astype(int)).max()) <= 1
    spent = Counter("".join(letters for record in run.result.requests for letters in record.modes))
    assert spent["g"] > 0
    assert sum(record.skipped_steps for record in run.result.requests) <= spent["r"] + spent["c"]


def test_policies_that_skip_do_skip_in_this_burst(hardware: Any) -> None:
    run = run_real(
        mixed_requests(),
        build_policy("skip-cfg"),
        digits_profile(),
        hardware,
        budget=SkipBudget(500_000, 2, 1, REUSE),
    )
    letters = "".join("".join(record.modes) for record in run.result.requests)
    assert letters.count("r") == sum(record.skipped_steps for record in run.result.requests) > 0


def test_full_guidance_equals_the_pipeline_of_diffusers(hardware: Any) -> None:
    """Latents and images of one request against `StableDiffusionPipeline` itself."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    model = hardware.model
    pipeline = StableDiffusionPipeline(  # type: ignore[no-untyped-call]
        vae=model.vae,
        text_encoder=None,
        tokenizer=None,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.solver._scheduler.config),  # type: ignore[no-untyped-call]
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    made = {}
    requests = requests_at(0, 10, 15, steps=9, guidance_scale=4.0)
    run = run_real(
        requests,
        build_policy("continuous-parallel"),
        digits_profile(),
        hardware,
        on_image=lambda sample, state, picture: made.update({sample.request.request_id: picture}),
    )
    assert run.error is None
    for request in requests:
        condition = model.encode_prompt(str(request.request_id % 10))
        expected = pipeline(  # type: ignore[operator]
            prompt_embeds=condition.tokens,
            negative_prompt_embeds=condition.unconditional_tokens,
            latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(request.request_id)),
            num_inference_steps=9,
            guidance_scale=4.0,
            height=32,
            width=32,
            output_type="np",
        ).images[0]
        found = np.asarray(made[request.request_id]).astype(int)
        assert int(np.abs(found - (expected.squeeze() * 255).round().astype(int)).max()) <= 1
