"""Throughput at saturation against diffusers' own pipeline: same model, machine and run.

    python -m benchmarks.throughput_vs_diffusers [--requests 32] [--repeats 3] [--model digits] [--device cpu]

All requests are there from the start. `StableDiffusionPipeline` serves them one at a time, then in static batches (of
equal steps, as it needs), each with one thread and with one per core on a CPU; the runner serves them under three
policies. Variants take turns; printed are medians over repeats in images/s and their ratios to one at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from policies.registry import build_policy
from real_runner.engine import run_real
from real_runner.hardware import open_hardware
from synerdiff.core import Request
from synerdiff.device.lanes import available_cores
from synerdiff.profile.folder import find_profile, load_profile

STEPS, GUIDANCE, BATCH = (10, 15, 20, 25), 4.0, 8
POLICIES = ("dynamic", "continuous-serial", "continuous-parallel")


def pipeline_of(model: Any) -> Any:
    """diffusers' pipeline around the very modules that the runner uses."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    make: Any = StableDiffusionPipeline
    scheduler: Any = DDIMScheduler
    pipeline = make(
        vae=model.vae,
        text_encoder=None,
        tokenizer=None,
        unet=model.unet,
        scheduler=scheduler.from_config(model.solver._scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: Any, model: Any, requests: list[Request]) -> None:
    """One call of the pipeline for requests of equal steps."""
    conditions = [model.encode_prompt(model.prompts.default_prompt(r.request_id)) for r in requests]
    noise = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(r.request_id)) for r in requests]
    pipeline(
        prompt_embeds=torch.cat([c.tokens for c in conditions]),
        negative_prompt_embeds=torch.cat([c.unconditional_tokens for c in conditions]),
        latents=torch.cat(noise).to(model.device, model.dtype),
        num_inference_steps=requests[0].steps,
        guidance_scale=GUIDANCE,
        height=model.height,
        width=model.width,
    )


def batches_of(requests: list[Request]) -> list[list[Request]]:
    """Static batches: requests of equal steps, at most BATCH together."""
    by_steps: dict[int, list[Request]] = {}
    for request in requests:
        by_steps.setdefault(request.steps, []).append(request)
    return [group[i : i + BATCH] for group in by_steps.values() for i in range(0, len(group), BATCH)]


def timed(function: Callable[[], None], threads: int) -> float:
    """Seconds of one call with that many intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        since = time.monotonic()
        function()
        return time.monotonic() - since
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", default="digits-cpu")
    options = parser.parse_args()
    profile = load_profile(find_profile(options.profile))
    requests = [Request(i, 0, STEPS[i % len(STEPS)], guidance_scale=GUIDANCE) for i in range(options.requests)]
    cores = len(available_cores()) if options.device == "cpu" else 1
    times: dict[str, list[float]] = {}
    with open_hardware(options.model, options.device, profile) as hardware:
        pipeline = pipeline_of(hardware.model)
        call(pipeline, hardware.model, requests[:1])

        def in_turn(batches: list[list[Request]]) -> None:
            for batch in batches:
                call(pipeline, hardware.model, batch)

        def under(policy: str) -> None:
            run = run_real(requests, build_policy(policy), profile, hardware)
            if run.error is not None or run.faults:
                raise SystemExit(f"{policy}: {run.error or run.faults[0]}")

        variants: list[tuple[str, Callable[[], None], int]] = []
        for threads in sorted({1, cores}):
            label = f"{threads} thread{'s' if threads > 1 else ''}"
            one, several = partial(in_turn, [[r] for r in requests]), partial(in_turn, batches_of(requests))
            variants.append((f"diffusers, one at a time, {label}", one, threads))
            variants.append((f"diffusers, static batches of {BATCH}, {label}", several, threads))
        for policy in POLICIES:
            run_real(requests[:2], build_policy(policy), profile, hardware)
            variants.append((f"runner, {policy}", partial(under, policy), 1))
        for _ in range(options.repeats):
            for name, serve, threads in variants:
                times.setdefault(name, []).append(timed(serve, threads))
    base = max(options.requests / median(times_s) for name, times_s in times.items() if "one at a time" in name)
    print(
        f"{options.model} on {options.device}, {options.requests} requests of {STEPS} steps, {options.repeats} repeats"
    )
    for name, times_s in times.items():
        rate = options.requests / median(times_s)
        low, high = options.requests / max(times_s), options.requests / min(times_s)
        print(f"  {name:<46} {rate:7.2f} images/s  ({low:.2f} to {high:.2f})  x {rate / base:.2f}")


if __name__ == "__main__":
    main()
