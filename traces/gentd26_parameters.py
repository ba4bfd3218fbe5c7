"""The parameters fitted to GenTD26 that ship with synerdiff (``data/gentd26.yaml``). They are not its data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from synerdiff.files import read_yaml

PARAMETER_FILE = Path(__file__).resolve().parent / "data" / "gentd26.yaml"


@dataclass(frozen=True)
class Gentd26Parameters:
    """How each is fitted: ``tools/fit_gentd26.py``. Shares sum to 1 but for rounding."""

    rate_per_s: float
    """Requests per second over the whole span."""
    hour_profile: tuple[float, ...]
    """Relative rate of session starts in each hour of the day, mean 1."""
    day_levels: tuple[float, ...]
    """Relative number of session starts of each whole day, mean 1."""
    hour_noise_cv2: float
    """Squared coefficient of variation of an hour's rate around day level times hour profile."""
    session_requests: dict[int, float]
    """Share of sessions by number of requests."""
    gap_log_mean: float
    gap_log_sd: float
    gap_cap_s: float
    """Gaps inside a session: lognormal, at most this long (a longer pause starts a new session)."""
    steps_images: dict[tuple[int, int], float]
    """Share of requests by (steps, images)."""
    repeat_steps_images: float
    """Probability that a request of a session takes over the steps and images of the one before."""
    lora_counts: dict[int, float]
    lora_scales: dict[float, float]
    lora_ids: int
    lora_zipf_s: float
    lora_zipf_q: float
    """Popularity of the k-th LoRA (from 1) is proportional to 1 / (k + q)^s (Zipf-Mandelbrot)."""
    repeat_loras: float
    """Probability that a request of a session takes over the LoRAs of the one before."""

    @property
    def requests_per_session(self) -> float:
        """Mean number of requests of a session."""
        return sum(n * share for n, share in self.session_requests.items()) / sum(self.session_requests.values())


@cache
def gentd26_parameters() -> Gentd26Parameters:
    """Read the shipped parameters once."""
    return from_mapping(read_yaml(PARAMETER_FILE, "parameter file"))


def from_mapping(data: dict[str, Any]) -> Gentd26Parameters:
    """The parameters from the fields of ``gentd26.yaml``."""
    sessions, adapters, mix = data["sessions"], data["loras"], data["mix"]
    return Gentd26Parameters(
        rate_per_s=data["rate_per_s"],
        hour_profile=tuple(data["hour_profile"]),
        day_levels=tuple(data["day_levels"]),
        hour_noise_cv2=data["hour_noise_cv2"],
        session_requests={int(n): share for n, share in sessions["requests"].items()},
        gap_log_mean=sessions["gap_log_mean"],
        gap_log_sd=sessions["gap_log_sd"],
        gap_cap_s=sessions["gap_cap_s"],
        steps_images={
            (int(steps), int(images)): share
            for key, share in mix["steps_images"].items()
            for steps, images in [key.split("x")]
        },
        repeat_steps_images=mix["repeat"],
        lora_counts={int(n): share for n, share in adapters["per_request"].items()},
        lora_scales={float(scale): share for scale, share in adapters["scales"].items()},
        lora_ids=adapters["ids"],
        lora_zipf_s=adapters["zipf_s"],
        lora_zipf_q=adapters["zipf_q"],
        repeat_loras=adapters["repeat"],
    )
