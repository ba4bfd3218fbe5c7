"""Generates traces from a validated description: same description, same requests."""

from __future__ import annotations

from typing import Any

import numpy as np

from synerdiff.core import NS_PER_S, InputError, Request
from traces.arrivals import mmpp_arrivals, renewal_arrivals
from traces.columns import MAX_ARRIVAL_S
from traces.gentd26_parameters import gentd26_parameters
from traces.mixes import draw_loras, draw_steps_images
from traces.sessions import session_arrivals
from traces.spec import TraceSpec, trace_spec


def generate(kind: str, **fields: Any) -> list[Request]:
    """The requests of ``TraceSpec(kind=kind, **fields)``, e.g. ``generate("poisson", requests=100, rate_per_s=2.0)``.

    Raises InputError for fields that do not fit.
    """
    return generate_trace(trace_spec({"kind": kind, **fields}, "generated trace"))


def generate_trace(spec: TraceSpec) -> list[Request]:
    """The requests that the description stands for.

    Arrivals, mix and LoRAs have random streams of their own, so that another mix leaves the arrivals as they are.
    """
    arrivals_rng, mix_rng, loras_rng = (
        np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(spec.seed).spawn(3)
    )
    fitted = gentd26_parameters()
    if spec.kind == "gentd26-like":
        times_s, sessions = session_arrivals(arrivals_rng, spec, fitted)
    else:
        times_s = (mmpp_arrivals if spec.kind == "mmpp" else renewal_arrivals)(arrivals_rng, spec)
        sessions = np.arange(len(times_s))  # nobody comes back: every request is its own session
    if times_s[-1] > MAX_ARRIVAL_S:
        raise InputError(
            f"The last request would arrive after {MAX_ARRIVAL_S} s; give fewer requests or a higher rate."
        )
    steps, images, guidance_scale = draw_steps_images(mix_rng, spec, fitted, sessions)
    loras = draw_loras(loras_rng, fitted, sessions) if spec.with_loras else [()] * len(times_s)
    arrivals_ns = np.rint(times_s * NS_PER_S).astype(np.int64).tolist()
    columns = zip(arrivals_ns, steps.tolist(), images.tolist(), loras, strict=True)
    return [
        Request(index, arrival_ns, step_count, image_count, guidance_scale, loras=names)
        for index, (arrival_ns, step_count, image_count, names) in enumerate(columns)
    ]
