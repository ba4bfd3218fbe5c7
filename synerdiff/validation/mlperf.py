"""MLPerf's SDXL server runs, replayed: real fleets whose exact arrivals follow from a seed.

Per run: the schedule of LoadGen, one GPU's profile from the Offline result of the same machine, one shared queue with
the harness' batch and limit, and a host time per image, which Offline hides. That is the one constant that is fitted,
once in each software generation (the major version of the round), on one run; others of the generation take it as is.
Sources and numbers are in ``mlperf_sdxl_server.csv``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

from profiler.datasheets import GPUS, gpu_key
from profiler.imported import SHAPE_GPU, Throughput, throughput_profile
from synerdiff.config.cluster import cluster_of
from synerdiff.core import InputError, Request
from synerdiff.experiments.page import Printed
from synerdiff.experiments.run import RunSpec, execute, prepare
from synerdiff.figures.style import save
from synerdiff.figures.validation import latency_percentiles
from synerdiff.files import Row, claim_folder, read_rows, write_rows, write_yaml
from synerdiff.profile.folder import write_profile
from synerdiff.profile.tables import Profile
from synerdiff.results.metrics import latencies_s
from traces.generate import generate_trace
from traces.native import write_trace
from traces.spec import trace_spec

RUNS_FILE = Path(__file__).with_name("mlperf_sdxl_server.csv")
COLUMNS = (
    "run", "gpu", "gpus", "loadgen_schedule_seed", "target_qps", "min_duration_s", "min_queries", "batch",
    "batching_limit_s", "steps", "guidance_scale", "offline_samples_per_s", "source",
)  # fmt: skip
PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p97": 0.97, "p99": 0.99}
JUDGED = ("mean", *PERCENTILES)
SHOWN = (*JUDGED, "min", "max")
"""The ends of a run are shown and not judged."""
FITTED_ON = {4: "h100x8-v4.1", 5: "h200x8-v5.0"}
"""Generation -> the run that its host time was fitted on, by `fit_host_s`."""
HOST_S = {4: 0.0129, 5: 0.0087}
"""Generation -> host time per image, seconds; a test holds them against the fit."""


@dataclass(frozen=True, slots=True)
class ServerRun:
    """One published run. ``published``: measure (of SHOWN) -> seconds."""

    name: str
    gpu: str
    gpus: int
    seed: int
    rate_per_s: float
    duration_s: float
    min_requests: int
    batch: int
    max_wait_s: float
    steps: int
    guidance_scale: float
    images_per_s: float
    source: str
    published: Mapping[str, float]

    @property
    def generation(self) -> int:
        """Major version of the round, in the run's name or source; 0 where neither says."""
        version = re.search(r"v(\d+)\.\d", self.name) or re.search(r"v(\d+)\.\d", self.source)
        return int(version[1]) if version else 0

    @property
    def throughput(self) -> Throughput:
        """The Offline throughput of the same machine, as a profile is imported from it."""
        key = gpu_key(self.gpu)
        return Throughput(
            self.images_per_s, self.gpus, self.batch, self.steps, self.guidance_scale > 1,
            gpu=key if key in GPUS else SHAPE_GPU,
        )  # fmt: skip

    def profile(self) -> Profile:
        """That of one GPU of the machine."""
        return throughput_profile(self.throughput, self.name, self.source)

    def requests(self) -> list[Request]:
        """LoadGen's schedule."""
        fields = {
            "kind": "mlperf", "seed": self.seed, "rate_per_s": self.rate_per_s, "duration_s": self.duration_s,
            "min_requests": self.min_requests, "steps": self.steps, "guidance_scale": self.guidance_scale,
        }  # fmt: skip
        return generate_trace(trace_spec(fields, f"run {self.name}"))

    def cluster(self, host_s: float) -> dict[str, Any]:
        """The fields of a cluster file."""
        return {
            "workers": {"count": self.gpus, "sample_host_s": host_s},
            "router": {"kind": "shared-queue", "batch": self.batch, "max_wait_s": self.max_wait_s},
        }

    def spec(self, host_s: float) -> RunSpec:
        """The run with so much host time per image."""
        return RunSpec(
            profile=self.profile(),
            source=tuple(self.requests()),
            policy="static",
            parameters={"batch": self.batch},
            cluster=cluster_of(self.cluster(host_s), f"run {self.name}"),
        )

    def commands(self) -> list[str]:
        """What makes this prediction by hand, in the folder that the scorecard writes."""
        guided = "--guided" if self.throughput.guided else "--unguided"
        return [
            f"synerdiff profile import throughput --images-per-s {self.images_per_s:g} --gpus {self.gpus} --batch "
            f"{self.batch} --steps {self.steps} {guided} --gpu {self.throughput.gpu} --out {self.name}/profile",
            f"synerdiff trace generate mlperf --seed {self.seed} --rate {self.rate_per_s:g} --duration "
            f"{self.duration_s:g} --min-requests {self.min_requests} --steps {self.steps} --guidance-scale "
            f"{self.guidance_scale:g} --out {self.name}/trace.csv",
            f"synerdiff simulate --profile {self.name}/profile --trace {self.name}/trace.csv --cluster "
            f"{self.name}/cluster.yaml --policy static --set batch={self.batch} --out {self.name}/run",
        ]


def runs_in(data: Path | None) -> Path | None:
    """The table of runs that is meant: ``data`` itself, or the one in that folder; None: the committed one."""
    if data is None or data.is_file():
        return data
    return data / RUNS_FILE.name if (data / RUNS_FILE.name).is_file() else None


def read_runs(path: Path = RUNS_FILE) -> list[ServerRun]:
    """The runs of a table; a latency that is not given is not judged. InputError names file and line."""
    latencies = [f"latency_{measure}_s" for measure in SHOWN]
    runs = [_run(row) for row in read_rows(path, COLUMNS, "table of MLPerf runs", latencies)]
    if not runs:
        raise InputError(f"{path}: it has no run.")
    if len({run.name for run in runs}) < len(runs):
        raise InputError(f"{path}: a run's name is given twice.")
    return runs


def _run(row: Row) -> ServerRun:
    name = row.name("run")
    if set(name) & set("/\\") or name.startswith("."):
        raise row.error("run", f"is {name!r}; a name without slashes is needed")
    return ServerRun(
        name=name,
        gpu=row.name("gpu"),
        gpus=row.integer("gpus", 1, 4096),
        seed=row.integer("loadgen_schedule_seed", 0, 2**64 - 1),
        rate_per_s=row.number("target_qps", 1e-6, 1e6),
        duration_s=row.number("min_duration_s", 1e-3, 1e6),
        min_requests=row.integer("min_queries", 0, 10**6),
        batch=row.integer("batch", 1, 4096),
        max_wait_s=row.number("batching_limit_s", 0, 3600),
        steps=row.integer("steps", 1, 1000),
        guidance_scale=row.number("guidance_scale", 0, 1000),
        images_per_s=row.number("offline_samples_per_s", 1e-6, 1e6),
        source=row.name("source"),
        published={
            measure: row.number(f"latency_{measure}_s", 1e-6, 1e6)
            for measure in SHOWN
            if row.text(f"latency_{measure}_s")
        },
    )


def latencies_of(spec: RunSpec, time_scale: float = 1.0) -> dict[str, float]:
    """Measure -> seconds, over every request (LoadGen sets none aside), of one simulated run at that stretch."""
    ordered = sorted(latencies_s(execute(prepare(replace(spec, time_scale=time_scale))).result.requests))
    count = len(ordered)
    at = {name: ordered[min(count - 1, int(share * count))] for name, share in PERCENTILES.items()}
    return {"mean": sum(ordered) / count, **at, "min": ordered[0], "max": ordered[-1]}


def errors_of(run: ServerRun, predicted: Mapping[str, float], measures: Iterable[str] = JUDGED) -> dict[str, float]:
    """Measure -> predicted / published - 1, of those that are published."""
    return {name: predicted[name] / run.published[name] - 1 for name in measures if name in run.published}


def fit_host_s(run: ServerRun, tried: int = 6) -> float:
    """The host time per image with the least squared relative error of mean and percentiles, to 0.1 ms.

    Gauss-Newton with the slope between the last two tries, from 10 and 11 ms.
    """
    errors: dict[float, list[float]] = {}

    def look(host_s: float) -> list[float]:
        if host_s not in errors:
            errors[host_s] = list(errors_of(run, latencies_of(run.spec(host_s))).values())
        return errors[host_s]

    last, now = 0.010, 0.011
    for _ in range(tried):
        slope = [(b - a) / (now - last) for a, b in zip(look(last), look(now), strict=True)]
        step = -sum(s * e for s, e in zip(slope, look(now), strict=True)) / sum(s * s for s in slope)
        coming = round(min(max(now + step, 0.0), now + 0.01), 4)
        if coming in errors:
            break
        last, now = now, coming
    return min(errors, key=lambda host_s: sum(error * error for error in look(host_s)))


def sustainable(run: ServerRun, spec: RunSpec, mean_s: float) -> tuple[float, float]:
    """(error in sustainable rate, growth of the mean for one percent of rate).

    The rate at which the simulation has the published mean, over the target rate, minus 1: regula falsi on the
    logarithms, to 0.02%.
    """
    target = log(run.published["mean"])
    known = {0.0: log(mean_s) - target}
    step = -0.005 if known[0.0] > 0 else 0.005
    change = step
    for _ in range(8):
        known[change] = log(latencies_of(spec, 1 / (1 + change))["mean"]) - target
        below = max((c for c, off in known.items() if off <= 0), default=None)
        above = min((c for c, off in known.items() if off > 0), default=None)
        if below is None or above is None:
            step *= 2
            change += step
            continue
        if above - below < 4e-4:
            break
        share = -known[below] / (known[above] - known[below])
        change = below + (above - below) * min(max(share, 0.1), 0.9)
    a, b = sorted(sorted(known, key=lambda c: (abs(known[c]), c))[:2])
    slope = (known[b] - known[a]) / (b - a)
    root = a - known[a] / slope if slope else a
    return root, slope / 100


@dataclass(frozen=True, slots=True)
class Replayed:
    """A run, what was predicted for it, and with which host time."""

    run: ServerRun
    host_s: float
    fitted_on: str
    predicted: Mapping[str, float]
    rate_error: float
    growth: float
    """Of the mean, as a share, for one percent of rate."""

    @property
    def errors(self) -> dict[str, float]:
        """Relative error per published latency."""
        return errors_of(self.run, self.predicted)

    @property
    def mean_error(self) -> float:
        """Mean size of the judged errors."""
        return sum(map(abs, self.errors.values())) / len(self.errors)


def host_time(run: ServerRun, runs: Sequence[ServerRun]) -> tuple[float, str]:
    """(host time per image, the run that it was fitted on): the generation's, else fitted on its first run here."""
    if run.generation in HOST_S:
        return HOST_S[run.generation], FITTED_ON[run.generation]
    first = next(other for other in runs if other.generation == run.generation)
    return fit_host_s(first), first.name


def replay(run: ServerRun, host_s: float, fitted_on: str, rate: bool = True) -> Replayed:
    """Predict one run; without ``rate`` its error in sustainable rate is left out (NaN)."""
    spec = run.spec(host_s)
    predicted = latencies_of(spec)
    rate_error, growth = float("nan"), float("nan")
    if rate and "mean" in run.published:
        rate_error, growth = sustainable(run, spec, predicted["mean"])
    return Replayed(run, host_s, fitted_on, predicted, rate_error, growth)


def score_mlperf(
    out: Path | None, table: Path | None = None, update: Callable[..., None] = lambda done, total, text: None
) -> list[Printed]:
    """The answer, a table and lines on all runs of the committed table, or of one of its shape; written into ``out``.

    There stand ``mlperf.csv``, a figure, and per run a folder with what its commands need.
    """
    runs = read_runs(RUNS_FILE if table is None else table)
    replayed: list[Replayed] = []
    for done, run in enumerate(runs):
        update(done, len(runs), run.name)
        replayed.append(replay(run, *host_time(run, runs)))
    update(len(runs), len(runs), "")
    if out is not None:
        _write(out, replayed)
    lines = [line for one in replayed for line in _said(one)]
    errors = ", ".join(f"{one.run.name} {one.mean_error:.1%}" for one in replayed)
    answer = f"MLPerf's SDXL server runs, mean error of the published latencies: {errors}."
    return [answer, "Predicted / published - 1, and the same of the sustainable rate:", _table(replayed), *lines]


def _table(replayed: Sequence[Replayed]) -> tuple[list[str], list[list[str]]]:
    headers = ["run", *JUDGED, "mean |e|", "rate"]
    rows = []
    for one in replayed:
        errors = [f"{one.errors[name]:+.1%}" if name in one.errors else "" for name in JUDGED]
        rows.append([one.run.name, *errors, f"{one.mean_error:.1%}", f"{one.rate_error:+.2%}"])
    return headers, rows


def _said(one: Replayed) -> list[str]:
    run = one.run
    how = "fitted on this run" if one.fitted_on == run.name else f"fitted on {one.fitted_on}, not on this run"
    ends = ", ".join(
        f"{name} {one.predicted[name]:.2f} s ({run.published[name]:.2f} published)"
        for name in ("min", "max")
        if name in run.published
    )
    return [
        f"{run.name}: host time {1000 * one.host_s:.1f} ms an image, {how}; 1% of rate moves the mean by "
        f"{one.growth:.0%}",
        *([f"  not judged: {ends}"] if ends else []),
        *(f"  $ {command}" for command in run.commands()),
    ]


def _write(out: Path, replayed: Sequence[Replayed]) -> None:
    import pandas as pd

    lines = [
        [one.run.name, name, one.run.published[name], f"{one.predicted[name]:.6g}", one.host_s, one.fitted_on,
         int(name in JUDGED), f"{error:.6g}"]
        for one in replayed
        for name, error in errors_of(one.run, one.predicted, SHOWN).items()
    ]  # fmt: skip
    lines += [
        [one.run.name, "rate", one.run.rate_per_s, f"{one.run.rate_per_s * (1 + one.rate_error):.6g}", one.host_s,
         one.fitted_on, 1, f"{one.rate_error:.6g}"]
        for one in replayed
    ]  # fmt: skip
    columns = ("run", "measure", "published", "predicted", "host_s", "fitted_on", "judged", "error")
    write_rows(out / "mlperf.csv", columns, lines)
    frame = pd.DataFrame(lines, columns=list(columns)).astype({"predicted": float, "error": float})
    save(latency_percentiles(frame[frame["measure"] != "rate"]), out, "mlperf")
    for one in replayed:
        folder = out / one.run.name
        claim_folder(folder / "profile", "profile import")
        write_profile(folder / "profile", one.run.profile())
        write_trace(folder / "trace.csv", one.run.requests())
        write_yaml(folder / "cluster.yaml", one.run.cluster(one.host_s))
