"""What travels between the stages of a model: bytes of its latents and of its prompt embeddings, at 16 bits."""

from __future__ import annotations

from typing import NamedTuple

from synerdiff.core import InputError
from synerdiff.profile.tables import Profile

BYTES = 2
"""Of an element."""
LATENT_SIDE = 8
"""Pixels of an image a pixel of its latents, each way."""


class Carried(NamedTuple):
    """Elements that the public diffusers configurations hand from stage to stage."""

    channels: int
    """Of the latents."""
    embedding: int
    """Of one prompt: tokens x channels, and what is pooled."""


CARRIED = {
    "sd15": Carried(4, 77 * 768),
    "sdxl": Carried(4, 77 * 2048 + 1280),
    "flux.1-dev": Carried(16, 512 * 4096 + 768),
    "flux.1-schnell": Carried(16, 256 * 4096 + 768),
}


def carried(profile: Profile, given: dict[str, int | None]) -> tuple[int, int]:
    """(bytes of an image's latents at the profile's first resolution, of one prompt's embedding).

    What is ``given`` (``latent_bytes``, ``embedding_bytes``) counts; InputError for a model that is not known.
    """
    known = CARRIED.get(profile.head.model.lower().rpartition("/")[2])
    latents = embedding = None
    if known is not None:
        height, width = profile.head.size or (0, 0)
        latents = known.channels * (height // LATENT_SIDE) * (width // LATENT_SIDE) * BYTES or None
        embedding = known.embedding * BYTES
    found = {"latent_bytes": latents, "embedding_bytes": embedding}
    found |= {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        if value is None:
            raise InputError(
                f"stages.{name} is missing, and the model '{profile.head.model}' of profile '{profile.name}' is none "
                f"whose sizes are known ({', '.join(CARRIED)})."
            )
    return found["latent_bytes"] or 0, found["embedding_bytes"] or 0
