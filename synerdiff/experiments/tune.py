"""Searching a policy's parameters: what is tried, how good it is on training seeds, and what others say about the best.

A trial's score is the geometric mean, over profiles, loads and training seeds, of its objective over the default's on
the same requests, turned so that less is better. Optuna's sampler (TPE: Bergstra et al., Algorithms for
Hyper-Parameter Optimization, NeurIPS 2011) proposes a generation of trials at a time, whatever the number of
processes, so that the same file gives the same trials. Runs lie in the one store: a search that was interrupted finds
its runs again and goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, isfinite, log
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from policies.base import Parameter, Policy
from policies.registry import build_policy, policy_parameters
from synerdiff.config.experiment import PolicyEntry
from synerdiff.config.tune import BUDGET, Range, Span, Tuning, Value
from synerdiff.core import InputError, WorkerInfo
from synerdiff.engine.policy import PolicyCalls
from synerdiff.experiments.backends import Backend
from synerdiff.experiments.compare import MEASURES, Measure
from synerdiff.experiments.grid import Grid, Run
from synerdiff.experiments.sources import Source, arrivals
from synerdiff.experiments.sweep import Results, rows_of, with_ssim
from synerdiff.files import install_hint, require_writable_folder
from synerdiff.profile.capacity import default_batch, mix_of, most_samples
from synerdiff.profile.tables import Profile
from synerdiff.results.intervals import PairedRatio, paired_log_ratio

GENERATION = 4
"""Trials that are proposed at once: a constant, or the trials would depend on the number of processes."""
WIDE = 100
"""A range that reaches so many times the default says little: it is cut at ``REACH`` times the default."""
REACH = 16
REFUSED = 1e6
"""Score of a trial that has no value, or leaves more requests undone than the default does."""
MOST_FLOORS = 4
"""Levels of the skip budget's floor above the one that is asked for."""
Row = Mapping[str, Any]


class Dimension(NamedTuple):
    """One parameter's values: ``choices``, or numbers from ``low`` to ``high`` (``log``: by their logarithm)."""

    name: str
    kind: type
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Value, ...] = ()

    def suggested(self, trial: Any) -> Value:
        """What an Optuna trial takes."""
        value: Value
        if self.choices:
            value = trial.suggest_categorical(self.name, self.choices)
        elif self.kind is int:
            shift = self.shift
            value = trial.suggest_int(self.name, int(self.low) + shift, int(self.high) + shift, log=self.log) - shift
        else:
            value = trial.suggest_float(self.name, self.low, self.high, log=self.log)
        return value

    @property
    def shift(self) -> int:
        """What is added to whole numbers so that they have a logarithm."""
        return 1 if self.log and self.kind is int and self.low < 1 else 0

    def holds(self, value: Any) -> bool:
        """Whether the value is among those that are searched."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of parameters and its score: the ratio to the default on training seeds, below 1 where it is better."""

    number: int
    values: Mapping[str, Value]
    entry: PolicyEntry
    score: float


@dataclass(frozen=True, slots=True)
class JudgedTrial:
    """The best trial on seeds that chose nothing. ``ratios``: measure -> best / default with its interval."""

    best: Trial
    by_seed: Mapping[int, float]
    """Objective: best / default, per judging seed."""
    ratios: Mapping[str, PairedRatio]
    values: Mapping[str, tuple[float, float]]
    """measure -> (default's, best's) geometric mean."""
    ssim: tuple[float, float] | None
    """(default's, best's) mean by the fidelity table, where there is a floor."""
    better: bool
    """The whole interval of the objective is on the better side."""


def default_dimension(parameter: Parameter, default: Value | None) -> Dimension | None:
    """The values of a parameter that nobody narrowed: its choices, or its bounds; None without either.

    Bounds that reach beyond ``WIDE`` times the default (without one: 1) say little: such a range is cut.
    """
    if parameter.kind is bool:
        return Dimension(parameter.name, bool, choices=(False, True))
    if parameter.choices:
        return Dimension(parameter.name, str, choices=parameter.choices)
    if parameter.kind is str or parameter.low is None or parameter.high is None:
        return None
    low, high = parameter.low, parameter.high
    scale = float(default) if isinstance(default, int | float) and default > 0 else 1.0
    high = REACH * scale if high > WIDE * scale else high
    by_log = parameter.kind is int and high >= 8 * max(1.0, low)
    return Dimension(parameter.name, parameter.kind, low, high, by_log)


def stated_dimension(parameter: Parameter, span: Span, owner: str) -> Dimension:
    """The values of a parameter that the file states; InputError for one that the policy refuses."""
    if not isinstance(span, Range):
        checked = tuple(parameter.check(owner, value) for value in span)
        return Dimension(parameter.name, parameter.kind, choices=checked)
    if parameter.kind not in (int, float):
        raise InputError(f"search.{parameter.name}: a list of values is needed; {parameter.allowed}.")
    low, high = (parameter.check(owner, value) for value in (span.low, span.high))
    if span.log and parameter.kind is float and low <= 0:
        raise InputError(
            f"search.{parameter.name}: low is {low:g}; by its logarithm only numbers above 0 are searched."
        )
    return Dimension(parameter.name, parameter.kind, low, high, span.log)


class Search:
    """A tuning with its runs. ``base``: the folder of its file. InputError for what does not fit."""

    def __init__(self, tuning: Tuning, base: Path, folder: Path) -> None:
        self.tuning, self.folder = tuning, folder
        self.default = tuning.default
        seeds = (*tuning.seeds, *tuning.judge_seeds)
        self.grid = Grid(tuning.experiment((self.default,), seeds), base, folder)
        self.base = self.grid.home(self.default)
        own = self.grid.sources[tuning.workload.name, None]
        if tuning.workload.generator is None:
            half = len(own) // 2
            self.training, self.judging = own[:half], own[half:]
        else:
            self.training, self.judging = own[: len(tuning.seeds)], own[len(tuning.seeds) :]
        self.measure: Measure = MEASURES["saturation" if tuning.objective == "throughput" else tuning.objective]
        self.dimensions = self._dimensions()
        self._check()
        self.results = Results(folder)

    # What is searched

    def _dimensions(self) -> list[Dimension]:
        owner, stated = self.default.policy, self.tuning.search
        known = {parameter.name: parameter for parameter in policy_parameters(owner, self.base)}
        for name in stated or {}:
            if name not in known and (name != BUDGET or self.tuning.min_ssim is None):
                floor = f"; {BUDGET} is searched where the file states its floor" if name == BUDGET else ""
                listing = ", ".join(known) or "none"
                raise InputError(f"search: policy '{owner}' has no parameter '{name}'; it has {listing}{floor}.")
        found: list[Dimension | None] = []
        for parameter in known.values():
            if stated is not None:
                if parameter.name in stated:
                    found.append(stated_dimension(parameter, stated[parameter.name], owner))
            elif parameter.tuned and parameter.name not in self.default.parameters:
                found.append(self._own_dimension(parameter))
        found.append(self._floors())
        dimensions = [dimension for dimension in found if dimension is not None]
        if not dimensions:
            raise InputError(f"policy '{owner}' has no parameter with bounds; name the values to try under search.")
        return dimensions

    def _own_dimension(self, parameter: Parameter) -> Dimension | None:
        profiles = [device.profile for device in self.grid.devices.values()]
        requests = [request for source in self.training for request in arrivals(source).requests]
        if parameter.name == "batch":
            rows = mix_of(requests).sample_rows
            most = min(most_samples(one, rows) for profile in profiles for one in (profile.sizes.values() or [profile]))
            return Dimension("batch", int, 1, most, log=True) if most > 1 else None
        if parameter.name == "chunking" and parameter.kind is str:
            names = [name for name in profiles[0].chunkings if all(name in other.chunkings for other in profiles)]
            return Dimension("chunking", str, choices=tuple(names)) if len(names) > 1 else None
        if parameter.name.startswith("turn") and len({request.batch_key for request in requests}) == 1:
            return None  # nothing takes turns
        return default_dimension(parameter, parameter.default)

    def _floors(self) -> Dimension | None:
        """Floors on fidelity from the one that is asked for on, as far as the table has rules, at even ranks."""
        floor, stated = self.tuning.min_ssim, (self.tuning.search or {}).get(BUDGET)
        if floor is None:
            return None
        if stated is not None:
            if isinstance(stated, Range) or not all(isinstance(v, float) and floor <= v < 1 for v in stated):
                raise InputError(f"search.{BUDGET}: a list of numbers from the floor {floor:g} to below 1 is needed.")
            return Dimension(BUDGET, float, choices=stated)
        if self.tuning.search is not None:
            return None
        asked = {request.steps for source in self.training for request in arrivals(source).requests}
        levels = {
            row.ssim_low
            for table in self.grid.tables.values()
            for row in table.rows
            if row.steps in asked and row.skipped_steps and floor < row.ssim_low < 1
        }
        # As the table's bounds are rounded nowhere, the floor is put just below each.
        ordered = sorted({int(1e4 * level) / 1e4 for level in levels} - {floor})
        ordered = [level for level in ordered if level > floor and self._reached(level)]
        if len(ordered) > MOST_FLOORS:
            ordered = [ordered[round(i * (len(ordered) - 1) / (MOST_FLOORS - 1))] for i in range(MOST_FLOORS)]
        return Dimension(BUDGET, float, choices=(floor, *ordered)) if ordered else None

    def _reached(self, floor: float) -> bool:
        entry = self.default.model_copy(update={"skip_budget": self.tuning.budget(floor)})
        try:
            for name in self.tuning.profiles:
                for source in (*self.training, *self.judging):
                    self.grid.budget_of(name, source, entry)
        except InputError:
            return False
        return True

    def entry(self, values: Mapping[str, Value]) -> PolicyEntry:
        """The policy with these values."""
        parameters = {**self.default.parameters, **{k: v for k, v in values.items() if k not in ("batch", BUDGET)}}
        batch = values.get("batch", self.default.batch)
        if "batch" in parameters and "batch" in values:
            del parameters["batch"]
        changes: dict[str, Any] = {
            "label": f"{self.tuning.policy.name}, tuned",
            "parameters": parameters,
            "batch": batch,
        }
        floor = values.get(BUDGET)
        if isinstance(floor, float):
            changes["skip_budget"] = self.tuning.budget(floor)
        return self.default.model_copy(update=changes)

    def _started(self, entry: PolicyEntry, profile: Profile) -> Policy:
        """The policy as it is on a worker of the profile; InputError where it cannot be."""
        parameters = dict(entry.parameters) if entry.batch is None else {**entry.parameters, "batch": entry.batch}
        policy = build_policy(entry.policy, parameters, self.base)
        calls = PolicyCalls(policy)
        rows = mix_of(arrivals(self.training[0]).requests).sample_rows
        for one in profile.sizes.values() or [profile]:
            calls.reset(WorkerInfo(one.most_rows, 0, (0,), rows), one.only(one.head.size))
        return policy

    def _check(self) -> None:
        """InputError for a value that the policy refuses on some profile, before anything is simulated."""
        for dimension in self.dimensions:
            ends = dimension.choices or (dimension.kind(dimension.low), dimension.kind(dimension.high))
            for value, device in product(ends, self.grid.devices.values()):
                self._started(self.entry({dimension.name: value}), device.profile)

    def default_values(self) -> dict[str, Value]:
        """The default's value of every dimension that holds it, on the first profile."""
        known = {parameter.name: parameter.default for parameter in policy_parameters(self.default.policy, self.base)}
        requests = arrivals(self.training[0]).requests
        profile = self.grid.devices[self.tuning.profiles[0]].profile
        own = {**known, "batch": self.default.batch, **self.default.parameters, BUDGET: self.tuning.min_ssim}
        rows = mix_of(requests).sample_rows
        if own["batch"] is None:
            own["batch"] = default_batch(profile, rows)
        if "chunking" in known and own["chunking"] is None:
            own["chunking"] = self._started(self.default, profile).chunking
        return {d.name: own[d.name] for d in self.dimensions if own.get(d.name) is not None and d.holds(own[d.name])}

    # Runs

    def runs(self, entry: PolicyEntry, sources: Sequence[Source]) -> list[Run]:
        """In an order that pairs those of two entries."""
        offers = [None] if self.measure.saturated else list(self.tuning.loads)
        batch = entry.batch if isinstance(entry.batch, int) else None
        return [
            self.grid.run_of(name, cell, source, load, entry, batch)
            for name, cell, _ in self.grid.cells
            for load in offers
            for source in sources
        ]

    def rows(
        self, entries: Sequence[PolicyEntry], sources: Sequence[Source], backend: Backend, tell: Callable[[], None]
    ) -> list[list[Row]]:
        """Per entry the rows of its runs."""
        own = [self.runs(entry, sources) for entry in entries]
        found = rows_of({run.key: run for runs in own for run in runs}, backend, self.results, tell)
        return [[found[run.key] for run in runs] for runs in own]

    # The search

    def trials(self, backend: Backend, on_progress: Callable[[int, int], None]) -> list[Trial]:
        """All trials, in the order in which they were proposed; ``on_progress`` hears (runs done, runs in all)."""
        optuna = _optuna()
        require_writable_folder(self.folder / "runs")
        each = len(self.runs(self.default, self.training))
        total = (self.tuning.trials + 1) * each + 2 * len(self.runs(self.default, self.judging))

        def tell() -> None:
            on_progress(min(total, self.results.computed + self.results.reused), total)

        (reference,) = self.rows([self.default], self.training, backend, tell)
        if (bad := next((row for row in reference if not _value(row, self.measure)), None)) is not None:
            raise InputError(
                f"the default has no {self.measure.title.lower()} on seed {bad['seed']} at load {bad['load']}, so "
                "nothing can be compared with it; a lower load or a longer SLO may help."
            )
        sampler = optuna.samplers.TPESampler(
            seed=self.tuning.seed % 2**32, multivariate=True, constant_liar=True, n_startup_trials=10
        )
        study = optuna.create_study(sampler=sampler)
        shifts = {dimension.name: dimension.shift for dimension in self.dimensions}
        first = {name: value + shifts[name] if shifts[name] else value for name, value in self.default_values().items()}  # type: ignore[operator]
        study.enqueue_trial(first)
        trials: list[Trial] = []
        while len(trials) < self.tuning.trials:
            asked = [study.ask() for _ in range(min(GENERATION, self.tuning.trials - len(trials)))]
            values = [{dimension.name: dimension.suggested(ask) for dimension in self.dimensions} for ask in asked]
            entries = [self.entry(own) for own in values]
            for ask, own, entry, rows in zip(
                asked, values, entries, self.rows(entries, self.training, backend, tell), strict=True
            ):
                trials.append(Trial(len(trials), own, entry, score_of(rows, reference, self.measure)))
                study.tell(ask, trials[-1].score)
        return trials

    def judge(self, trials: Sequence[Trial], backend: Backend, on_progress: Callable[[int, int], None]) -> JudgedTrial:
        """The best trial and the default on the judging seeds."""
        best = min(trials, key=lambda trial: trial.score)  # of equals the first
        count = self.results.computed + self.results.reused + 2 * len(self.runs(self.default, self.judging))

        def tell() -> None:
            on_progress(self.results.computed + self.results.reused, count)

        default, own = self.rows([self.default, best.entry], self.judging, backend, tell)
        ratios, values = {}, {}
        for measure in MEASURES.values():
            a, b = (by_seed(rows, measure) for rows in (default, own))
            if measure.saturated is self.measure.saturated and a and b and a.keys() == b.keys():
                ratios[measure.column] = paired_log_ratio(b, a)
                values[measure.column] = (_mean(a.values()), _mean(b.values()))
        column = self.measure.column
        if column not in ratios:
            raise InputError(f"the best trial has no {self.measure.title.lower()} on some judging seed.")
        pairs = {
            seed: by_seed(own, self.measure)[seed] / value for seed, value in by_seed(default, self.measure).items()
        }
        ssim = self._ssim(self.default, default), self._ssim(best.entry, own)
        better = is_better(ratios[column], self.measure)
        return JudgedTrial(best, pairs, ratios, values, ssim if self.grid.tables else None, better)

    def _ssim(self, entry: PolicyEntry, rows: Sequence[Row]) -> float:
        """Mean over the judging runs' images; 1 where nothing may be skipped."""
        runs = self.runs(entry, self.judging)
        return fmean(
            with_ssim(row, run, self.grid.tables).get("ssim", 1.0) for row, run in zip(rows, runs, strict=True)
        )


def score_of(rows: Sequence[Row], reference: Sequence[Row], measure: Measure) -> float:
    """Geometric mean of the objective over the default's, run by run; its inverse where larger is better.

    ``REFUSED`` where a run has no value, or leaves more requests undone than the default's does.
    """
    ratios = []
    for row, other in zip(rows, reference, strict=True):
        value, base = _value(row, measure), _value(other, measure)
        undone = [one["error_request_count"] or 0 for one in (row, other)]
        if not value or not base or undone[0] > undone[1]:
            return REFUSED
        ratios.append(log(base / value) if measure.larger_is_better else log(value / base))
    return exp(fmean(ratios))


def by_seed(rows: Sequence[Row], measure: Measure) -> dict[int, float]:
    """Seed -> geometric mean over profiles and loads; empty where a run has no value."""
    own: dict[int, list[float]] = {}
    for row in rows:
        value = _value(row, measure)
        if not value:
            return {}
        own.setdefault(row["seed"], []).append(value)
    return {seed: _mean(values) for seed, values in own.items()}


def is_better(ratio: PairedRatio, measure: Measure) -> bool:
    """Whether the whole interval of best / default is on the better side; one seed tells nothing."""
    if ratio.seeds < 2:
        return False
    return ratio.low > 1 if measure.larger_is_better else ratio.high < 1


def _value(row: Row, measure: Measure) -> float | None:
    value = row.get(measure.column)
    return float(value) if value is not None and isfinite(value) and value > 0 else None


def _mean(values: Any) -> float:
    return exp(fmean(log(value) for value in values))


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise InputError(f"tune needs the library optuna; install it with: {install_hint('tune')}") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
