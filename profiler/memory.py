"""What a model, a batch and one decode need of a card's memory at the least.

Counted: all weights, what a step keeps until its last layer (the tensors that skip from the way down to the way up) and
the input and output of its largest operation, for every row, and the largest operation of one decode, which may run
beside. Left out: workspaces, CUDA graphs, fragmentation, the context. So what does not fit is refused, and what fits
here may still not fit there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from profiler.datasheets import GPUS, MODELS
from profiler.operations import Operation, architecture, decoder, text_encoders, total, unet
from synerdiff.core import InputError
from synerdiff.profile.tables import Profile

EXECUTION = "compiled"
"""The operations that are counted; others hold as much."""


def card_bytes(gpu: str) -> int | None:
    """Memory of a card of the data sheets, as its title names it (1 GB = 10^9 bytes); None for others."""
    title = re.search(r"(\d+) GB", GPUS[gpu].title) if gpu in GPUS else None
    return None if title is None else int(title[1]) * 10**9


def needed_bytes(profile: Profile, rows: int) -> tuple[int, int] | None:
    """(weights, activations of a step of so many rows and of one decode) in bytes; None for a model that is not counted
    here. Of several resolutions the largest counts."""
    model = profile.head.model
    if model not in MODELS or not profile.head.resolutions:
        return None
    item = 4 if profile.head.dtype == "float32" else 2
    text = text_encoders(MODELS[model].text_encoders, EXECUTION)
    steps = decodes = weights = 0
    for height, width in profile.head.resolutions:
        forward = unet(model, height, width, EXECUTION)
        decode = [pair for _, atom in decoder(model, height, width, EXECUTION) for pair in atom]
        weights = round(sum(total(listed)[2] for listed in (forward, decode, text)))
        steps = max(steps, _skipped(model, height, width) + _largest(forward))
        decodes = max(decodes, _largest(decode))
    return weights * item, (rows * steps + decodes) * item


def require_fits(profile: Profile, rows: int, what: str) -> None:
    """InputError when the profile's card does not hold its model, a step of so many rows and a decode."""
    memory, needed = card_bytes(profile.head.gpu), needed_bytes(profile, rows)
    if memory is None or needed is None or sum(needed) <= memory:
        return
    weights, activations = (size / 1e9 for size in needed)
    raise InputError(
        f"{what}: profile '{profile.name}' needs at least {weights + activations:.1f} GB for steps of {rows} rows "
        f"({profile.head.model}: {weights:.1f} GB of weights, {activations:.1f} of activations), and the card, "
        f"{GPUS[profile.head.gpu].title}, has {memory / 1e9:.0f}."
    )


def _largest(operations: Iterable[tuple[Operation, int]]) -> int:
    return round(max(operation.elements for operation, _ in operations))


def _skipped(model: str, height: int, width: int) -> int:
    """Elements of a row that skip from the UNet's way down to its way up."""
    config = architecture(model)["unet"]
    channels, pixels = config["block_out_channels"], (height // 8) * (width // 8)
    elements = channels[0] * pixels
    for block, size in enumerate(channels):
        elements += config["layers_per_block"] * size * pixels
        if block < len(channels) - 1:
            pixels //= 4
            elements += size * pixels
    return int(elements)
