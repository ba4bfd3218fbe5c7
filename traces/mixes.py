"""What requests ask for: steps, images, guidance and LoRAs, drawn with a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synerdiff.core import LoraUse
from traces.gentd26_parameters import Gentd26Parameters
from traces.spec import TraceSpec

Integers = NDArray[np.int64]
UNGUIDED_STEPS = {"unguided-4": 4, "unguided-8": 8}
GUIDED_RANGES = {"guided-20-50": (20, 50)}
"""Steps drawn evenly from a range, both ends included."""


def draw_steps_images(
    rng: np.random.Generator, spec: TraceSpec, fitted: Gentd26Parameters, sessions: Integers
) -> tuple[Integers, Integers, float]:
    """Steps and images of each request, and the guidance scale of all. ``sessions``: the session of each request.

    Within a session a request repeats the draw before it with the fitted probability, which leaves the frequencies
    as they are.
    """
    n = len(sessions)
    if spec.mix == "fixed":
        steps = 30 if spec.steps is None else spec.steps
        images = 1 if spec.images is None else spec.images
        return np.full(n, steps), np.full(n, images), 7.5 if spec.guidance_scale is None else spec.guidance_scale
    pairs = np.array(list(fitted.steps_images))
    drawn = _draw(rng, fitted.steps_images, n)[_source(rng, sessions, fitted.repeat_steps_images)]
    if spec.mix in UNGUIDED_STEPS:
        return np.full(n, UNGUIDED_STEPS[spec.mix]), pairs[drawn, 1], 1.0
    if spec.mix in GUIDED_RANGES:
        low, high = GUIDED_RANGES[spec.mix]
        return rng.integers(low, high, n, endpoint=True), pairs[drawn, 1], 7.5
    return pairs[drawn, 0], pairs[drawn, 1], 7.5


def draw_loras(
    rng: np.random.Generator, fitted: Gentd26Parameters, sessions: Integers
) -> Sequence[tuple[LoraUse, ...]]:
    """The LoRAs of each request: how many, which (the most popular is L0000), and at which scale, as fitted.

    A request names no LoRA twice. Within a session the LoRAs of the request before are repeated with the fitted
    probability.
    """
    counts = np.array(list(fitted.lora_counts))[_draw(rng, fitted.lora_counts, len(sessions))]
    ranks = np.arange(1, fitted.lora_ids + 1)
    popularity = np.cumsum((ranks + fitted.lora_zipf_q) ** -fitted.lora_zipf_s)
    scales = list(fitted.lora_scales)
    drawn: list[tuple[LoraUse, ...]] = [()] * len(sessions)
    for index in np.flatnonzero(counts):
        chosen: dict[int, float] = {}
        while len(chosen) < counts[index]:
            rank = int(np.searchsorted(popularity, rng.random() * popularity[-1]))
            chosen.setdefault(rank, scales[int(_draw(rng, fitted.lora_scales, 1)[0])])
        drawn[index] = tuple(LoraUse(f"L{rank:04d}", scale) for rank, scale in chosen.items())
    return [drawn[source] for source in _source(rng, sessions, fitted.repeat_loras)]


def _draw(rng: np.random.Generator, shares: Mapping[Any, float], n: int) -> Integers:
    """Indices into the keys, as often as their shares say."""
    cumulative = np.cumsum(list(shares.values()))
    drawn: Integers = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right").astype(np.int64)
    return drawn


def _source(rng: np.random.Generator, sessions: Integers, repeat: float) -> Integers:
    """Whose draw each request uses: its own, or with probability ``repeat`` that of its session's request before it."""
    by_session = np.argsort(sessions, kind="stable")
    grouped = sessions[by_session]
    fresh = rng.random(len(sessions)) >= repeat
    fresh[0] = True
    fresh[1:] |= grouped[1:] != grouped[:-1]
    position = np.maximum.accumulate(np.where(fresh, np.arange(len(sessions)), 0))
    source = np.empty(len(sessions), dtype=np.int64)
    source[by_session] = by_session[position]
    return source
