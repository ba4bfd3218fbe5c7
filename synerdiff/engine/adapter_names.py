"""How a trace names adapters: ``FILE@SCALE`` for a LoRA, ``NAME@SCALE=IMAGE`` for a ControlNet; only the name must be.

A scale that is left out is 1. IMAGE is the file of the conditioning image; left out, it is ``SEED.png`` of the request.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from synerdiff.core import InputError, Request


class LoraUse(NamedTuple):
    """A LoRA's file (its name without ending) and the scale at which a request wants it."""

    file: str
    scale: float


class ControlNetUse(NamedTuple):
    """A ControlNet, its conditioning scale, and the conditioning image's file, empty when the request names none."""

    name: str
    scale: float
    image: str


def lora_use(entry: str) -> LoraUse:
    """Parse one entry of a trace's ``loras``; InputError for a scale that is no finite number or an empty name."""
    return LoraUse(*_scaled(entry, entry, "LoRA"))


def controlnet_use(entry: str) -> ControlNetUse:
    """Parse one entry of a trace's ``controlnets``; InputError as `lora_use`."""
    named, _, image = entry.partition("=")
    return ControlNetUse(*_scaled(named, entry, "ControlNet"), image)


def controlnet_name(entry: str) -> str:
    """The ControlNet that an entry asks for, whatever its scale and image."""
    return entry.partition("=")[0].partition("@")[0]


def require_each_once(request: Request) -> None:
    """InputError when a request asks for a LoRA's file or for a ControlNet twice, at whatever scales."""
    files = [entry.partition("@")[0] for entry in request.loras]
    names = [controlnet_name(entry) for entry in request.controlnets]
    for what, found, entries in (("LoRA", files, request.loras), ("ControlNet", names, request.controlnets)):
        if len(set(found)) < len(found):
            raise InputError(f"request {request.request_id} asks for a {what} twice ({';'.join(entries)}).")


def _scaled(text: str, entry: str, what: str) -> tuple[str, float]:
    name, separator, number = text.partition("@")
    if not name:
        raise InputError(f"a request asks for the {what} '{entry}', which has no name.")
    if not separator:
        return name, 1.0
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"a request asks for the {what} '{entry}'; after the @ a number is needed.")
    return name, scale
