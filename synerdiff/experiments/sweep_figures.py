"""The pictures of a sweep, drawn from its tables on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from synerdiff.config.experiment import Experiment, Workload
from synerdiff.experiments.grid_run import replayed
from synerdiff.experiments.sweep import Results
from synerdiff.results.metrics import TAIL_PERCENT, WARMUP_PERCENT
from synerdiff.results.records import read_table, work_table

if TYPE_CHECKING:
    import pandas

FOLDER = "figures"
_STAGE_PANELS = 3
_SHOWN_LOAD = 0.8


def draw_figures(experiment: Experiment, results: Results) -> list[Path]:
    """Draw the experiment's figures into the folder's ``figures``; the paths written.

    Load curves show the workloads that are not replayed as backlog; every replayed one has a picture per profile.
    """
    folder, dropped = results.folder, results.dropped
    from synerdiff.figures import comparison, lanes, load
    from synerdiff.figures.style import save

    runs: pandas.DataFrame = read_table(folder / "runs.parquet", {"key": "string"})[0].to_pandas()
    order = {entry.name: place for place, entry in enumerate(experiment.policies)}
    runs = runs[runs["purpose"] == "grid"].assign(place=runs["policy"].map(order))
    runs = runs.sort_values(["profile", "workload", "load", "seed", "place"], kind="stable")
    into = folder / FOLDER
    written: list[Path] = []
    curves = [workload for workload in experiment.workloads if not workload.backlog]
    if curves:
        shown = runs[runs["workload"].isin([workload.name for workload in curves])]
        caption = _caption(experiment, curves, dropped)
        if "latency-load" in experiment.figures:
            written += save(
                load.latency_against_load(shown, baseline=experiment.reference, caption=caption), into, "latency-load"
            )
        if "comparison" in experiment.figures and len(experiment.policies) > 1:
            figure = comparison.compare_at(shown, baseline=experiment.reference, caption=caption)
            written += save(figure, into, "comparison")
        if "throughput-load" in experiment.figures:
            written += save(load.throughput_against_load(shown, caption=caption), into, "throughput-load")
        if "tradeoff" in experiment.figures:
            written += save(load.throughput_against_p99(shown, caption=caption), into, "tradeoff")
        if "stages" in experiment.figures:
            loads = _spread(sorted(shown["load"].unique()))
            written += save(lanes.where_the_time_goes(shown, loads, caption=caption), into, "stages")
        if "lanes" in experiment.figures:
            written += _lanes(results, shown)
    if "backlog" in experiment.figures:
        for workload in experiment.workloads:
            if workload.backlog:
                written += _backlogs(experiment, workload, folder, runs[runs["workload"] == workload.name], dropped)
    return written


def _lanes(results: Results, runs: pandas.DataFrame) -> list[Path]:
    """Some seconds of every policy on every profile: one run of each, replayed, for the records keep no work."""
    from synerdiff.figures.lanes import lane_chart
    from synerdiff.figures.style import save

    written = []
    for profile, of_profile in runs.groupby("profile", sort=False):
        load = min(of_profile["load"].unique(), key=lambda load: abs(load - _SHOWN_LOAD))
        at_load = of_profile[of_profile["load"] == load]
        first = at_load[(at_load["workload"] == at_load["workload"].iloc[0])]
        first = first[first["seed"] == first["seed"].iloc[0]]
        works = {}
        for run in first.to_dict("records"):
            result = replayed(results.grid_runs[str(run["key"])])[-1]
            works[str(run["policy"])] = work_table(result.work, result.sample_names).to_pandas()
        figure = lane_chart(
            works,
            estimated=bool(first["estimated"].any()),
            title=f"What the lanes do: {profile}",
            caption=f"{first['workload'].iloc[0]} at load {load:g}, the same seconds of the same arrivals.",
        )
        written += save(figure, results.folder / FOLDER, f"lanes-{profile}")
    return written


def _backlogs(
    experiment: Experiment,
    workload: Workload,
    folder: Path,
    runs: pandas.DataFrame,
    dropped: Mapping[str, Mapping[str, int]],
) -> list[Path]:
    """One picture per profile, load and replicate: a backlog is one history, not a mean."""
    from synerdiff.figures.load import backlog_over_time
    from synerdiff.figures.style import save

    written = []
    for (profile, load, seed), group in runs.groupby(["profile", "load", "seed"], sort=False):
        tables: dict[str, pandas.DataFrame] = {}
        batches = []
        for run in group.to_dict("records"):
            tables[str(run["policy"])] = read_table(folder / "runs" / f"{run['key']}.parquet", {})[0].to_pandas()
            if run["batch"] == run["batch"]:
                batches.append(f"{run['policy']} {run['batch']:g}")
        scale = float(group["time_scale"].iloc[0])
        caption = f"{workload.name} on {profile}, mean load {load:g}. "
        if batches:
            caption += f"Batch sizes: {', '.join(batches)}. "
        figure = backlog_over_time(
            tables,
            estimated=bool(group["estimated"].any()),
            time_scale=scale,
            title=f"Requests in the system: {workload.name}",
            caption=caption + _drops([workload], dropped),
        )
        written += save(figure, folder / FOLDER, f"backlog-{workload.name}-{profile}-load{load:g}-{seed}")
    return written


def _caption(experiment: Experiment, workloads: Sequence[Workload], dropped: Mapping[str, Mapping[str, int]]) -> str:
    """What a reader must know to judge the curves."""
    texts = []
    generated = [workload for workload in workloads if workload.generator is not None]
    if generated:
        seeds = sorted({seed for workload in generated for seed in workload.seeds or experiment.seeds})
        counts = sorted({workload.requests or experiment.requests for workload in generated})
        size = " or ".join(f"{count:,}" for count in counts)
        texts.append(f"{size} requests a run, seeds {', '.join(str(seed) for seed in seeds)}.")
    if len(generated) < len(workloads):
        windows = sum(max(1, len(workload.windows)) for workload in workloads if workload.trace is not None)
        texts.append(f"{windows} windows of the trace, stretched in time to the load.")
    texts.append(f"First {WARMUP_PERCENT}% and last {TAIL_PERCENT}% of requests set aside.")
    if any(entry.searched for entry in experiment.policies):
        texts.append("Each policy at the batch size of least mean latency.")
    if experiment.skip_budget.fraction > 0:
        texts.append(f"At most {experiment.skip_budget.fraction:.0%} of an image's steps may skip guidance.")
    if experiment.skip_budget.min_ssim is not None:
        texts.append(f"Skips keep the mean SSIM at {experiment.skip_budget.min_ssim:g} or above (fidelity table).")
    return " ".join([*texts, _drops(workloads, dropped)]).strip()


def _drops(workloads: Sequence[Workload], dropped: Mapping[str, Mapping[str, int]]) -> str:
    texts = []
    for workload in workloads:
        if workload.trace is None:
            continue
        if dropped.get(workload.name):
            counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped[workload.name].items())
            texts.append(f"{workload.name}: dropped {counts}.")
        if workload.format == "gentd26":
            one = workload.parameters.get("checkpoints", "one") == "one"
            bare = workload.parameters.get("adapters", "keep") == "drop"
            merged = " and ".join(["checkpoints"] * one + ["LoRAs"] * bare)
            texts.append(f"{merged[0].upper()}{merged[1:]} counted as one model." if merged else "")
    return " ".join(dict.fromkeys(text for text in texts if text))


def _spread(loads: Sequence[float]) -> list[float]:
    """At most three of the loads: the ends and the middle."""
    if len(loads) <= _STAGE_PANELS:
        return list(loads)
    return [loads[0], loads[len(loads) // 2], loads[-1]]
