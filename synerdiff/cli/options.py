"""Options that commands share, and what their texts mean."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from policies.base import Parameter
from policies.registry import policy_parameters
from synerdiff.config.cluster import load_cluster
from synerdiff.config.experiment import PolicyEntry, is_policy_file, load_policy
from synerdiff.core import NO_SKIPS, PPM, InputError, Mode, SkipBudget
from synerdiff.files import MOST, number, plain_digits, shown, whole_number
from synerdiff.profile.folder import find_profile
from traces.columns import MAX_ARRIVAL_S

if TYPE_CHECKING:
    from synerdiff.experiments.run import Outcome, RunSpec

Map = Annotated[
    str | None, typer.Option("--map", help="Columns of a foreign trace: arrival=timestamp:ms,steps=30,size=dims:WxH.")
]
Sort = Annotated[bool, typer.Option("--sort", help="Sort a trace that is not in order of arrival.")]
ExecutionOption = Annotated[
    str | None,
    typer.Option(
        "--execution",
        help="eager, graphs (on a GPU, the default there) or compiled; a run's default is the profile's.",
    ),
]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Processes (default: one per core), or Ray tasks at a time.")]
BackendName = Annotated[str, typer.Option("--backend", help="loky: this machine; ray: a Ray cluster.")]
Address = Annotated[str | None, typer.Option("--address", help="Of the Ray cluster: HOST:PORT or auto.")]
Emit = Annotated[
    str | None, typer.Option("--emit", help="Also write a serving engine's batching rules: sglang or vllm-omni.")
]

MOST_SKIPS = 10_000
SKIP_MODES = (Mode.REUSE, Mode.CONDITIONAL)


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Options of every command that replays a trace on a profile."""

    profile: Annotated[str, typer.Option(help="Folder of a profile, or the name of a shipped one.")]
    trace: Annotated[
        Path, typer.Option(help="Trace file: CSV, parquet, JSON or JSON lines, with the names of many engines.")
    ]
    window: Annotated[str | None, typer.Option(help="A:B, seconds of the trace as written; B excluded.")] = None
    map: Map = None
    sort: Sort = False
    skip_fraction: Annotated[float, typer.Option(help="Share of a sample's steps that may skip guidance.")] = 0.0
    skip_warmup: Annotated[int, typer.Option(help="First steps that are always guided.")] = 3
    skip_longest_run: Annotated[int, typer.Option(help="Most skips in a row.")] = 1
    skip_mode: Annotated[str, typer.Option(help="What a skip does: reuse or conditional.")] = "reuse"

    def spec(
        self,
        policy: str,
        settings: Sequence[str] | None = None,
        decode_gpus: str = "0",
        cluster: Path | None = None,
        **fields: Any,
    ) -> RunSpec:
        """The run that is described; ``fields`` are taken as they are."""
        from synerdiff.experiments import run, sources

        budget = skip_budget(self.skip_fraction, self.skip_warmup, self.skip_longest_run, self.skip_mode)
        if cluster is not None and decode_gpus != "0":
            raise InputError("--decode-gpus excludes --cluster, whose workers list their decode_gpus.")
        entry = load_policy(Path(policy)) if is_policy_file(policy) else PolicyEntry(policy=policy)
        home = Path(entry.folder or ".")
        known = policy_parameters(entry.policy, home)
        parameters = _own_parameters(policy, entry) | parameter_values(entry.policy, known, settings or [])
        if entry.skip_budget is not None:
            if budget != NO_SKIPS or fields.get("min_ssim") is not None:
                raise InputError(f"{policy} holds a skip budget, which excludes --min-ssim and the options --skip-...")
            section = entry.skip_budget
            budget = section.budget if section.min_ssim is None else NO_SKIPS
            fields |= {"min_ssim": section.min_ssim, "fidelity": section.fidelity and Path(section.fidelity)}
        if not entry.may_skip:
            budget, fields = NO_SKIPS, fields | {"min_ssim": None, "fidelity": None}
        return run.RunSpec(
            profile=find_profile(self.profile),
            source=sources.trace_source(self.trace, window_of(self.window), self.map, self.sort),
            policy=entry.policy,
            parameters=parameters,
            base_folder=home,
            decode_gpus=decode_lanes(decode_gpus),
            cluster=None if cluster is None else load_cluster(cluster),
            budget=budget,
            steps_scale=entry.steps_scale,
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions(ReplayOptions):
    """Options of ``simulate`` and ``run``."""

    policy: Annotated[str, typer.Option(help="Name of a policy, module:Class, or a policy file (YAML).")]
    out: Annotated[Path, typer.Option(help="Folder for the records.")]
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, a parameter of the policy; may be repeated.")
    ] = None
    load: Annotated[float | None, typer.Option(help="Stretch the arrivals to this load.")] = None
    rate: Annotated[float | None, typer.Option(help="Stretch the arrivals to so many requests a second.")] = None
    time_scale: Annotated[float | None, typer.Option(help="Multiply every arrival by this.")] = None
    max_concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: at most so many requests in the system, sent as others end.")
    ] = None
    slo: Annotated[
        float | None, typer.Option(help="Latency limit in seconds of a request that has none of its own.")
    ] = None
    decode_gpus: Annotated[str, typer.Option(help="GPU of each decode lane, separated by commas.")] = "0"
    cluster: Annotated[Path | None, typer.Option(help="Cluster file (YAML): workers, adapters, links.")] = None
    min_ssim: Annotated[
        float | None,
        typer.Option(
            help="Floor on image fidelity instead: the cheapest skipping whose mean SSIM stays above it, by the "
            "fidelity table."
        ),
    ] = None
    fidelity: Annotated[
        Path | None,
        typer.Option(help="Folder of the fidelity table (default: beside the profile, else the one of its model)."),
    ] = None
    timeline: Annotated[bool, typer.Option("--timeline", help="Also write timeline.json for Perfetto.")] = False

    def described(self, **fields: Any) -> RunSpec:
        """The run, with the fields of ``RunSpec`` that only one of the two commands has."""
        return self.spec(
            self.policy,
            self.settings,
            self.decode_gpus,
            self.cluster,
            min_ssim=self.min_ssim,
            fidelity=self.fidelity,
            load=self.load,
            rate_per_s=self.rate,
            time_scale=self.time_scale,
            max_concurrency=self.max_concurrency,
            slo_seconds=self.slo,
            **fields,
        )


def taking(group: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameter is a ``group`` of options, as typer reads it: with each option a parameter.

    What must be given comes first in its help, what every ``ReplayOptions`` has last.
    """
    hints = get_type_hints(group, include_extras=True)
    options = [p.replace(annotation=hints[p.name]) for p in signature(group).parameters.values()]
    last = ReplayOptions.__annotations__ if issubclass(group, ReplayOptions) else {}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapper(**values: Any) -> None:
            command(group(**{option.name: values.pop(option.name) for option in options}), **values)

        own = list(signature(command, eval_str=True).parameters.values())[1:]
        named = [p.replace(kind=p.KEYWORD_ONLY) for p in (*options, *own)]
        named.sort(key=lambda p: 0 if p.default is p.empty else 2 if p.name in last else 1)
        wrapper.__signature__ = Signature(named)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def parameter_values(policy: str, known: Sequence[Parameter], settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as a policy's parameters, each in its declared type and within its bounds."""
    by_name = {parameter.name: parameter for parameter in known}
    values: dict[str, Any] = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise InputError(f"--set {text}: key=value is needed, for example batch=4.")
        if name not in by_name:
            listing = ", ".join(by_name) or "none"
            raise InputError(f"policy '{policy}' has no parameter '{name}'; it has {listing}.")
        if name in values:
            raise InputError(f"--set {name} is given twice.")
        values[name] = by_name[name].check(policy, _typed(by_name[name].kind, value))
    return values


def _typed(kind: type, text: str) -> Any:
    """The text in that type where it can be; else the text itself, for the parameter to refuse."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if text != text.strip():
        return text
    try:
        return whole_number(text, -MOST) if kind is int else number(text) if kind is float else kind(text)
    except ValueError:
        return text


def priced(text: str) -> dict[str, float]:
    """``h100=2.5,l40s=0.8``: name -> price."""
    prices: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (side.strip() for side in part.partition("="))
        if name in prices:
            raise InputError(f"--price {shown(text)}: the price of '{name}' is given twice.")
        try:
            prices[name] = number(value, 0, 1e6)
        except ValueError:
            name = ""
        if not name or not prices[name]:
            raise InputError(
                f"--price {shown(text)}: a name and a price above 0 are needed, for example h100=2.5,l40s=0.8."
            )
    return prices


def window_of(text: str | None) -> tuple[float, float] | None:
    """``A:B`` in seconds."""
    if text is None:
        return None
    try:
        start_s, end_s = (number(part, 0, MAX_ARRIVAL_S) for part in text.split(":"))
    except ValueError:
        raise InputError(f"--window {shown(text)}: two numbers of seconds are needed, for example 600:4200.") from None
    if not start_s < end_s:
        raise InputError(f"--window {text}: the start must be at least 0 and the end after it.")
    return start_s, end_s


def decode_lanes(text: str) -> tuple[int, ...]:
    """The GPU of each decode lane, ``0,0,1``."""
    lanes = tuple(gpu for part in text.split(",") if (gpu := plain_digits(part.strip(), 0, 63)) is not None)
    if len(lanes) <= text.count(","):
        raise InputError(f"--decode-gpus {shown(text)}: GPU numbers from 0 to 63 are needed, for example 0 or 0,1.")
    return lanes


def skip_budget(fraction: float, warmup_steps: int, longest_run: int, mode: str) -> SkipBudget:
    """The budget with its fraction in parts per million."""
    if not 0 <= fraction <= 1:
        raise InputError(f"--skip-fraction is {fraction:g}; a number from 0 to 1 is needed.")
    for name, value, least in (("warmup", warmup_steps, 0), ("longest-run", longest_run, 1)):
        if not least <= value <= MOST_SKIPS:
            raise InputError(f"--skip-{name} is {value}; a whole number from {least} to {MOST_SKIPS} is needed.")
    if mode not in SKIP_MODES:
        raise InputError(f"--skip-mode is '{mode}'; allowed are {' and '.join(SKIP_MODES)}.")
    return SkipBudget(round(fraction * PPM), warmup_steps, longest_run, Mode(mode))


def _own_parameters(file: str, entry: PolicyEntry) -> dict[str, Any]:
    if entry.searched:
        raise InputError(f"{file}: batch is {entry.batch!r}; one run needs one size.")
    return dict(entry.parameters) if entry.batch is None else {**entry.parameters, "batch": entry.batch}


def report(outcome: Outcome, title: str, more: Sequence[str] = ()) -> None:
    """Print what came of a run."""
    typer.echo(title)
    for line in [*outcome.lines(), *more]:
        typer.echo(line)


def require_served(outcome: Outcome) -> None:
    """Exit code 1 when no request was served."""
    statuses = Counter(record.status for record in outcome.result.requests)
    if not statuses["done"]:
        how = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        print(f"No request was served: {how}.", file=sys.stderr)
        raise typer.Exit(1)
