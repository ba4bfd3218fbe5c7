"""The operator's question: which fleet keeps an SLO on a workload. Its file (YAML) holds the same as the command's
options; an unknown field is an error that lists the known ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from synerdiff.config.cluster import LinkSpeed, NamedRouter, RouterEntry
from synerdiff.config.experiment import (
    LEAST_SLO_S,
    MOST_SLO_S,
    Axis,
    Count,
    Name,
    PolicyEntry,
    PolicyOrFile,
    Seed,
    SkipBudgetSection,
    Workload,
    with_policy_files,
)
from synerdiff.files import read_yaml, shown
from synerdiff.schema import Listed, Section, validated

MOST_GPUS = 1024
DEFAULT_POLICY = "auto"
StageLayout = Literal["together", "decode", "encode", "both"]
"""What has GPUs of its own: nothing, the decoders, the text encoders, or both."""
Price = Annotated[float, Field(gt=0, le=1e6)]
_LATENCY = re.compile(r"p(\d{1,2}(?:\.\d+)?)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s|min)", re.ASCII)
_GOODPUT = re.compile(r"goodput\s*=\s*(\d+(?:\.\d+)?)\s*(%?)", re.ASCII)
_GPUS = re.compile(r"(\d{1,5})(?:\.\.(\d{1,5}))?", re.ASCII)
_UNITS_S = {"ms": 1e-3, "s": 1.0, "min": 60.0}


class Target(NamedTuple):
    """What is to be kept: a percentile of latency at most ``bound`` seconds, or a share of requests (goodput) at least
    ``bound``."""

    quantile: float | None
    """0.99 for P99; None: goodput."""
    bound: float

    @property
    def name(self) -> str:
        return "goodput" if self.quantile is None else f"P{100 * self.quantile:g}"

    def holds(self, value: float) -> bool:
        """Whether a value of the metric keeps the SLO."""
        return value >= self.bound if self.quantile is None else value <= self.bound

    def text(self, value: float) -> str:
        """A value of the metric, for people."""
        if value == float("inf"):
            return "unbounded"
        return f"{value:.2%}" if self.quantile is None else f"{value:.3g} s"


def target_of(text: str) -> Target:
    """``p99=10s`` or ``goodput=0.99``; ValueError says what is allowed."""
    latency, goodput = _LATENCY.fullmatch(text.strip().lower()), _GOODPUT.fullmatch(text.strip().lower())
    if latency and float(latency[1]) > 0:
        quantile, bound_s = round(float(latency[1]) / 100, 9), float(latency[2]) * _UNITS_S[latency[3]]
        if not 0 < quantile < 1 or not LEAST_SLO_S <= bound_s <= MOST_SLO_S:
            raise ValueError(
                f"'{shown(text)}' is no SLO: a percentile lies between 0 and 100, to 7 decimals, a latency limit is "
                f"{LEAST_SLO_S:g} to {MOST_SLO_S:g} s, as p99=10s"
            )
        return Target(quantile, bound_s)
    if goodput:
        share = float(goodput[1]) / (100 if goodput[2] else 1)
        if 0 < share <= 1:
            return Target(None, share)
    raise ValueError(f"'{shown(text)}' is no SLO; allowed are a percentile, as p99=10s, and goodput, as goodput=0.99")


class Question(Section):
    """Which fleet keeps the SLO: the fewest GPUs of each profile under each policy, or the highest rate of one."""

    name: Name = "capacity"
    profiles: Axis[str] = Field(min_length=1)
    workload: Workload
    policies: Listed[PolicyOrFile] = Field(default=(PolicyEntry(policy=DEFAULT_POLICY),), min_length=1)
    slo: str
    slo_seconds: float | None = Field(default=None, ge=LEAST_SLO_S, le=MOST_SLO_S)
    """goodput: the latency limit of a request without one of its own; without it 3 times its latency alone."""
    gpus: int | str = "1..32"
    find: Literal["gpus", "rate"] = "gpus"
    prices: dict[str, Price] = {}
    """Per GPU-hour, by profile or by the first words of its name: ``h100`` is the price of ``h100-sdxl-estimated``."""
    stages: Axis[StageLayout] = Field(default=("together",), min_length=1)
    link: LinkSpeed = LinkSpeed()
    """Between stages that are apart."""
    mixed: bool = False
    """Also fleets of two of the profiles, where they are cheaper."""
    router: NamedRouter = RouterEntry(kind="shortest-queue")
    seeds: Axis[Seed] = Field(default=tuple(range(1, 11)), min_length=1)
    """Of a generated workload; the first half chooses, the other half judges."""
    requests: Count = 1000
    skip_budget: SkipBudgetSection = SkipBudgetSection()
    rate_within: float = Field(default=0.02, ge=0.001, le=0.5)
    """find rate: how close the rate that keeps the SLO and the one that does not are to be."""
    jobs: int | None = Field(default=None, ge=1, le=4096)

    @field_validator("slo")
    @classmethod
    def _is_a_target(cls, value: str) -> str:
        target_of(value)
        return value

    @property
    def target(self) -> Target:
        """The SLO as read; InputError on what is none."""
        return target_of(self.slo)

    @property
    def fleet_sizes(self) -> tuple[int, int]:
        """The fewest and the most GPUs to look at."""
        match = _GPUS.fullmatch(str(self.gpus).strip())
        low, high = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
        if not 1 <= low <= high <= MOST_GPUS:
            raise ValueError(
                f"gpus is '{self.gpus}'; a number from 1 to {MOST_GPUS} or a range of them, as 1..32, is needed"
            )
        return low, high

    @model_validator(mode="after")
    def _fits(self) -> Question:
        low, high = self.fleet_sizes
        if self.find == "rate" and low != high:
            raise ValueError(f"gpus is '{self.gpus}'; to find the highest rate one number of GPUs is needed, as 4")
        if self.stages != ("together",) and self.link.gb_per_s is None:
            raise ValueError("stages apart need link.gb_per_s (--link), how fast the link between them is")
        if self.mixed and (self.find != "gpus" or len([p for p in self.profiles if self.price(p)]) < 2):
            raise ValueError(
                "mixed looks for the cheapest fleet of two cards: it needs prices of two profiles, and find gpus"
            )
        if self.slo_seconds is not None and self.target.quantile is not None:
            raise ValueError(f"slo_seconds is the limit that goodput counts; '{self.slo}' has its own")
        for name in self.prices:
            if not any(_named(name, profile) for profile in self.profiles):
                raise ValueError(f"prices: '{name}' is none of the profiles {', '.join(self.profiles)}")
        if len(set(self.profiles)) < len(self.profiles) or len({own.name for own in self.policies}) < len(
            self.policies
        ):
            raise ValueError("two profiles or two policies are the same (give the policies labels)")
        if len(set(self.stages)) < len(self.stages):
            raise ValueError("stages names a layout twice")
        return self

    def price(self, profile: str) -> float | None:
        """Of one GPU-hour; the longest name that fits counts."""
        names = [name for name in self.prices if _named(name, profile)]
        return self.prices[max(names, key=len)] if names else None


def _named(name: str, profile: str) -> bool:
    own = Path(profile).name
    return name in (profile, own) or own.startswith(name + "-")


def load_question(path: Path) -> Question:
    """Read a capacity file; InputError names the file and the field that is wrong."""
    return validated(Question, with_policy_files(read_yaml(path, "capacity file"), path.parent), str(path))
