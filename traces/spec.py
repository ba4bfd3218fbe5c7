"""What a generated trace is made of, validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from synerdiff.schema import Listed, Section, validated
from traces.columns import GUIDANCE_SCALE, IMAGES, SIDE_PIXELS, STEPS
from traces.gentd26_parameters import gentd26_parameters

MAX_REQUESTS = 2_000_000
Kind = Literal["poisson", "gamma", "mmpp", "gentd26-like", "mlperf"]
Mix = Literal["gentd26", "fixed", "guided-20-50", "unguided-4", "unguided-8", "shapes"]
Loras = Literal["none", "gentd26"]

Steps = Annotated[int, Field(ge=STEPS[0], le=STEPS[1])]
Images = Annotated[int, Field(ge=IMAGES[0], le=IMAGES[1])]
GuidanceScale = Annotated[float, Field(ge=GUIDANCE_SCALE[0], le=GUIDANCE_SCALE[1])]

_ONLY_FOR: dict[str, tuple[str, str]] = {
    "cv": ("kind", "gamma"),
    "burst_ratio": ("kind", "mmpp"),
    "burst_share": ("kind", "mmpp"),
    "burst_s": ("kind", "mmpp"),
    "min_requests": ("kind", "mlperf"),
    "steps": ("mix", "fixed"),
    "images": ("mix", "fixed"),
    "guidance_scale": ("mix", "fixed"),
}


class Shape(Section):
    """What a share of the requests asks for: one entry of vllm-omni's random requests."""

    weight: float = Field(default=1.0, gt=0, le=1e9)
    """How often it is drawn, relative to the others."""
    steps: Steps
    images: Images = 1
    guidance_scale: GuidanceScale = 7.5
    height: int | None = Field(default=None, ge=SIDE_PIXELS[0], le=SIDE_PIXELS[1])
    width: int | None = Field(default=None, ge=SIDE_PIXELS[0], le=SIDE_PIXELS[1])
    slo_s: float | None = Field(default=None, gt=0, le=1e9)
    prompt: str = ""
    negative_prompt: str = ""

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together")
        return self


class TraceSpec(Section):
    """A generated trace: how arrivals come (kind), how long, and what is asked for (mix, loras).

    Fields that belong to one kind or mix are refused with any other.
    """

    kind: Kind
    """poisson; gamma: a renewal process; mmpp: Poisson whose rate switches; gentd26-like: fitted to GenTD26;
    mlperf: the schedule that LoadGen of MLPerf Inference draws from this seed, to the nanosecond."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    requests: int | None = Field(default=None, ge=1, le=MAX_REQUESTS)
    """How many; either this or duration_s."""
    min_requests: int | None = Field(default=None, ge=0, le=MAX_REQUESTS)
    """mlperf: go on after duration_s until there are so many (default 0)."""
    duration_s: float | None = Field(default=None, gt=0, le=1e9)
    """Arrivals before this instant; how many is then random. mlperf: up to the first one at or past it."""
    rate_per_s: float | None = Field(default=None, gt=0, le=1e6)
    """Mean arrivals per second, in the long run (default 1; gentd26-like: that of GenTD26, 0.013483)."""
    cv: float | None = Field(default=None, ge=0.05, le=20)
    """gamma: standard deviation / mean of the gaps (default 2; 1 is Poisson)."""
    burst_ratio: float | None = Field(default=None, gt=1, le=10_000)
    """mmpp: rate in a burst / rate outside (default 5)."""
    burst_share: float | None = Field(default=None, ge=0.001, le=0.999)
    """mmpp: share of the time that bursts take (default 0.2)."""
    burst_s: float | None = Field(default=None, ge=0.001, le=1e9)
    """mmpp: mean length of a burst in seconds (default 60)."""
    mix: Mix | None = None
    """gentd26: its joint frequencies of steps and images, guidance 7.5; fixed: the next three fields;
    guided-20-50: 20 to 50 steps, evenly, guidance 7.5; unguided-4, unguided-8: 4 or 8 steps, guidance 1; all three
    with the numbers of images of GenTD26. Default: fixed for mlperf, else gentd26."""
    shapes: Listed[Shape] = Field(default=(), max_length=10_000)
    """shapes: what requests ask for, drawn by weight; given, they are the mix."""
    steps: Steps | None = None
    """fixed: default 30."""
    images: Images | None = None
    """fixed: default 1."""
    guidance_scale: GuidanceScale | None = None
    """fixed: default 7.5."""
    loras: Loras | None = None
    """none, or LoRAs as often and as popular as in GenTD26 (default for gentd26-like)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.requests is None) == (self.duration_s is None):
            raise ValueError("give either requests or duration_s")
        for name, (field, value) in _ONLY_FOR.items():
            chosen = self.asked if field == "mix" else self.kind
            if getattr(self, name) is not None and chosen != value:
                raise ValueError(f"{name} belongs to {field} '{value}', and {field} is '{chosen}'")
        if (self.asked == "shapes") != bool(self.shapes):
            raise ValueError("mix 'shapes' and the list shapes belong together")
        if self.kind == "mlperf" and (self.duration_s is None or self.rate_per_s is None):
            raise ValueError("kind 'mlperf' needs duration_s and rate_per_s")
        if self.duration_s is not None and self.mean_rate_per_s * self.duration_s > MAX_REQUESTS:
            raise ValueError(f"rate_per_s * duration_s exceeds {MAX_REQUESTS} requests, the most that is generated")
        length_s = self.duration_s or (self.requests or 0) / self.mean_rate_per_s
        if self.burst_s is not None and length_s / self.burst_s > MAX_REQUESTS:
            raise ValueError(f"burst_s is {self.burst_s:g}, so a trace of {length_s:g} s has too many bursts")
        return self

    @property
    def asked(self) -> Mix:
        """The mix, its default filled in."""
        return self.mix or ("shapes" if self.shapes else "fixed" if self.kind == "mlperf" else "gentd26")

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second over the whole trace."""
        if self.rate_per_s is not None:
            return self.rate_per_s
        return gentd26_parameters().rate_per_s if self.kind == "gentd26-like" else 1.0

    @property
    def with_loras(self) -> bool:
        """Whether its requests ask for LoRAs."""
        return self.loras == "gentd26" or (self.loras is None and self.kind == "gentd26-like")


def trace_spec(fields: Mapping[str, Any], where: str) -> TraceSpec:
    """Validate; InputError is one sentence that starts with ``where`` and tells what is allowed."""
    return validated(TraceSpec, dict(fields), where)
