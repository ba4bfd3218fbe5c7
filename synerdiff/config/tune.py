"""What ``synerdiff tune`` searches: one policy's parameters, for an objective, on training seeds. Its file (YAML) is
described in ``docs/tune.md``; an unknown field is an error that lists the known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from synerdiff.config.experiment import (
    Axis,
    Count,
    Experiment,
    Load,
    Name,
    PolicyEntry,
    Seed,
    SkipBudgetSection,
    Slo,
    Workload,
    with_policy_files,
)
from synerdiff.files import read_yaml
from synerdiff.schema import Also, Section, sentence, validated

Objective = Literal["mean", "p99", "goodput", "throughput"]
Value = bool | int | float | str
BUDGET = "min_ssim"
"""The name under which the floor of the skip budget is searched."""


class Range(Section):
    """Values from ``low`` to ``high``, both included; ``log``: more of them near ``low``."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low must be less")
        return self


def _a_span(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            return Range.model_validate(value)
        except ValidationError as error:
            raise ValueError(sentence(error)) from None
    if isinstance(value, list | tuple) and value and all(isinstance(part, Value) for part in value):
        return tuple(value)
    raise ValueError("a list of values, or low and high (and log), is needed")


Span = Annotated[Range | tuple[Value, ...], BeforeValidator(_a_span)]


def _named(value: Any) -> Any:
    return {"policy": value} if isinstance(value, str) else value


class Tuning(Section):
    """Which parameters of which policy to search, for what, on what."""

    name: Name = "tune"
    profiles: Axis[str] = Field(min_length=1)
    workload: Workload
    policy: Annotated[PolicyEntry, BeforeValidator(_named), Also(lambda own: {"type": "string"})]
    """As it stands, the default that all is compared with."""
    search: dict[str, Span] | None = None
    """Parameter -> values; None: every parameter of the policy that has bounds, choices, or is the chunking."""
    objective: Objective = "mean"
    loads: Axis[Load] = Field(default=(0.8,), min_length=1)
    slo: Slo | None = None
    trials: int = Field(default=40, ge=1, le=10_000)
    seed: Seed = 0
    """Of the sampler."""
    seeds: Axis[Seed] = Field(default=(1, 2, 3, 4), min_length=1)
    judge_seeds: Axis[Seed] = Field(default=tuple(range(101, 109)), min_length=1)
    requests: Count = 1000
    min_ssim: float | None = Field(default=None, gt=0, lt=1)
    """Floor on image fidelity: the default may skip guidance down to it, and higher floors are searched."""
    fidelity: str | None = None
    jobs: int | None = Field(default=None, ge=1, le=4096)

    @model_validator(mode="after")
    def _fits(self) -> Tuning:
        if self.policy.searched:
            raise ValueError("policy: batch is the default's size; the sizes to try stand under search")
        if self.workload.loads or self.workload.seeds or self.workload.lora_share or self.workload.batch_from:
            raise ValueError("workload: loads, seeds, lora_share and batch_from have no place in a tune file")
        if both := set(self.seeds) & set(self.judge_seeds):
            raise ValueError(f"seed {min(both)} is in seeds and in judge_seeds; what chooses must not judge")
        if self.workload.generator is None and len(self.workload.windows) < 2:
            raise ValueError("workload: a trace needs two windows or more; the first half trains, the others judge")
        if self.min_ssim is None and self.fidelity is not None:
            raise ValueError("fidelity names the table that min_ssim looks up; min_ssim is missing")
        if self.min_ssim is not None and self.policy.skip_budget is not None:
            raise ValueError("min_ssim sets the policy's skip budget, so policy may not have one of its own")
        for name, span in (self.search or {}).items():
            if isinstance(span, tuple) and len(set(span)) < len(span):
                raise ValueError(f"search.{name} names a value twice")
        try:
            self.experiment((self.default,), (*self.seeds, *self.judge_seeds))
        except ValidationError as error:
            raise ValueError(sentence(error)) from None
        return self

    @property
    def default(self) -> PolicyEntry:
        """The policy as it stands, with the floor where there is one."""
        changes: dict[str, Any] = {"label": f"{self.policy.name}, default"}
        if self.min_ssim is not None:
            changes["skip_budget"] = self.budget(self.min_ssim)
        return self.policy.model_copy(update=changes)

    def budget(self, floor: float) -> SkipBudgetSection:
        """The skip budget that a floor on fidelity allows, by the table of the file."""
        return SkipBudgetSection(min_ssim=floor, fidelity=self.fidelity)

    def experiment(self, policies: tuple[PolicyEntry, ...], seeds: tuple[int, ...]) -> Experiment:
        """The grid of its runs under these policies."""
        return Experiment(
            name=self.name,
            profiles=self.profiles,
            workloads=(self.workload,),
            policies=policies,
            loads=self.loads,
            saturation=400 if self.objective == "throughput" else None,
            seeds=seeds,
            requests=self.requests,
            slo=self.slo,
            figures=(),
        )


def load_tuning(path: Path) -> Tuning:
    """Read a tune file; InputError names the file and the field that is wrong."""
    data = read_yaml(path, "tune file")
    return validated(Tuning, with_policy_files(data, path.parent), str(path))
