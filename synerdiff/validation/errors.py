"""How far predictions were off: metric by metric over the repeats, with the stage in which they part.

A check is judged by the interval of the error: it passes when all of it lies inside the tolerance, fails when all of
it lies outside, and is unclear otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from synerdiff.core import NS_PER_S, InputError, WorkRecord
from synerdiff.experiments.run import Outcome
from synerdiff.profile.tables import Profile
from synerdiff.results.intervals import Interval, percentile_interval, t_interval
from synerdiff.results.metrics import latencies_s
from synerdiff.validation.session import Observation, Validation, ValidationCase

RELATIVE, POINTS, OF_LATENCY = "relative", "points", "of latency"

METRICS = {
    "step_time_s": ("step time", RELATIVE),
    "decode_time_s": ("decode time", RELATIVE),
    "request_throughput": ("throughput", RELATIVE),
    "request_latency_mean_s": ("mean latency", RELATIVE),
    "request_latency_p50_s": ("P50 latency", RELATIVE),
    "request_latency_p99_s": ("P99 latency", RELATIVE),
    "queue_mean_s": ("stage queue", OF_LATENCY),
    "denoise_mean_s": ("stage denoise", OF_LATENCY),
    "decode_wait_mean_s": ("stage decode wait", OF_LATENCY),
    "decode_mean_s": ("stage decode", OF_LATENCY),
    "lane_utilisation_gpu0_denoise": ("denoise lane busy", POINTS),
    "lane_utilisation_gpu0_decode0": ("decode lane busy", POINTS),
    "skip_fraction": ("guidance skipped", POINTS),
}
"""Metric -> its name, and how its error counts: measured / predicted - 1; the difference itself; or the difference as
a share of the predicted mean latency, because a stage of a few microseconds has no meaningful ratio."""


Verdict = Literal["passed", "unclear", "failed"]
FEWEST_FOR_MEDIAN = 6
"""Repeats from which on the median has a 95% interval of order statistics."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest errors: of stage times, throughput and the mean latency."""

    name: str
    stage: float
    throughput: float
    latency: float

    def limit(self, metric: str) -> float | None:
        """Of a metric; None where it is not judged."""
        limits = {"request_throughput": self.throughput, "request_latency_mean_s": self.latency}
        return self.stage if metric in ("step_time_s", "decode_time_s") else limits.get(metric)


TOLERANCES = {"strict": Tolerance("strict", 0.03, 0.03, 0.05), "cpu": Tolerance("cpu", 0.15, 0.15, 0.15)}
JUDGED = ("step_time_s", "decode_time_s", "request_throughput", "request_latency_mean_s")


def judged(low: float, high: float, limit: float) -> Verdict:
    """Of an error whose 95% interval is ``low`` to ``high``, against -limit to +limit."""
    if -limit <= low and high <= limit:
        return "passed"
    return "failed" if low > limit or high < -limit else "unclear"


def tolerance_of(name: str) -> Tolerance:
    """InputError lists the known ones."""
    if name not in TOLERANCES:
        raise InputError(f"--tolerance is '{name}'; allowed are {' and '.join(TOLERANCES)}.")
    return TOLERANCES[name]


@dataclass(frozen=True, slots=True)
class MetricError:
    """One metric of one case; medians over repeats."""

    measured: float
    predicted: float
    error: Interval | None
    """Median of the repeats' errors with its 95% interval (order statistics); None where none is defined."""
    repeats: tuple[tuple[float, float], ...]
    """(measured, predicted) per repeat."""
    errors: tuple[float, ...] = ()
    """Per repeat where one is defined."""

    @property
    def interval(self) -> Interval | None:
        """By which a check judges: the median's; of fewer repeats than that needs, Student's of the mean."""
        return self.error if self.error is None or len(self.errors) >= FEWEST_FOR_MEDIAN else t_interval(self.errors)


@dataclass(frozen=True, slots=True)
class Check:
    """One tolerance applied to one case."""

    case: ValidationCase
    what: str
    value: str
    allowed: str
    verdict: Verdict


@dataclass(slots=True)
class CaseErrors:
    """Prediction against measurement of one case, over its repeats."""

    case: ValidationCase
    metrics: dict[str, MetricError] = field(default_factory=dict)
    blame: str = ""
    faults: int = 0
    dispatch_s: dict[str, float] = field(default_factory=dict)
    """Median over all repeats of how long lanes stood idle between pieces."""
    latencies: list[tuple[int, float, float]] = field(default_factory=list)
    """Per request: id, predicted and measured latency in seconds, medians over repeats."""


def case_errors(session: Validation, case: ValidationCase) -> CaseErrors:
    """Compare the complete repeats of one case."""
    observed = session.observations[case][: session.repeats]
    errors = CaseErrors(case)
    pairs = []
    for one in observed:
        profile = session.profile_of(one)
        assert one.predicted is not None
        pairs.append((_metrics(one.measured, one, profile), _metrics(one.predicted, one, profile)))
        errors.faults += len(one.run.faults)
    for key, (_, kind) in METRICS.items():
        both = [(m, p) for m, p in pairs if m.get(key) is not None and p.get(key) is not None]
        known = [(m[key], p[key]) for m, p in both]
        errors_known = (_error(kind, m[key], p[key], p["request_latency_mean_s"]) for m, p in both)
        ratios = [error for error in errors_known if error is not None]
        if not known:
            continue
        middle = [median(side) for side in zip(*known, strict=True)]
        interval = percentile_interval(ratios, 0.5) if ratios else None
        errors.metrics[key] = MetricError(middle[0], middle[1], interval, tuple(known), tuple(ratios))
    errors.blame = _blame(errors)
    for name, values_ns in (("step", "step_ns"), ("chunk", "chunk_ns"), ("decide", "decide_ns")):
        every = [value for one in observed for value in getattr(one.run.dispatch, values_ns)]
        errors.dispatch_s[name] = median(every) / NS_PER_S if every else 0.0
    errors.latencies = _latencies(observed)
    return errors


def checks(errors: CaseErrors, tolerance: Tolerance) -> list[Check]:
    """The verdicts on one case."""
    case = errors.case
    names = [name for name in JUDGED if not (case.saturated and "latency" in name)]
    faults = Check(case, "faults", str(errors.faults), "none", "failed" if errors.faults else "passed")
    return [*(_check(errors, name, tolerance) for name in names), faults]


def _check(errors: CaseErrors, key: str, tolerance: Tolerance) -> Check:
    limit, name = tolerance.limit(key), METRICS[key][0]
    assert limit is not None
    metric, allowed = errors.metrics.get(key), f"within {limit:.0%}"
    if metric is None or (interval := metric.interval) is None:
        return Check(errors.case, name, "not measured", allowed, "unclear")
    text = f"{interval.value:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"
    return Check(errors.case, name, text, allowed, judged(interval.low, interval.high, limit))


def tally(verdicts: Iterable[Verdict]) -> str:
    """``12 passed, 3 unclear, 1 failed``."""
    counts = Counter(verdicts)
    kinds: tuple[Verdict, ...] = ("passed", "unclear", "failed")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds)


def _error(kind: str, measured: float, predicted: float, mean_latency_s: float) -> float | None:
    if kind == RELATIVE:
        return measured / predicted - 1 if predicted else None
    return (measured - predicted) / (mean_latency_s if kind == OF_LATENCY else 1.0)


def _metrics(run: Outcome, one: Observation, profile: Profile) -> dict[str, Any]:
    """The run's summary, and step and decode times at the mix of pieces that was measured."""
    measured, work = one.run.result.work, run.result.work
    return run.summary | {
        "step_time_s": _step_time_s(measured, work, profile),
        "decode_time_s": _decode_time_s(measured, work),
    }


def _step_time_s(measured: Sequence[WorkRecord], work: Sequence[WorkRecord], profile: Profile) -> float | None:
    """Mean duration of ``work``'s steps, weighted by how often ``measured`` has steps of each bucket.

    The two runs' batches differ a little, so plain means would compare different steps. A bucket that ``work`` has not
    counts with the profile's solo time.
    """
    counts = Counter(profile.bucket(record.rows) for record in measured if record.kind == "step")
    if not counts:
        return None
    means_ns = _means_ns((profile.bucket(record.rows), record) for record in work if record.kind == "step")
    total = sum(count * (means_ns.get(rows) or profile.step_ns(rows)) for rows, count in counts.items())
    return total / counts.total() / NS_PER_S


def _means_ns(pieces: Iterable[tuple[int, WorkRecord]]) -> dict[int, float]:
    """Mean duration of the pieces under each number."""
    times: dict[int, list[int]] = {}
    for number, record in pieces:
        times.setdefault(number, []).append(record.end_ns - record.start_ns)
    return {number: sum(own) / len(own) for number, own in times.items()}


def _decode_time_s(measured: Sequence[WorkRecord], work: Sequence[WorkRecord]) -> float | None:
    """Sum over the chunks of a decode of their mean durations; chunks that only one of the runs has are left out."""
    means_ns = _means_ns((record.chunk, record) for record in work if record.kind == "chunk")
    common = {record.chunk for record in measured if record.kind == "chunk"} & means_ns.keys()
    return sum(means_ns[i] for i in common) / NS_PER_S if common else None


def _latencies(observed: Sequence[Observation]) -> list[tuple[int, float, float]]:
    """Medians over repeats, for requests that were done in all of them."""
    predicted: dict[int, list[float]] = {}
    measured: dict[int, list[float]] = {}
    for one in observed:
        assert one.predicted is not None
        for latencies, run in ((predicted, one.predicted), (measured, one.measured)):
            done = [record for record in run.result.requests if record.status == "done"]
            for record, latency_s in zip(done, latencies_s(done), strict=True):
                latencies.setdefault(record.request.request_id, []).append(latency_s)
    complete = [i for i in sorted(predicted) if len(predicted[i]) == len(measured.get(i, ())) == len(observed)]
    return [(i, median(predicted[i]), median(measured[i])) for i in complete]


def _blame(errors: CaseErrors) -> str:
    """One sentence: where the mean latency was gained or lost against the prediction."""
    latency = errors.metrics.get("request_latency_mean_s")
    if errors.case.saturated or latency is None or latency.error is None:
        return ""
    parts = {
        label.removeprefix("stage "): metric.error.value
        for key, (label, kind) in METRICS.items()
        if kind == OF_LATENCY and (metric := errors.metrics.get(key)) is not None and metric.error is not None
    }
    worst = max(parts, key=lambda stage: abs(parts[stage]))
    listed = ", ".join(f"{stage} {value:+.1%}" for stage, value in parts.items())
    total = f"mean latency {latency.error.value:+.1%}"
    return f"{total}, most of it in the stage {worst} (shares of the predicted mean: {listed})"
