"""The embedded model on CPU lanes, and a profile that fits it, for tests of the runner."""

from __future__ import annotations

from typing import Any

from real_runner.hardware import Hardware, open_hardware
from synerdiff.profile.tables import Head, Profile
from tests.builders import affine_profile

CUTS = {"c4": [3, 6, 9]}


def digits_profile(**more: Any) -> Profile:
    """Times of about the right size; only a validation needs true ones."""
    profile = affine_profile(5, 1.5, 4, **more)
    profile.head = Head(model="digits", resolutions=((32, 32),), dtype="float32", cuts=CUTS)  # type: ignore[arg-type]
    return profile


def digits_hardware(profile: Profile | None = None, decode_lanes: int = 1) -> Hardware:
    return open_hardware("digits", "cpu", profile or digits_profile(), decode_lanes=decode_lanes)
