"""An experiment file (``experiments.yaml``) as validated, frozen models. The fields are described in
``docs/file-formats.md``; an unknown field is an error that lists the known ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from synerdiff.config.cluster import Degree, LinkSpeed, NamedRouter, RouterEntry, Stages
from synerdiff.core import PPM, Mode, SkipBudget
from synerdiff.files import read_yaml, shown
from synerdiff.schema import Also, Listed, Section, validated

_T = TypeVar("_T")
Axis = Annotated[
    Listed[_T],
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,)),
    Also(lambda own: own["items"]),
]
"""One value or a list of them: every one is a cell of the grid."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Load = Annotated[float, Field(ge=1e-6, le=10)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Batch = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]

Factor = Annotated[float, Field(ge=0, le=100)]
Lanes = Listed[Annotated[int, Field(ge=0, le=63)]]
Share = Annotated[float, Field(ge=0, le=1)]
Sizes = Batch | Literal["best"] | Listed[Batch] | None
Report = Literal["curves", "comparison", "map", "ablation", "adapters", "fleets"]
Figure = Literal[
    "latency-load", "comparison", "throughput-load", "tradeoff", "stages", "lanes", "backlog", "concurrency", "sizes"
]
SATURATION_IMAGES = 400
LEAST_SLO_S, MOST_SLO_S = 1e-6, 1e9
DEFAULT_BASELINE = "continuous-serial"
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
    format: Literal["auto", "gentd26"] = "auto"
    windows: Listed[Window] = ()
    lora_share: Axis[Share] = Field(default=(), max_length=100)
    """Generator adapters: share of the requests that ask for LoRAs."""
    requests: Count | None = None
    loads: Axis[Load] | None = Field(default=None, min_length=1)
    seeds: Axis[Seed] | None = Field(default=None, min_length=1)
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
        if (self.generator == "adapters") != bool(self.lora_share):
            raise ValueError("lora_share and the generator adapters belong together")
        return self


def _a_batch(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    allowed = "allowed are a size of 1 to 4096, a list of sizes, or best"
    if value == []:
        raise ValueError(f"it is an empty list; {allowed}")
    if isinstance(value, list) and any(value.count(size) > 1 for size in value):
        raise ValueError(f"{shown(repr(value))} names a size twice; {allowed}")
    try:
        return check(value)
    except ValidationError:  # one for each of the four forms, none of them helpful
        raise ValueError(f"{shown(repr(value))} is not a batch size; {allowed}") from None


class PolicyEntry(Section):
    """A policy at one set of parameters; ``batch`` is a size, a list of sizes to search, or ``best``.

    With ``steps_scale`` below 1 its requests take that share of their steps, rounded, all with full guidance: the
    equal-cost baseline of every policy that skips. ``skip`` false: guidance may not be skipped; ``skip_budget``: its
    own instead of the experiment's. ``folder``, relative to the file: where a ``module:Class`` is looked up (default:
    the file's).
    """

    policy: str
    label: str | None = Field(default=None, min_length=1, max_length=80)
    parameters: dict[str, Any] = {}
    batch: Sizes = None
    steps_scale: float = Field(default=1.0, ge=0.001, le=1)
    skip: bool = True
    skip_budget: SkipBudgetSection | None = None
    folder: str | None = None

    _a_batch = field_validator("batch", mode="wrap")(_a_batch)

    @model_validator(mode="after")
    def _one_batch(self) -> PolicyEntry:
        if self.batch is not None and "batch" in self.parameters:
            raise ValueError("batch is given twice: beside parameters and inside them")
        return self

    @property
    def name(self) -> str:
        return self.label or self.policy

    @property
    def may_skip(self) -> bool:
        """Whether the experiment's skip budget applies to it."""
        return self.skip and self.steps_scale == 1

    @property
    def searched(self) -> bool:
        """Whether its batch is searched for."""
        return self.batch == "best" or isinstance(self.batch, tuple)


PolicyOrFile = Annotated[PolicyEntry, Also(lambda own: {"type": "string", "pattern": r"\.ya?ml$"})]
"""In a file also the path of a policy file, which is read before the rest is checked."""


class BatchSearch(Section):
    """How a policy's best batch size is found: the least mean latency at the nearest searched load, and where all
    requests wait from the start the highest throughput. Ties go to the smaller size."""

    batches: Axis[Batch] = Field(default=(1, 2, 4, 8, 16), min_length=1)
    loads: Axis[Load] = Field(default=(0.6, 0.9), min_length=1)
    seed: Seed = 0
    requests: Count = 400


class Slo(Section):
    """A request is good when it ends within ``solo_multiple`` times its latency alone, or within ``seconds``."""

    solo_multiple: float | None = Field(default=None, ge=1e-6, le=1e6)
    seconds: float | None = Field(default=None, ge=LEAST_SLO_S, le=MOST_SLO_S)

    @model_validator(mode="after")
    def _one_limit(self) -> Slo:
        if (self.solo_multiple is None) == (self.seconds is None):
            raise ValueError("exactly one of solo_multiple and seconds is needed")
        return self


class Machines(Section):
    """Profiles x contention (factor on every slowdown's excess over 1) x decode share (factor on the decode's time) x
    decode lanes (the GPU of each)."""

    profiles: Axis[str] = ()
    contention: Axis[Factor] = Field(default=(1.0,), min_length=1)
    decode_share: Axis[Annotated[Factor, Field(gt=0)]] = Field(default=(1.0,), min_length=1)
    decode_gpus: Annotated[
        Listed[Lanes], BeforeValidator(lambda value: _lanes(value)), Also(lambda own: own["items"])
    ] = Field(default=((0,),), min_length=1)

    @model_validator(mode="after")
    def _lanes_are_named(self) -> Machines:
        if () in self.decode_gpus:
            raise ValueError("decode_gpus holds an empty list; name the GPU of each decode lane")
        return self


def _lanes(value: Any) -> Any:
    """``[0, 1]`` is one set of lanes, ``[[0], [1]]`` two."""
    nested = not isinstance(value, list | tuple) or not value or any(isinstance(part, list | tuple) for part in value)
    return value if nested else (value,)


def _images(value: Any) -> Any:
    return SATURATION_IMAGES if value is True else None if value is False else value


class Fleet(Section):
    """Workers behind a router, one fleet for every combination of what is a list:

    - ``gpus``: so many GPUs of the experiment's profile, divided between ``stages`` and workers of ``degree``;
    - ``kinds``: workers of several profiles, each a map from profile to how many;
    - ``cluster``: a cluster's file, or its fields;
    - ``strategies``: ``gpus`` divided between workers and ControlNet services for the highest throughput.
    """

    name: str = Field(min_length=1, max_length=80)
    gpus: Axis[Annotated[int, Field(ge=1, le=4096)]] = ()
    kinds: Axis[dict[str, Annotated[int, Field(ge=1, le=4096)]]] = ()
    degree: Axis[Degree] = Field(default=(1,), min_length=1)
    stages: Axis[Stages | None] = Field(default=(None,), min_length=1)
    link: LinkSpeed = LinkSpeed()
    cluster: str | dict[str, Any] | None = None
    strategies: Listed[Literal["service", "asynchronous", "two-gpus"]] | None = None
    lora_mib: float = Field(default=380, ge=1e-6, le=1e6)
    host_cache_mib: float = Field(default=0, ge=0, le=1e9)
    router: Axis[NamedRouter] = ()
    """Instead of the cluster's own."""

    @model_validator(mode="after")
    def _one_kind(self) -> Fleet:
        given = [name for name in ("cluster", "strategies") if getattr(self, name) is not None]
        given += ["kinds"] if self.kinds else []
        if len(given) > 1 or not (given or self.gpus):
            raise ValueError(
                f"fleet '{self.name}' needs exactly one of gpus, kinds, cluster and strategies (with gpus)"
            )
        if self.strategies is not None and (not self.gpus or min(self.gpus) < 4):
            raise ValueError(f"fleet '{self.name}': strategies divide gpus, at least 4 of them")
        if self.gpus and given not in ([], ["strategies"]):
            raise ValueError(f"fleet '{self.name}': gpus excludes {given[0]}, which has its own")
        if given and given != ["kinds"] and self.model_fields_set & {"degree", "stages", "link"}:
            raise ValueError(
                f"fleet '{self.name}': degree, stages and link belong to gpus and kinds; a cluster has its own"
            )
        if not self.strategies and not self.cluster and not self.each:
            raise ValueError(f"fleet '{self.name}': no number of GPUs can be divided by its degrees and stages")
        return self

    @property
    def each(self) -> list[Fleet]:
        """The fleets that its lists stand for, each with one cluster and at most one router.

        Numbers of GPUs that a degree or the stages do not fit are left out.
        """
        routers: list[tuple[RouterEntry, ...]] = [(router,) for router in self.router] or [()]
        if self.cluster is not None or self.strategies is not None:
            return [self._with(self.cluster, router=own, part=_of(routers, own)) for own in routers]
        fleets = []
        sizes: list[int | dict[str, int]] = [*self.gpus, *self.kinds]
        for size, degree, stages, own in product(sizes, self.degree, self.stages, routers):
            apart = 0 if stages is None else sum(pool.count for pool in stages.pools)
            if isinstance(size, dict):
                blocks = [{"profile": name, "count": count, "degree": degree} for name, count in size.items()]
            elif size - apart < degree or (size - apart) % degree:
                continue
            else:
                blocks = [{"count": (size - apart) // degree, "degree": degree}]
            cluster = {"workers": blocks, "link": self.link.model_dump(exclude_none=True)}
            if stages is not None:
                cluster["stages"] = stages.model_dump(exclude_none=True)
            parts = []
            if isinstance(size, dict) and len(self.kinds) > 1:
                parts.append(" + ".join(f"{count} {name}" for name, count in size.items()))
            parts += [f"degree {degree}"] if len(self.degree) > 1 else []
            if len(self.stages) > 1:
                pools = [] if stages is None else [("encode", stages.encode), ("decode", stages.decode)]
                parts.append(" ".join(f"{pool.count} {name}" for name, pool in pools if pool is not None) or "together")
            fleets.append(self._with(cluster, own, ", ".join([*parts, _of(routers, own)]).strip(", ")))
        return fleets

    def _with(self, cluster: Any, router: tuple[RouterEntry, ...], part: str) -> Fleet:
        alone = {"gpus": () if self.strategies is None else self.gpus, "kinds": (), "degree": (1,), "stages": (None,)}
        name = f"{self.name}, {part}" if part else self.name
        return self.model_copy(update={**alone, "name": name, "cluster": cluster, "router": router})


def _of(routers: Sequence[tuple[RouterEntry, ...]], own: tuple[RouterEntry, ...]) -> str:
    """What tells one of several routers."""
    if len(routers) < 2:
        return ""
    alone = [router[0].kind for router in routers].count(own[0].kind) == 1
    return " ".join([own[0].kind, *(() if alone else (f"{k} {v:g}" for k, v in own[0].parameters.items()))])


class Experiment(Machines):
    """One experiment: the grid machine (or fleet) x workload x policy x load x replicate, and how it is reported."""

    name: Name
    report: Report = "curves"
    machines: Listed[Machines] = ()
    """Blocks of machines, instead of profiles and what belongs to them."""
    fleets: Listed[Fleet] = ()
    workloads: Listed[Workload] = Field(min_length=1)
    policies: Listed[PolicyOrFile] = Field(min_length=1)
    batch: Sizes = None
    """Of every policy that has one and states none."""
    loads: Axis[Load] = Field(default=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0), min_length=1)
    max_concurrency: Axis[Annotated[int, Field(ge=1, le=1_000_000)]] = ()
    """Closed loops instead of loads: so many requests in the system, the next sent when one has ended."""
    saturation: Annotated[Count | None, BeforeValidator(_images), Also(lambda own: {"type": "boolean"})] = None
    """Also runs in which so many images (true: ``SATURATION_IMAGES``) wait from the start."""
    seeds: Axis[Seed] = Field(default=(1, 2, 3), min_length=1)
    requests: Count = 1000
    batch_search: BatchSearch = BatchSearch()
    skip_budget: SkipBudgetSection = SkipBudgetSection()
    slo: Slo | None = None
    dispersion: bool = False
    baselines: Axis[str] = ()
    """Policies (reports adapters and fleets: the fleet) that the others are compared with; curves take the first."""
    subject: str | None = None
    """map: the policy that is compared with the best of the others."""
    jobs: int | None = Field(default=None, ge=1, le=4096)
    figures: Listed[Figure] = FIGURES

    _a_batch = field_validator("batch", mode="wrap")(_a_batch)

    @property
    def blocks(self) -> tuple[Machines, ...]:
        """The machines that it runs on, one block after the other."""
        return self.machines or (self,)

    @property
    def compares_fleets(self) -> bool:
        """Whether fleets are compared, and not policies."""
        return self.report in ("adapters", "fleets")

    @property
    def each_fleet(self) -> list[Fleet]:
        """The fleets that ``fleets`` stand for."""
        return [own for fleet in self.fleets for own in fleet.each]

    @property
    def reference(self) -> str:
        """The first baseline; without any ``continuous-serial``, else the first policy."""
        names = self.policy_names
        return self.baselines[0] if self.baselines else DEFAULT_BASELINE if DEFAULT_BASELINE in names else names[0]

    def loads_of(self, workload: Workload) -> Sequence[float]:
        """Loads of a workload: its own, or the experiment's."""
        return workload.loads or self.loads

    @model_validator(mode="after")
    def _names_differ(self) -> Experiment:
        given = self.model_fields_set & set(Machines.model_fields)
        if self.machines and given:
            raise ValueError(f"machines holds the blocks of {', '.join(sorted(given))}, which cannot stand beside it")
        if not all(block.profiles for block in self.blocks):
            raise ValueError(
                "profiles is empty or missing; at least one is needed" + " in every block" * bool(self.machines)
            )
        _require_distinct("workloads", [workload.name for workload in self.workloads])
        _require_distinct("policies (give labels)", self.policy_names)
        _require_distinct("fleets", [fleet.name for fleet in self.fleets])
        for section in (self, *self.machines, *self.workloads, *self.fleets, self.batch_search):
            for name in type(section).model_fields:
                values = getattr(section, name)
                elsewhere = name in ("stages", "decode_gpus", "workloads", "policies", "fleets")
                if isinstance(values, tuple) and not elsewhere:
                    _require_distinct(name, values)
        for block in self.blocks:
            _require_distinct("decode_gpus", [list(lanes) for lanes in block.decode_gpus])
        known = [workload.name for workload in self.workloads if workload.batch_from is None]
        for workload in self.workloads:
            if workload.batch_from is not None and workload.batch_from not in known:
                raise ValueError(
                    f"workload '{workload.name}': batch_from is '{workload.batch_from}'; allowed are {', '.join(known)}"
                )
        return self

    @property
    def policy_names(self) -> list[str]:
        """Names of the policies, in order."""
        return [entry.name for entry in self.policies]

    @model_validator(mode="after")
    def _open_or_closed(self) -> Experiment:
        if not self.max_concurrency:
            return self
        if "loads" in self.model_fields_set or any(workload.loads for workload in self.workloads):
            raise ValueError("max_concurrency and loads exclude each other: in a closed loop, load follows latency")
        if self.report != "curves":
            raise ValueError(f"report is {self.report}; max_concurrency is reported by curves only")
        if self.batch == "best" or any(entry.searched for entry in self.policies):
            raise ValueError("max_concurrency needs batch sizes that are stated: they are searched at loads")
        if any(fleet.strategies is not None for fleet in self.fleets) or any(work.backlog for work in self.workloads):
            raise ValueError("max_concurrency excludes strategies and backlog, which need loads")
        return self

    @model_validator(mode="after")
    def _can_be_reported(self) -> Experiment:
        compared = (
            [*dict.fromkeys(fleet.name for fleet in self.each_fleet)] if self.compares_fleets else self.policy_names
        )
        if self.report != "curves" and not self.baselines:
            raise ValueError(f"report is {self.report}, which needs baselines: some of {', '.join(compared)}")
        for field, names in (("baselines", self.baselines), ("subject", (self.subject,) if self.subject else ())):
            for name in names:
                if name not in compared:
                    raise ValueError(f"{field}: '{name}' is none of {', '.join(compared)}")
        if self.subject is not None and compared == [self.subject]:
            raise ValueError(f"subject: '{self.subject}' is the only policy; others to compare it with are needed")
        if self.compares_fleets and len(self.policies) > 1:
            raise ValueError(f"report is {self.report}, which compares fleets under one policy; give one policy")
        return self


def _require_distinct(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"two {what} are both '{value}'")


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file; InputError names the file and the path of the field that is wrong."""
    return validated(Experiment, with_policy_files(read_yaml(path, "sweep file"), path.parent), str(path))


def with_policy_files(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """The fields ``policies`` and ``policy`` with the content of the policy files that they name."""

    def read(value: Any) -> Any:
        return load_policy(base / value) if is_policy_file(value) else value

    changed = {"policy": read(data["policy"])} if "policy" in data else {}
    if isinstance(data.get("policies"), list):
        changed["policies"] = [read(value) for value in data["policies"]]
    return {**data, **changed}


def is_policy_file(name: Any) -> bool:
    """Whether it is the path of a policy file, not the name of a policy."""
    return isinstance(name, str) and name.endswith((".yaml", ".yml"))


def load_policy(path: Path) -> PolicyEntry:
    """Read a policy file, the fields of one policy; its folders are absolute then. InputError names the file."""
    entry = validated(PolicyEntry, read_yaml(path, "policy file"), str(path))
    changes: dict[str, Any] = {"folder": str((path.parent / (entry.folder or ".")).resolve())}
    if entry.skip_budget is not None and entry.skip_budget.fidelity is not None:
        fidelity = str((path.parent / entry.skip_budget.fidelity).resolve())
        changes["skip_budget"] = entry.skip_budget.model_copy(update={"fidelity": fidelity})
    return entry.model_copy(update=changes)
