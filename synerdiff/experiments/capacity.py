"""How many GPUs keep an SLO, or at which rate a fleet does: bracketing and bisection over simulated runs.

Every fleet of every profile and policy sees the same requests. A fleet keeps the SLO when the whole 95% interval of
the metric does: over replicates (seeds, or windows of a trace) Student's t; within one trace the means of its blocks
(``results.intervals``), and where the trace is too short for those the value alone, which is said. The first half of
four or more replicates chooses the fleet by the metric itself, the other half judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from math import ceil, exp, inf, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from policies.registry import policy_parameters
from policies.routers import build_router
from profiler.memory import require_fits
from synerdiff.config.capacity import Question, Target
from synerdiff.config.experiment import BatchSearch, Experiment, PolicyEntry, Slo
from synerdiff.core import NS_PER_S, PPM, InputError, Request
from synerdiff.experiments.backends import Backend
from synerdiff.experiments.capacity_fleets import (
    APART,
    cheaper_mixes,
    division,
    entries_of,
    fleet,
    mixed_fleet,
    stage_seconds,
)
from synerdiff.experiments.compare import GridCell
from synerdiff.experiments.grid import Grid, Run, with_key
from synerdiff.experiments.offer import fitted, window_s
from synerdiff.experiments.profile_error import at_times
from synerdiff.experiments.run import execute, prepare
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.store import run_file
from synerdiff.experiments.sweep import Results, rows_of
from synerdiff.files import require_writable_folder
from synerdiff.profile.adapters import load_adapters
from synerdiff.profile.capacity import default_batch, least_lane_s, mix_of, most_samples, offered_load
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.scaling import own_band
from synerdiff.profile.tables import Band, Profile
from synerdiff.results.intervals import BLOCKS, Interval, blocks_interval, t_interval, values_for_interval
from synerdiff.results.metrics import SLO_FACTOR, measured
from synerdiff.results.records import REQUEST_COLUMNS, read_table
from synerdiff.schema import validated

if TYPE_CHECKING:
    import pandas

FEW = 3
"""Replicates that are looked at first; the others of their half only where the interval of these holds the bound."""
STRIDE = 1.3
"""find rate: by how much the rate grows or falls until the SLO is kept on one side and not on the other."""
LEAST_SHARE = 1e-3
"""find rate: of the rate that the fleet's speed allows at most; a fleet that keeps no more keeps none."""


class Level(NamedTuple):
    """What is tried: so many GPUs, at a rate in requests a second (None: as the requests arrive)."""

    gpus: int
    rate_per_s: float | None


class Ask(NamedTuple):
    """A level to simulate: on the replicates that choose or on those that judge, on few of them or on all."""

    level: Level
    judging: bool
    few: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What runs say about a level. ``value``: the metric, with its 95% interval (None: the trace is too short)."""

    level: Level
    value: float
    low: float | None
    high: float | None
    replicates: int
    holds: bool
    """The value is inside the SLO."""
    keeps: bool
    """The whole interval is (without one: the value)."""
    sure: bool
    """The interval is inside or outside; the bound is not in it."""
    judging: bool = False
    needed: int | None = None
    """Requests that one trace would need for an interval, where it has too few."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found for one profile under one policy."""

    profile: Profile
    name: str
    """The profile as the question names it."""
    entry: PolicyEntry
    best: Verdict | None
    """The fewest GPUs, or the highest rate, that keeps the SLO; None: nothing does."""
    beyond: Verdict | None
    """The next smaller fleet or higher rate, which does not; without ``best`` the nearest to keeping it."""
    bound: float
    """The fewest GPUs, or the highest rate, that the work divided by the profile's speed would allow."""
    cost: float | None
    """Per 1,000 images, of the best."""
    tried: list[Verdict]
    run: Run | None
    """One that the answer rests on."""
    kinds: Mapping[str, int] | None = None
    """Of a fleet of several profiles: profile as the question names it -> workers."""
    counts: Mapping[str, int] | None = None
    """Of the best, where stages are apart: stage -> GPUs."""


Ended = tuple[Verdict | None, Verdict | None]
"""The level that keeps the SLO, and the nearest beyond it, which does not."""
Levels = Generator[Ask, Verdict, Ended]
"""Yields the levels to try, one after the other, and is told the verdict on each."""


# The search


def fewest(low: int, high: int, start: int, judges: bool) -> Levels:
    """The fewest GPUs from ``low`` to ``high`` that keep the SLO, and one fewer; (None, ``high``) when none does.

    Strides that double lead from ``start`` to a bracket, bisection into it. More GPUs are taken never to harm. What
    the first replicates choose, by the value of the metric, is then judged by the others, by its whole interval, and
    grows until they say yes too; without others the interval chooses.
    """
    fails, keeps = low - 1, high + 1
    verdicts: dict[int, Verdict] = {}
    place, stride = min(max(low, start), high), 1
    while keeps - fails > 1:
        verdict = verdicts[place] = yield from _asked(Level(place, None), judging=False)
        if verdict.holds if judges else verdict.keeps:
            keeps = place
        else:
            fails = place
        if keeps > high:
            place, stride = min(high, fails + stride), 2 * stride
        elif fails == low - 1:
            place, stride = max(low, keeps - stride), 2 * stride
        else:
            place = (keeps + fails) // 2
    if keeps > high:
        return None, verdicts[high]
    while judges:
        verdict = verdicts[keeps] = yield from _asked(Level(keeps, None), judging=True)
        if verdict.keeps:
            break
        if keeps == high:
            return None, verdict
        keeps += 1
    beyond = verdicts.get(keeps - 1)
    if judges and beyond is not None and not beyond.judging:
        beyond = yield Ask(beyond.level, judging=True, few=False)
    return verdicts[keeps], beyond


def highest(gpus: int, most_per_s: float, within: float, judges: bool) -> Levels:
    """The highest rate at which so many GPUs keep the SLO, and the next higher one that was tried and does not.

    ``most_per_s``: what the fleet's speed allows at most. Bisection ends when the two are ``within`` of each other.
    """
    keeps: Verdict | None = None
    fails: Verdict | None = None
    rate = 0.8 * most_per_s
    while True:
        verdict = yield from _asked(Level(gpus, _rounded(rate)), judging=False)
        rate = verdict.level.rate_per_s or rate
        keeps, fails = (verdict, fails) if (verdict.holds if judges else verdict.keeps) else (keeps, verdict)
        if fails is None:
            rate *= STRIDE
        elif keeps is None:
            rate /= STRIDE
            if rate < LEAST_SHARE * most_per_s:
                return None, fails
        else:
            low, high = keeps.level.rate_per_s or 0, fails.level.rate_per_s or 0
            if high <= (1 + within) * low:
                break
            rate = (low * high) ** 0.5
    while judges:
        verdict = yield from _asked(keeps.level, judging=True)
        if verdict.keeps:
            keeps = verdict
            break
        fails, rate = verdict, (verdict.level.rate_per_s or 0) / (1 + within)
        if rate < LEAST_SHARE * most_per_s:
            return None, fails
        keeps = replace(keeps, level=Level(gpus, _rounded(rate)))
    if judges and not fails.judging:
        fails = yield Ask(fails.level, judging=True, few=False)
    return keeps, fails


def _asked(level: Level, judging: bool) -> Generator[Ask, Verdict, Verdict]:
    """On few replicates first; on all where these do not tell."""
    verdict = yield Ask(level, judging, few=True)
    if not verdict.sure:
        verdict = yield Ask(level, judging, few=False)
    return verdict


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")


# The verdict


def verdict_of(
    target: Target, level: Level, replicates: Sequence[pandas.DataFrame], load: float, judging: bool = False
) -> Verdict:
    """Judge request tables, one per replicate (columns request_latency_s, status, slo_s), by their measured requests.

    A request that is not done has an infinite latency. ``load``: of the level, from which blocks get their length.
    """
    latencies = [_latencies(table) for table in replicates]
    values = [_metric(target, own) for own in latencies]
    needed = None
    if len(values) > 1:
        interval = _over_replicates(target, values)
    else:
        least = values_for_interval(load)
        least = None if least is None else max(least, BLOCKS * level.gpus)
        enough = least is not None and len(latencies[0]) >= least
        interval = _within(target, latencies[0]) if enough else Interval(values[0], -inf, inf, 1)
        needed = None if enough else least
    known = interval.low > -inf or interval.high < inf
    low, high = interval.low, interval.high
    inside = target.holds(low if target.quantile is None else high)
    outside = not target.holds(high if target.quantile is None else low)
    return Verdict(
        level=level,
        value=interval.value,
        low=low if known else None,
        high=high if known else None,
        replicates=len(values),
        holds=target.holds(interval.value),
        keeps=inside if known else target.holds(interval.value),
        sure=inside or outside if known else len(values) == 1,
        judging=judging,
        needed=needed,
    )


def _over_replicates(target: Target, values: Sequence[float]) -> Interval:
    """Mean of shares, geometric mean of latencies, each with its t interval."""
    if target.quantile is None:
        own = t_interval(values)
        return Interval(own.value, max(0.0, own.low), min(1.0, own.high), own.n)
    if inf in values:
        return Interval(inf, inf, inf, len(values))
    own = t_interval([log(value) for value in values])
    return Interval(exp(own.value), exp(own.low), exp(own.high), own.n)


def _latencies(table: pandas.DataFrame) -> list[tuple[float, float]]:
    """(latency, limit) of each measured request, by arrival."""
    own = measured(table)
    latency = own["request_latency_s"].astype(float).where(own["status"] == "done", inf)
    return list(zip(latency.tolist(), own["slo_s"].astype(float).tolist(), strict=True))


def _metric(target: Target, latencies: Sequence[tuple[float, float]]) -> float:
    """The percentile (linear between order statistics), or the share within their limit."""
    if target.quantile is None:
        return sum(latency <= limit for latency, limit in latencies) / len(latencies)
    return _quantile(sorted(latency for latency, _ in latencies), target.quantile)


def _quantile(ordered: Sequence[float], quantile: float) -> float:
    place = quantile * (len(ordered) - 1)
    below = int(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    return low if place == below else high if inf in (low, high) else low + (high - low) * (place - below)


def _within(target: Target, latencies: Sequence[tuple[float, float]]) -> Interval:
    """The metric of one run with an interval from the means of its blocks.

    A share is a mean. A percentile's interval reaches to the percentiles that lie as far from it as the interval of
    the share below it is wide (Woodruff, Confidence intervals for medians and other position measures, 1952).
    """
    value = _metric(target, latencies)
    if target.quantile is None:
        own = blocks_interval([float(latency <= limit) for latency, limit in latencies], 0)
        return Interval(value, max(0.0, own.low), min(1.0, own.high), own.n)
    share = blocks_interval([float(latency <= value) for latency, _ in latencies], 0)
    half, ordered = share.high - share.value, sorted(latency for latency, _ in latencies)
    low, high = target.quantile - half, target.quantile + half
    return Interval(
        value,
        _quantile(ordered, low) if low > 0 else 0.0,
        _quantile(ordered, high) if high < 1 else inf,
        len(latencies),
    )


# The question


class Inquiry:
    """A question with its runs: which there are, where they lie, what they say. InputError for what does not fit.

    ``base`` is the folder of the question's file, where profiles, traces and policy modules are looked up too.
    """

    def __init__(self, question: Question, base: Path, folder: Path) -> None:
        self.question, self.folder = question, folder
        build_router(question.router.kind, **question.router.parameters)
        target = question.target
        seconds = question.slo_seconds if target.quantile is None else target.bound
        slo = Slo(solo_multiple=SLO_FACTOR) if seconds is None else Slo(seconds=seconds)
        layouts = entries_of(_entries(question, base), question.stages)
        self.entries = [entry for entry, _ in layouts.values()]
        self.layouts = {name: layout for name, (_, layout) in layouts.items()}
        fields = {
            "name": question.name,
            "profiles": question.profiles,
            "workloads": (question.workload,),
            "policies": tuple(self.entries),
            "seeds": question.seeds,
            "requests": question.requests,
            "skip_budget": question.skip_budget,
            "slo": slo,
            "figures": (),
        }
        experiment = validated(Experiment, fields, f"capacity '{question.name}'")
        self.grid = Grid(experiment, base, folder)
        for name, device in self.grid.devices.items():
            if device.folder is not None:
                adapters = load_adapters(device.folder, device.profile.name)
                self.grid.devices[name] = device._replace(adapters=adapters)
        self.sources = self.grid.sources[question.workload.name, None]
        half = ceil(len(self.sources) / 2) if len(self.sources) > 3 else len(self.sources)
        self.choosing, self.judging = self.sources[:half], self.sources[half:]
        self.results = Results(folder)
        self._requests: dict[str, list[Request]] = {}
        for name, entry in product(question.profiles, self.entries):
            profile = self.grid.devices[name].profile
            rows = min(self.batch_of(name, entry) * mix_of(self.requests(name)).sample_rows, profile.most_rows)
            require_fits(profile, rows, f"policy '{entry.name}'")

    def batch_of(self, name: str, entry: PolicyEntry) -> int:
        """Images in a full step of the policy."""
        given = entry.batch if isinstance(entry.batch, int) else entry.parameters.get("batch")
        return given or default_batch(self.grid.devices[name].profile, mix_of(self.requests(name)).sample_rows)

    def counts(self, name: str, entry: PolicyEntry, gpus: int) -> dict[str, int] | None:
        """How so many GPUs are divided between workers and stages; None: too few for each to have one."""
        seconds = stage_seconds(self.requests(name), self.grid.devices[name].profile, self.batch_of(name, entry))
        return division(gpus, self.layouts[entry.name], seconds)

    def requests(self, name: str) -> list[Request]:
        """The requests of all replicates, as a profile serves them."""
        if name not in self._requests:
            slo = self.grid.experiment.slo
            assert slo is not None
            asked = [request for source in self.sources for request in arrivals(source).requests]
            profile = self.grid.devices[name].profile
            self._requests[name] = fitted(asked, profile, slo.seconds, slo.solo_multiple)
        return self._requests[name]

    @cached_property
    def length_s(self) -> float:
        """Of all replicates, one after the other, as they arrive."""
        return sum(window_s(own.requests, own.window) for own in map(arrivals, self.sources))

    @property
    def rate_per_s(self) -> float:
        return len(self.requests(self.question.profiles[0])) / self.length_s

    def bound(self, name: str, entry: PolicyEntry) -> float:
        """GPUs that the work would keep busy without a pause if every step and decode ran at the profile's best."""
        requests, budget = self.requests(name), self.grid.budget_of(name, self.sources[0], entry)
        fraction = 1.0 if budget.eligible_steps is not None else budget.fraction_ppm / PPM
        return least_lane_s(requests, self.grid.devices[name].profile, fraction, entry.steps_scale) / self.length_s

    def runs(self, name: str, entry: PolicyEntry, ask: Ask, kinds: Mapping[str, int] | None = None) -> list[Run]:
        """The runs that a level needs; ``kinds``: of several profiles so many workers each."""
        own = self.judging if ask.judging else self.choosing
        if kinds is None:
            counts = self.counts(name, entry, ask.level.gpus)
            assert counts is not None  # the search starts where every stage has a GPU
            cluster = fleet(self.question, counts)
        else:
            cluster = mixed_fleet(
                self.question, [(str(self.grid.devices[kind].folder), n) for kind, n in kinds.items()]
            )
        device, gpus = self.grid.devices[name], ask.level.gpus
        cell = GridCell(device.profile.name, 1.0, 1.0, "", f"{gpus} workers", gpus, self.question.workload.name, None)
        runs = []
        for source in own[:FEW] if ask.few else own:
            batch = entry.batch if isinstance(entry.batch, int) else None
            run = self.grid.run_of(name, cell._replace(fleet=""), source, None, entry, batch)
            spec = replace(
                run.spec,
                cluster=cluster,
                worker_hashes={str(own.folder): own.profile.content_hash for own in self.grid.devices.values()},
                rate_per_s=ask.level.rate_per_s,
                adapters=device.adapters,
                free_adapters=device.adapters is None,
            )
            whole = replace(run, cell=cell, spec=spec, keep_requests=True)
            runs.append(with_key(whole, device, self.grid.policy_hashes[entry.policy]))
        return runs

    def verdict(self, name: str, ask: Ask, runs: Sequence[Run]) -> Verdict:
        """What the runs of one level say of the SLO."""
        tables = [request_table(run) for run in runs]
        requests = self.requests(name)
        rate = ask.level.rate_per_s
        length_s = self.length_s if rate is None else len(requests) / rate
        load = offered_load(requests, self.grid.devices[name].profile, length_s, ask.level.gpus)
        return verdict_of(self.question.target, ask.level, tables, load, ask.judging)

    def band(self, answer: Answer) -> tuple[Band, tuple[float, float]] | None:
        """The metric of the best where all times are as far off as its profile says they may be, at the shorter times
        first, on the first replicate: arrivals and what policies plan with stay. None without such a band."""
        band, best = own_band(answer.profile), answer.best
        if answer.run is None or best is None or answer.kinds is not None or band is None:
            return None
        prepared = prepare(answer.run.spec)
        tables = [execute(at_times(prepared, factor)).frames[0] for factor in (band.low, band.high)]
        low, high = (verdict_of(self.question.target, best.level, [table], 0.0).value for table in tables)
        return band, (low, high)

    def search(self, name: str, entry: PolicyEntry) -> Levels:
        """The levels to try, one after the other, given the verdicts so far."""
        low, high = self.question.fleet_sizes
        low = max(low, 1 + len(APART[self.layouts[entry.name]]))
        if low > high:
            raise InputError(f"gpus is '{self.question.gpus}'; {entry.name} needs at least {low}.")
        bound = self.bound(name, entry)
        if self.question.find == "gpus":
            return fewest(low, high, max(1, ceil(bound)), bool(self.judging))
        return highest(low, low / bound * self.rate_per_s, self.question.rate_within, bool(self.judging))

    def answer(self, name: str, entry: PolicyEntry, ended: Ended, tried: list[Verdict]) -> Answer:
        """The answer for one policy on one profile, from where its search ended."""
        best, beyond = ended
        bound, price = self.bound(name, entry), self.question.price(name)
        cost = run = counts = None
        if best is not None:
            if price is not None:
                cost = best.level.gpus * price / 3600 / self._images_per_s(name, best.level.rate_per_s) * 1000
            run = self.runs(name, entry, Ask(best.level, best.judging, few=True))[0]
            if self.layouts[entry.name] != "together":
                counts = self.counts(name, entry, best.level.gpus)
        if self.question.find == "rate":
            bound = self.question.fleet_sizes[0] / bound * self.rate_per_s
        return Answer(
            self.grid.devices[name].profile, name, entry, best, beyond, bound, cost, tried, run, counts=counts
        )

    def _images_per_s(self, name: str, rate_per_s: float | None = None) -> float:
        requests = self.requests(name)
        return (rate_per_s or self.rate_per_s) * mix_of(requests).images / len(requests)

    def mixes(self, answers: Sequence[Answer], ask: Callable[[Sequence[Run]], None]) -> list[Answer]:
        """For every policy the cheapest fleet of two profiles that is cheaper than any of one, where there is one."""
        found = []
        for entry in self.entries if self.question.mixed else ():
            own = [a for a in answers if a.entry.name == entry.name and a.best is not None and a.cost is not None]
            for one, other in combinations(own, 2):
                best = min(a.cost or inf for a in own)
                answer = self._mix(entry, one, other, best, ask) if self.layouts[entry.name] == "together" else None
                found += [] if answer is None else [answer]
        return found

    def _mix(
        self, entry: PolicyEntry, one: Answer, other: Answer, best: float, ask: Callable[[Sequence[Run]], None]
    ) -> Answer | None:
        assert one.best is not None
        assert other.best is not None
        prices = (self.question.price(one.name) or inf, self.question.price(other.name) or inf)
        images_per_s = self._images_per_s(one.name)
        hour = best * images_per_s * 3600 / 1000
        search = cheaper_mixes((one.best.level.gpus, other.best.level.gpus), prices, hour)
        verdicts: dict[tuple[int, int], Verdict] = {}
        try:
            pair = next(search)
            while True:
                level = Ask(Level(sum(pair), None), judging=bool(self.judging), few=False)
                runs = self.runs(one.name, entry, level, {one.name: pair[0], other.name: pair[1]})
                ask(runs)
                verdicts[pair] = self.verdict(one.name, level, runs)
                pair = search.send(verdicts[pair].keeps)
        except StopIteration as end:
            found: tuple[int, int] | None = end.value
        if found is None:
            return None
        verdict = verdicts[found]
        cost = (found[0] * prices[0] + found[1] * prices[1]) / 3600 / images_per_s * 1000
        bound = sum(found) / (found[0] / one.bound + found[1] / other.bound)
        kinds = {one.name: found[0], other.name: found[1]}
        return Answer(one.profile, one.name, entry, verdict, None, bound, cost, [*verdicts.values()], runs[0], kinds)

    def solve(self, backend: Backend, on_progress: Callable[[int], None] | None = None) -> list[Answer]:
        """Every profile under every policy, all searches side by side; ``on_progress`` hears how many runs are done."""
        require_writable_folder(self.folder / "runs")

        def compute(runs: Iterable[Run]) -> None:
            rows_of({run.key: run for run in runs}, backend, self.results, tell)

        def tell() -> None:
            if on_progress is not None:
                on_progress(self.results.computed + self.results.reused)

        keys = [(name, entry.name) for name in self.question.profiles for entry in self.entries]
        entries = {entry.name: entry for entry in self.entries}
        searches = {key: self.search(key[0], entries[key[1]]) for key in keys}
        asks = {key: next(search) for key, search in searches.items()}
        tried: dict[tuple[str, str], list[Verdict]] = {key: [] for key in keys}
        ended: dict[tuple[str, str], Ended] = {}
        while asks:
            runs = {key: self.runs(key[0], entries[key[1]], ask) for key, ask in asks.items()}
            compute(run for own in runs.values() for run in own)
            for key, ask in list(asks.items()):
                verdict = self.verdict(key[0], ask, runs[key])
                tried[key].append(verdict)
                try:
                    asks[key] = searches[key].send(verdict)
                except StopIteration as end:
                    ended[key] = end.value
                    del asks[key]
        answers = [self.answer(key[0], entries[key[1]], ended[key], tried[key]) for key in keys]
        return answers + self.mixes(answers, compute)


def request_table(run: Run) -> pandas.DataFrame:
    """The requests of a finished run."""
    frame: pandas.DataFrame = read_table(run_file(run.folder, run.key), REQUEST_COLUMNS)[0].to_pandas()
    return frame


def _entries(question: Question, base: Path) -> list[PolicyEntry]:
    """The policies, one per batch size where several are given; ``best``: all sizes that every profile has rows for."""
    rows = [load_profile(find_profile(name, base.resolve())) for name in question.profiles]
    entries: list[PolicyEntry] = []
    for entry in question.policies:
        if not entry.searched:
            entries.append(entry)
            continue
        home = base / (entry.folder or ".")
        if "batch" not in [parameter.name for parameter in policy_parameters(entry.policy, home)]:
            raise InputError(f"policy '{entry.policy}' has no parameter 'batch'.")
        sizes = entry.batch if isinstance(entry.batch, tuple) else BatchSearch().batches
        fitting = [size for size in sorted(set(sizes)) if all(size <= most_samples(profile) for profile in rows)]
        if not fitting:
            raise InputError(f"policy '{entry.name}': no batch of {', '.join(map(str, sizes))} fits every profile.")
        entries += [
            entry.model_copy(update={"batch": size, "label": f"{entry.name}, batch {size}"}) for size in fitting
        ]
    return entries


def best_of(answers: Iterable[Answer], rank: Callable[[Answer], Any]) -> Answer | None:
    """The best of those that keep the SLO; ties go to the first."""
    return min((answer for answer in answers if answer.best is not None), key=rank, default=None)


def by_size(tables: Sequence[pandas.DataFrame], most: int = 4) -> list[tuple[int, int, int, float, float, float]]:
    """Measured requests by size (images x steps), in at most so many groups of about as many requests each:
    (least size, greatest, requests, mean latency, P99, share within their limit)."""
    rows: dict[int, list[tuple[float, float]]] = {}
    for table in tables:
        own = measured(table)
        sizes = (own["images"] * own["steps"]).tolist()
        for size, request in zip(sizes, _latencies(table), strict=True):
            rows.setdefault(size, []).append(request)
    total = sum(map(len, rows.values()))
    groups: list[list[int]] = [[]]
    count = 0
    for size in sorted(rows):
        if groups[-1] and (len(rows) <= most or count >= total * len(groups) / most):
            groups.append([])
        groups[-1].append(size)
        count += len(rows[size])
    lines = []
    for group in groups:
        own_requests = [request for size in group for request in rows[size]]
        latencies = sorted(latency for latency, _ in own_requests)
        good = sum(latency <= limit for latency, limit in own_requests) / len(own_requests)
        mean = sum(latencies) / len(latencies)
        lines.append((group[0], group[-1], len(latencies), mean, _quantile(latencies, 0.99), good))
    return lines


def limits_s(requests: Sequence[Request]) -> tuple[float, float]:
    """The least and the greatest latency limit of requests that all have one."""
    limits = [(request.slo_ns or 0) / NS_PER_S for request in requests]
    return min(limits), max(limits)
