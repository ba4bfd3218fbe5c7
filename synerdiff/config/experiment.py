"""An experiment file (``experiments.yaml``) as validated, frozen models. The fields are described in
``docs/file-formats.md``; an unknown field is an error that lists the known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from synerdiff.core import PPM, Mode, SkipBudget
from synerdiff.files import read_yaml, shown
from synerdiff.schema import Listed, Section, validated

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Load = Annotated[float, Field(gt=0, le=10)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Batch = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]

Figure = Literal["latency-load", "comparison", "throughput-load", "tradeoff", "stages", "lanes", "backlog"]
FIGURES: tuple[Figure, ...] = get_args(Figure)


class SkipBudgetSection(Section):
    """How many steps of an image may run without guidance: the fields of ``core.SkipBudget``, or a floor on fidelity.

    ``min_ssim`` is looked up in the fidelity table of the folder ``fidelity`` (relative to the experiment's file; by
    default beside each profile, else the one of its model).
    """

    fraction: float = Field(default=0.0, ge=0, le=1)
    warmup_steps: int = Field(default=3, ge=0, le=10_000)
    longest_run: int = Field(default=1, ge=1, le=10_000)
    mode: Literal["reuse", "conditional"] = "reuse"
    min_ssim: float | None = Field(default=None, gt=0, lt=1)
    fidelity: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> SkipBudgetSection:
        if self.min_ssim is None and self.fidelity is not None:
            raise ValueError("fidelity names the table that min_ssim looks up; min_ssim is missing")
        parts = self.model_fields_set - {"min_ssim", "fidelity"}
        if self.min_ssim is not None and parts:
            raise ValueError(f"min_ssim chooses which steps may be skipped, so it excludes {', '.join(sorted(parts))}")
        return self

    @property
    def budget(self) -> SkipBudget:
        """The budget by its parts; a floor is looked up where the requests are known."""
        return SkipBudget(round(self.fraction * PPM), self.warmup_steps, self.longest_run, Mode(self.mode))


class Window(Section):
    """A part of a trace, in seconds of the trace as it is written, the end excluded."""

    start_s: float = Field(ge=0)
    end_s: float = Field(gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> Window:
        if self.end_s <= self.start_s:
            raise ValueError(f"end_s is {self.end_s:g}; it must lie after start_s, {self.start_s:g}")
        return self


class Workload(Section):
    """Where requests come from: a generator (one replicate per seed) or a trace file (one replicate per window)."""

    name: Name
    generator: str | None = None
    parameters: dict[str, Any] = {}
    trace: str | None = None
    format: Literal["native", "gentd26"] = "native"
    windows: Listed[Window] = ()
    requests: Count | None = None
    loads: Listed[Load] | None = Field(default=None, min_length=1)
    seeds: Listed[Seed] | None = Field(default=None, min_length=1)
    backlog: bool = False
    batch_from: Name | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Workload:
        if (self.generator is None) == (self.trace is None):
            raise ValueError("exactly one of generator and trace is needed")
        if self.generator is not None and self.windows:
            raise ValueError("windows belong to a trace; a generator takes requests and seeds")
        if self.trace is not None and self.seeds:
            raise ValueError("seeds belong to a generator; a trace takes windows")
        return self


class PolicyEntry(Section):
    """A policy at one set of parameters; ``batch`` is a size, a list of sizes to search, or ``best``.

    With ``steps_scale`` below 1 its requests take that share of their steps, rounded, all with full guidance: the
    rival of every policy that skips. ``skip`` false: guidance may not be skipped.
    """

    policy: str
    label: str | None = Field(default=None, min_length=1, max_length=80)
    parameters: dict[str, Any] = {}
    batch: Batch | Literal["best"] | Listed[Batch] | None = None
    steps_scale: float = Field(default=1.0, gt=0, le=1)
    skip: bool = True

    @field_validator("batch", mode="wrap")
    @classmethod
    def _a_batch(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:  # one for each of the four forms, none of them helpful
            allowed = "allowed are a size of 1 to 4096, a list of sizes, or best"
            raise ValueError(f"{shown(repr(value))} is not a batch size; {allowed}") from None

    @model_validator(mode="after")
    def _one_batch(self) -> PolicyEntry:
        if self.batch == ():
            raise ValueError("batch is an empty list; allowed are a size, a list of sizes, or best")
        if self.batch is not None and "batch" in self.parameters:
            raise ValueError("batch is given twice: beside parameters and inside them")
        return self

    @property
    def name(self) -> str:
        return self.label or self.policy

    @property
    def may_skip(self) -> bool:
        return self.skip and self.steps_scale == 1

    @property
    def searched(self) -> bool:
        return self.batch == "best" or isinstance(self.batch, tuple)


class BatchSearch(Section):
    """How a policy's best batch size is found: the least mean latency at the nearest searched load."""

    batches: Listed[Batch] = Field(default=(1, 2, 4, 8, 16), min_length=1)
    loads: Listed[Load] = Field(default=(0.6, 0.9), min_length=1)
    seed: Seed = 0
    requests: Count = 400


class Slo(Section):
    """A request is good when it ends within ``solo_multiple`` times its latency alone, or within ``seconds``."""

    solo_multiple: float | None = Field(default=None, gt=0, le=1e6)
    seconds: float | None = Field(default=None, gt=0, le=1e9)

    @model_validator(mode="after")
    def _one_limit(self) -> Slo:
        if (self.solo_multiple is None) == (self.seconds is None):
            raise ValueError("exactly one of solo_multiple and seconds is needed")
        return self


class Experiment(Section):
    """One experiment: the grid profile x workload x policy x load x replicate."""

    name: Name
    profiles: Listed[str] = Field(min_length=1)
    workloads: Listed[Workload] = Field(min_length=1)
    policies: Listed[PolicyEntry] = Field(min_length=1)
    loads: Listed[Load] = Field(default=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0), min_length=1)
    seeds: Listed[Seed] = Field(default=(1, 2, 3), min_length=1)
    requests: Count = 1000
    batch_search: BatchSearch = BatchSearch()
    skip_budget: SkipBudgetSection = SkipBudgetSection()
    slo: Slo | None = None
    dispersion: bool = False
    decode_gpus: Listed[Annotated[int, Field(ge=0, le=63)]] = Field(default=(0,), min_length=1)
    jobs: int | None = Field(default=None, ge=1, le=4096)
    figures: Listed[Figure] = FIGURES
    baseline: str | None = None
    """The policy that the others are compared with, by its name here; by default ``reference`` chooses."""

    @model_validator(mode="after")
    def _names_differ(self) -> Experiment:
        lists: dict[str, list[Any]] = {
            "workloads": [workload.name for workload in self.workloads],
            "policies (give labels)": [entry.name for entry in self.policies],
            "profiles": list(self.profiles),
            "loads": list(self.loads),
            "seeds": list(self.seeds),
        }
        for what, names in lists.items():
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"two {what} are both '{name}'")
        policies = lists["policies (give labels)"]
        if self.baseline is not None and self.baseline not in policies:
            raise ValueError(f"baseline is '{self.baseline}'; allowed are {', '.join(policies)}")
        known = [workload.name for workload in self.workloads if workload.batch_from is None]
        for workload in self.workloads:
            if workload.batch_from is not None and workload.batch_from not in known:
                raise ValueError(
                    f"workload '{workload.name}': batch_from is '{workload.batch_from}'; allowed are {', '.join(known)}"
                )
        return self

    @property
    def reference(self) -> str:
        """The baseline; unless it is named ``continuous-serial``, else the first policy."""
        names = [entry.name for entry in self.policies]
        return self.baseline or ("continuous-serial" if "continuous-serial" in names else names[0])


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file; InputError names the file and the path of the field that is wrong."""
    return validated(Experiment, read_yaml(path, "sweep file"), str(path))
