"""What runs of a grid say about policies (or fleets): paired ratios with intervals, and the best of each cell.

All that is compared ran on the same requests, so ratios are geometric means over seeds of run by run, with 95% t
intervals of the paired logarithms. Two whose interval holds 1 are tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from synerdiff.results.intervals import PairedRatio, paired_log_ratio

Row = Mapping[str, Any]


class GridCell(NamedTuple):
    """Where runs are compared: the columns of ``runs.parquet`` that are equal for all."""

    profile: str
    contention: float
    decode_share: float
    decode_gpus: str
    """The GPU of each decode lane, separated by commas; of a fleet empty."""
    fleet: str
    gpus: int
    workload: str
    lora_share: float | None

    @classmethod
    def of(cls, row: Row) -> GridCell:
        return cls(**{name: row[name] for name in cls._fields})

    @property
    def asked(self) -> str:
        """The workload in words."""
        return self.workload if self.lora_share is None else f"{self.workload}, {self.lora_share:.0%} with LoRAs"

    @property
    def beside(self) -> bool:
        """Whether a decode lane is on the denoiser's GPU."""
        return "0" in self.decode_gpus.split(",")

    @property
    def machine(self) -> str:
        """The profile in words: how it was changed, and what decodes where."""
        place = self.fleet and f", {self.fleet} on {self.gpus} GPUs"
        if self.decode_gpus and not self.beside:
            place += ", decode on a second GPU"
        factors = f", contention x{self.contention:g}" if self.contention != 1 and not place else ""
        factors += f", decode x{self.decode_share:g}" if self.decode_share != 1 else ""
        return f"{self.profile}{factors}{place}"

    @property
    def text(self) -> str:
        return f"{self.asked} on {self.machine}"


class Measure(NamedTuple):
    """A column by which is judged."""

    column: str
    title: str
    larger_is_better: bool
    saturated: bool


MEASURES = {
    "saturation": Measure("saturation_throughput", "Throughput", larger_is_better=True, saturated=True),
    "cost": Measure("gpu_seconds_per_image", "GPU-seconds per image", larger_is_better=False, saturated=True),
    "mean": Measure("request_latency_mean_s", "Mean latency", larger_is_better=False, saturated=False),
    "p99": Measure("request_latency_p99_s", "P99 latency", larger_is_better=False, saturated=False),
    "goodput": Measure("goodput", "Goodput", larger_is_better=True, saturated=False),
}
At = tuple[str, float | None]
"""(measure, load); the load is None at saturation."""


@dataclass(frozen=True, slots=True)
class PairedRuns:
    """The rows of a grid by cell, measure and name (of a policy, or of a fleet)."""

    values: Mapping[GridCell, Mapping[At, Mapping[str, Mapping[int, float]]]]
    """cell -> (measure, load) -> name -> seed -> value; a run without a value has none here either."""
    skips: Mapping[tuple[GridCell, float | None, str], float]
    """(cell, load, name) -> mean share of guided sample-steps that skipped."""
    estimated: Mapping[GridCell, bool]
    """Whether the cell's profile was estimated, or changed."""

    def gain(self, cell: GridCell, at: At, name: str, other: str) -> PairedRatio | None:
        """How much better: the ratio of the two, above 1 where ``name`` is better; None where a run has no value."""
        mine, theirs = (self.values[cell][at].get(each, {}) for each in (name, other))
        values = [*mine.values(), *theirs.values()]
        if not values or sorted(mine) != sorted(theirs) or min(values) <= 0:
            return None
        return paired_log_ratio(mine, theirs) if MEASURES[at[0]].larger_is_better else paired_log_ratio(theirs, mine)

    def best(self, cell: GridCell, at: At, among: Iterable[str]) -> str | None:
        """The best of these by mean over seeds, ties to the first; None when none has a value in every seed."""
        values = self.values[cell][at]
        seeds = max(len(runs) for runs in values.values())
        whole = [name for name in among if len(values.get(name, ())) == seeds and min(values[name].values()) > 0]
        sign = 1 if MEASURES[at[0]].larger_is_better else -1
        return max(whole, key=lambda name: sign * fmean(values[name].values()), default=None)


def compare(rows: Iterable[Row], by: str = "policy") -> PairedRuns:
    """The rows of a grid by what is compared: ``policy``, or ``fleet``."""
    values: dict[GridCell, dict[At, dict[str, dict[int, float]]]] = {}
    skips: dict[tuple[GridCell, float | None, str], list[float]] = {}
    estimated: dict[GridCell, bool] = {}
    for row in rows:
        cell = GridCell.of(row)
        cell, name, load = (cell._replace(fleet="") if by == "fleet" else cell), row[by], row["load"]
        for measure, how in MEASURES.items():
            if how.saturated is (load is None) and row.get(how.column) is not None:
                place = values.setdefault(cell, {}).setdefault((measure, load), {})
                place.setdefault(name, {})[row["seed"]] = row[how.column]
        skips.setdefault((cell, load, name), []).append(row["skip_fraction"] or 0.0)
        estimated[cell] = bool(row["estimated"])
    return PairedRuns(values, {place: fmean(shares) for place, shares in skips.items()}, estimated)


@dataclass(frozen=True, slots=True)
class Best:
    """The best policy of a cell, its gain over the best baseline, and that of the subject over it."""

    cell: GridCell
    measure: str
    load: float | None
    policy: str
    """The subject left out."""
    ties: tuple[str, ...]
    """Others that the interval does not tell from it."""
    baseline: str
    gain: PairedRatio
    """1 to 1 where the best baseline is the best of all."""
    subject_gain: PairedRatio | None
    """None without a subject, and where it has no value."""


def best_of_cells(
    paired: PairedRuns, policies: Sequence[str], baselines: Sequence[str], subject: str | None = None
) -> list[Best]:
    """Per cell and measure who is best, and how the subject compares with that; cells without values are left out."""
    others = [policy for policy in policies if policy != subject]
    rows = []
    for cell, at in ((cell, at) for cell, measures in paired.values.items() for at in measures):
        best, baseline = paired.best(cell, at, others), paired.best(cell, at, baselines)
        if best is None or baseline is None:
            continue
        gain = paired.gain(cell, at, best, baseline)
        assert gain is not None  # both have a value in every seed
        ties = tuple(name for name in others if name != best and tied(paired.gain(cell, at, best, name)))
        own = None if subject is None else paired.gain(cell, at, subject, best)
        rows.append(Best(cell, *at, best, ties, baseline, gain, own))
    return rows


def tied(ratio: PairedRatio | None) -> bool:
    """Whether the interval holds 1; with one seed nothing is known about it, so two are never tied."""
    return ratio is not None and ratio.seeds > 1 and ratio.low <= 1 <= ratio.high


def shortfalls(rows: Iterable[Best], tolerance: float) -> list[Best]:
    """The cells in which the subject is more than the tolerance behind the best of the others."""
    return [row for row in rows if row.subject_gain is not None and row.subject_gain.ratio < 1 - tolerance]
