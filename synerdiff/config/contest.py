"""A contest file (``experiments/*.yaml``): which policies are compared in which cells, as validated, frozen models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from synerdiff.config.experiment import (
    Batch,
    Count,
    Experiment,
    Load,
    Name,
    PolicyEntry,
    Seed,
    SkipBudgetSection,
    Workload,
)
from synerdiff.files import read_yaml
from synerdiff.schema import Listed, Section, validated

Factor = Annotated[float, Field(ge=0, le=100)]
Lanes = Listed[Annotated[int, Field(ge=0, le=63)]]
Report = Literal["winners", "headline", "ablation"]


class Machines(Section):
    """Profiles x contention (factor on every slowdown's excess over 1) x decode share (factor on the decode's time) x
    decode lanes (the GPU of each)."""

    profiles: Listed[str] = Field(min_length=1)
    contention: Listed[Factor] = Field(default=(1.0,), min_length=1)
    decode_share: Listed[Factor] = Field(default=(1.0,), min_length=1)
    decode_gpus: Listed[Lanes] = Field(default=((0,),), min_length=1)


class Contest(Section):
    """Policies compared in cells: machines x workloads.

    In every cell each policy is measured at saturation and at each load, each time at its own best batch size, on the
    same requests as every other.
    """

    name: Name
    machines: Listed[Machines] = Field(min_length=1)
    workloads: Listed[Workload] = Field(min_length=1)
    policies: Listed[PolicyEntry] = Field(min_length=1)
    baselines: Listed[str] = Field(min_length=1)
    loads: Listed[Load] = Field(default=(0.8,), min_length=1)
    seeds: Listed[Seed] = Field(default=(1, 2, 3), min_length=1)
    requests: Count = 300
    saturation_images: Count = 400
    batches: Listed[Batch] = Field(default=(4, 8, 16, 32), min_length=1)
    search_requests: Count = 200
    skip_budget: SkipBudgetSection = SkipBudgetSection()
    slo_multiple: float | None = Field(default=None, gt=0, le=1e6)
    report: Report
    focus: str | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> Contest:
        names = [entry.name for entry in self.policies]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two policies (give labels) are both '{name}'")
        for name in self.baselines:
            if name not in names:
                raise ValueError(f"the baseline '{name}' is none of the policies: {', '.join(names)}")
        if self.focus is not None and self.focus not in names:
            raise ValueError(f"focus is '{self.focus}', none of the policies: {', '.join(names)}")
        for entry in self.policies:
            if entry.batch is not None:
                raise ValueError(f"policy '{entry.name}': a contest searches the batch size, so batch cannot be given")
        if self.skip_budget.min_ssim is not None:
            raise ValueError("skip_budget: min_ssim belongs to a sweep; a contest takes fraction and its companions")
        return self

    @property
    def experiment(self) -> Experiment:
        """What the sources of requests need to know, in their own words."""
        return Experiment.model_validate(
            {
                "name": self.name,
                "profiles": ["any"],
                "workloads": [workload.model_dump() for workload in self.workloads],
                "policies": [{"policy": "continuous-serial"}],
                "seeds": self.seeds,
                "requests": self.requests,
                "batch_search": {"requests": self.search_requests},
            }
        )


def load_contest(path: Path) -> Contest:
    """Read a contest file; InputError names the file and the path of the field that is wrong."""
    return validated(Contest, read_yaml(path, "contest file"), str(path))
