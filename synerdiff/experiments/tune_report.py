"""What a search shows: the sentence with its interval, tables, the figure, and files that the other commands take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from synerdiff.config.experiment import PolicyEntry
from synerdiff.config.tune import load_tuning
from synerdiff.experiments.backends import make_backend
from synerdiff.experiments.compare import MEASURES
from synerdiff.experiments.emit import Choice, check_engine, emit
from synerdiff.experiments.page import Printed
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.sweep import write_manifest
from synerdiff.experiments.tune import REFUSED, JudgedTrial, Search, Trial
from synerdiff.figures.style import save
from synerdiff.figures.tune import search_figure
from synerdiff.files import claim_folder, naming, write_json, write_rows, write_yaml
from synerdiff.profile.capacity import mix_of
from synerdiff.profile.folder import find_profile, shipped_profiles
from synerdiff.results.intervals import PairedRatio
from synerdiff.results.metrics import SLO_FACTOR

POLICY, SWEEP, CAPACITY = "policy.yaml", "sweep.yaml", "capacity.yaml"
RESULT, TRIALS, FIGURE = "tune.json", "trials.csv", "tune"


def open_tune(
    file: Path, out: Path | None, jobs: int | None, backend: str, address: str | None, engine: str | None
) -> Callable[[Callable[[int, int], None]], list[Printed]]:
    """What searches as a file says, telling (runs done, runs in all), and gives what is to be printed.

    InputError before any work for what does not fit.
    """
    tuning = load_tuning(file)
    runner = make_backend(backend, tuning.jobs if jobs is None else jobs, address)
    folder = Path("results") / tuning.name if out is None else out
    with naming(file):
        search = Search(tuning, file.parent, folder)
    check_engine(engine, [device.profile for device in search.grid.devices.values()])
    claim_folder(folder, f"tune {tuning.name}")

    def run(on_progress: Callable[[int, int], None]) -> list[Printed]:
        with naming(file):
            trials = search.trials(runner, on_progress)
            return publish(search, trials, search.judge(trials, runner, on_progress), engine)

    return run


def publish(search: Search, trials: Sequence[Trial], judged: JudgedTrial, engine: str | None = None) -> list[Printed]:
    """Write tables, the figure and the files for other commands; what is to be printed, the answer first."""
    tuning, folder = search.tuning, search.folder
    told = sentence(search, judged)
    chosen = judged.best.entry if judged.better else search.default
    rests = _rests_on(search, trials)
    _write_trials(search, trials)
    document = {
        "tuning": tuning.model_dump(mode="json"),
        "answer": told,
        "better": judged.better,
        "best": {"trial": judged.best.number, "values": dict(judged.best.values), "score": judged.best.score},
        "default": search.default_values(),
        "judged": {
            name: {"default": a, "best": b, **_ratio_plain(judged.ratios[name])}
            for name, (a, b) in judged.values.items()
        },
        "by_seed": {str(seed): value for seed, value in judged.by_seed.items()},
        "searched": [dimension._asdict() | {"kind": dimension.kind.__name__} for dimension in search.dimensions],
        "ssim": None if judged.ssim is None else {"default": judged.ssim[0], "best": judged.ssim[1]},
        "rests_on": rests,
    }
    write_json(folder / RESULT, document)
    files = _write_inputs(search, judged)
    column = search.measure.column
    figure = search_figure(
        [None if trial.score >= REFUSED else trial.score for trial in trials],
        judged.best.number,
        judged.by_seed,
        judged.ratios[column],
        objective(search),
        told,
        " ".join(rests[:2]),
        any(device.profile.estimated for device in search.grid.devices.values()),
    )
    save(figure, folder / "figures", FIGURE)
    write_manifest(folder, {"experiment": tuning.name, "complete": True})
    if engine is not None:
        files += [path.name for path in emit(engine, _choices(search, chosen, told), folder)]
    counts = f"{search.results.computed} runs computed now and {search.results.reused} found"
    names = ", ".join([RESULT, TRIALS, f"figures/{FIGURE}.png", *files])
    return [told, "", _parameters(search, judged), "", _measures(judged), "", *rests, f"{folder}: {names}; {counts}"]


def sentence(search: Search, judged: JudgedTrial) -> str:
    """Which values, what they bring on other seeds, and whether that can be told from nothing."""
    ratio, name = judged.ratios[search.measure.column], search.tuning.policy.name
    if judged.best.values == search.default_values():
        return f"No trial of {name} beats its default on the training seeds, so the default stays."
    values = ", ".join(f"{key} {_shown(value)}" for key, value in judged.best.values.items())
    title = objective(search)
    seeds = f"{ratio.seeds} other seed{'s' * (ratio.seeds > 1)}"
    text = f"{name} with {values}: {title} {ratio} times the default's on {seeds}"
    if judged.better:
        score = 1 / judged.best.score if search.measure.larger_is_better else judged.best.score
        return f"{text} (on the training seeds {score:.3f})."
    return f"{text}, which is not told from 1, so the default stays."


def objective(search: Search) -> str:
    """Its name within a sentence."""
    title = search.measure.title
    return title if title.startswith("P99") else title.lower()


def _parameters(search: Search, judged: JudgedTrial) -> Printed:
    default = search.default_values()
    rows = []
    for dimension in search.dimensions:
        if dimension.choices:
            tried = ", ".join(map(_shown, dimension.choices))
        else:
            tried = f"{dimension.low:g} to {dimension.high:g}{', log' if dimension.log else ''}"
        own = judged.best.values[dimension.name]
        rows.append([dimension.name, _shown(default.get(dimension.name, "-")), _shown(own), tried])
    return ["parameter", "default", "best", "searched"], rows


def _measures(judged: JudgedTrial) -> Printed:
    titles = {measure.column: measure.title for measure in MEASURES.values()}
    rows = [[titles[name], f"{a:.4g}", f"{b:.4g}", str(judged.ratios[name])] for name, (a, b) in judged.values.items()]
    if judged.ssim is not None:
        rows.append(["SSIM, by the fidelity table", *(f"{value:.4f}" for value in judged.ssim), "-"])
    return ["on judging seeds", "default", "best", "best / default [95%]"], rows


def _rests_on(search: Search, trials: Sequence[Trial]) -> list[str]:
    tuning = search.tuning
    what = "at saturation" if search.measure.saturated else f"at load {', '.join(f'{load:g}' for load in tuning.loads)}"
    own = [len(arrivals(source).requests) for source in (*search.training, *search.judging)]
    kinds = "windows" if tuning.workload.generator is None else "seeds"
    refused = sum(trial.score >= REFUSED for trial in trials)
    lines = [
        f"{len(trials)} trials for {objective(search)} {what} on {len(search.training)} training {kinds}, "
        f"judged on {len(search.judging)} others; workload {tuning.workload.name}, {min(own):,} requests each"
        + (f" to {max(own):,}." if max(own) > min(own) else "."),
        *(f"Profile {d.profile.name} is {d.profile.provenance}." for d in search.grid.devices.values()),
    ]
    if tuning.min_ssim is not None:
        lines.append(
            f"Guidance may be skipped as far as the fidelity table keeps SSIM at {tuning.min_ssim:g}, by the default "
            "too."
        )
    if refused:
        lines.append(f"{refused} trials are refused: they leave requests undone that the default serves, or no value.")
    return lines


def _write_trials(search: Search, trials: Sequence[Trial]) -> None:
    names = [dimension.name for dimension in search.dimensions]
    rows = [[t.number, *(t.values[n] for n in names), "" if t.score >= REFUSED else repr(t.score)] for t in trials]
    write_rows(search.folder / TRIALS, ["trial", *names, "score"], rows)


def _write_inputs(search: Search, judged: JudgedTrial) -> list[str]:
    """The policy that is advised, for every command; the best beside the default as a sweep and a capacity question."""
    tuning, folder, default, best = search.tuning, search.folder, search.default, judged.best.entry
    write_yaml(folder / POLICY, _entry(search, best if judged.better else default))
    entries = [_entry(search, default), _entry(search, best)]
    profiles = [
        name
        if name in shipped_profiles() and not (search.grid.base / name).is_dir()
        else _relative(find_profile(name, search.grid.base), folder)
        for name in tuning.profiles
    ]
    workload = tuning.workload.model_dump(mode="json", exclude_defaults=True)
    if tuning.workload.trace is not None:
        if "$" not in tuning.workload.trace:
            workload["trace"] = _relative(search.grid.base / tuning.workload.trace, folder)
        judging = tuning.workload.windows[len(search.training) :]
        workload["windows"] = [window.model_dump(mode="json") for window in judging]
    shared: dict[str, Any] = {"profiles": profiles, "requests": tuning.requests, "seeds": list(tuning.judge_seeds)}
    sweep: dict[str, Any] = {
        "name": f"{tuning.name}-sweep",
        **shared,
        "workloads": [workload],
        "policies": entries,
        "baselines": [default.name],
        "loads": list(tuning.loads),
        **({} if tuning.slo is None else {"slo": tuning.slo.model_dump(mode="json", exclude_none=True)}),
        **(
            {"saturation": True, "figures": ["throughput-load"]}
            if search.measure.saturated
            else {"figures": ["comparison"]}
        ),
    }
    write_yaml(folder / SWEEP, sweep)
    seconds = tuning.slo and tuning.slo.seconds
    by_latency = tuning.objective in ("mean", "p99") and seconds is not None
    capacity: dict[str, Any] = {
        "name": f"{tuning.name}-capacity",
        **shared,
        "workload": workload,
        "policies": entries,
        "slo": f"p99={seconds:g}s" if by_latency else "goodput=0.99",
        **({} if by_latency or seconds is None else {"slo_seconds": seconds}),
    }
    write_yaml(folder / CAPACITY, capacity)
    return [POLICY, SWEEP, CAPACITY]


def _entry(search: Search, entry: PolicyEntry) -> dict[str, Any]:
    """A policy as a file in the results' folder holds it."""
    data: dict[str, Any] = {"policy": entry.policy, "label": entry.name}
    if ":" in entry.policy:
        data["folder"] = _relative(search.base, search.folder)
    if isinstance(entry.batch, int):
        data["batch"] = entry.batch
    if entry.parameters:
        data["parameters"] = dict(entry.parameters)
    if entry.steps_scale != 1:
        data["steps_scale"] = entry.steps_scale
    if not entry.skip:
        data["skip"] = False
    budget = entry.skip_budget
    if budget is not None:
        section = budget.model_dump(mode="json", exclude_unset=True)
        if budget.fidelity is not None:
            section["fidelity"] = _relative(search.grid.base / budget.fidelity, search.folder)
        data["skip_budget"] = {name: value for name, value in section.items() if value is not None}
    return data


def _choices(search: Search, entry: PolicyEntry, told: str) -> list[Choice]:
    requests = [request for source in search.judging for request in arrivals(source).requests]
    batch = entry.batch if isinstance(entry.batch, int) else entry.parameters.get("batch")
    slo = search.tuning.slo
    limit = f"{slo.seconds:g} s" if slo and slo.seconds else f"{slo.solo_multiple if slo else SLO_FACTOR:g} times alone"
    basis = {"policy": entry.policy, "objective": search.tuning.objective, "slo": limit, "answer": told}
    rows = mix_of(requests).sample_rows
    return [Choice(device.profile, batch, rows, basis) for device in search.grid.devices.values()]


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())


def _ratio_plain(ratio: PairedRatio) -> dict[str, Any]:
    known = {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "seeds": ratio.seeds}
    return {name: None if value == float("inf") else value for name, value in known.items()}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
