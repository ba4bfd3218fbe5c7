"""The three mechanisms of SwiftDiffusion on a CPU: predicted latency against the measured one, alone and under load.

``python -m benchmarks.swift_on_cpu --out FILE.csv``, which also draws FILE.png. In one process and in rounds, so that
drift reaches all alike: the cells that a prediction needs (steps and decodes from plain runs, adapters.csv as
``synerdiff profile --adapters`` measures it), then every way of serving with one request alone, now and then also under
load. The simulator gets means over all rounds, and its prediction is compared with the mean latency. Processes beside
the worker are the runner's own.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from policies.base import Policy
from policies.registry import build_policy
from profiler.adapter_cells import drop_from_cache, open_session
from profiler.bench import Bench
from profiler.measure import measure_profile
from profiler.sampling import QUICK
from profiler.settings import make_settings
from real_runner.adapters.serving import Folders, Serving
from real_runner.adapters.start import open_serving
from real_runner.engine import RealRun, run_real
from real_runner.hardware import Hardware, open_hardware
from simulator import simulate_cluster
from synerdiff.config.cluster import MIB, Cluster, cluster_of
from synerdiff.core import NS_PER_S, ControlNetUse, LoraUse, Request, RunResult
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.controlnet import random_controlnet
from synerdiff.diffusion.lora import random_lora, save_lora
from synerdiff.figures.style import finish, legend_above, new_figure, save, styled
from synerdiff.files import write_rows
from synerdiff.profile.adapters import QUANTITIES, Adapters
from synerdiff.profile.tables import Profile, Spread
from synerdiff.results.metrics import latencies_s
from synerdiff.validation.calibration import CellTimes, cell_times, joined, refreshed

BOUND = 5
RANK = 16
GUIDANCE = 4.0
NET, LORA = (ControlNetUse("net", image="1.png"),), (LoraUse("style"),)
SERVICE, LOADER = {"controlnets": "service"}, {"loras": "asynchronous", "lora_bound_steps": BOUND}
HALVES = {"guidance": "two-gpus"}
CELLS_PER_ROUND = 2
"""On a shared machine the same piece takes 5 ms now and 9 ms a moment later: cells need many samples too."""
GAP_S = 0.4
"""Between requests under load, on average."""


@dataclass(frozen=True)
class ServingCase:
    """Requests and a way of serving them; a measurement is their mean latency."""

    name: str
    strategies: dict[str, Any]
    requests: list[Request]
    batch: int = 1

    def policy(self) -> Policy:
        return build_policy("continuous-serial", {"batch": self.batch})


def one_request(steps: int) -> list[ServingCase]:
    """Each way of serving with one request alone."""

    ways: list[tuple[str, dict[str, Any], tuple[ControlNetUse, ...], tuple[LoraUse, ...]]] = [
        ("plain", {}, (), ()),
        ("ControlNet inline", {}, NET, ()),
        ("ControlNet as a service", SERVICE, NET, ()),
        ("LoRA synchronous", {}, (), LORA),
        ("LoRA asynchronous", LOADER, (), LORA),
        ("guidance in two processes", HALVES, (), ()),
        ("ControlNet and LoRA, all in one process", {}, NET, LORA),
        ("ControlNet and LoRA, service and asynchronous", SERVICE | LOADER, NET, LORA),
        ("ControlNet and LoRA, all three (four processes)", SERVICE | LOADER | HALVES, NET, LORA),
    ]
    request = Request(0, 0, steps, guidance_scale=GUIDANCE, seed=1)
    return [
        ServingCase(name, how, [replace(request, controlnets=nets, loras=loras)]) for name, how, nets, loras in ways
    ]


def under_load(steps: int, count: int) -> list[ServingCase]:
    """Some ways with the same Poisson arrivals: plain, with a ControlNet, with a LoRA, with both, in turn; batch 2."""
    gaps = random.Random(1)
    arrival_s, requests = 0.0, []
    for number in range(count):
        controlnets = NET if number % 2 else ()
        loras = LORA if number % 4 > 1 else ()
        requests.append(
            Request(
                number, round(arrival_s * NS_PER_S), steps, guidance_scale=GUIDANCE, seed=number,
                controlnets=controlnets, loras=loras,
            )
        )  # fmt: skip
        arrival_s += gaps.expovariate(1 / GAP_S)
    ways: dict[str, dict[str, Any]] = {
        "all in one process": {},
        "service": SERVICE,
        "asynchronous": LOADER,
        "both": SERVICE | LOADER,
    }
    return [ServingCase(f"under load, {name}", strategies, requests, batch=2) for name, strategies in ways.items()]


def cluster_for(strategies: dict[str, Any], lora_bytes: int) -> Cluster:
    """One worker with the GPUs that the strategies need."""
    worker: dict[str, Any] = {"denoise_gpu": 0}
    if strategies.get("guidance") == "two-gpus":
        worker["guidance_gpu"] = 1
    services = [{"gpu": 2, "controlnets": ["net"]}] if strategies.get("controlnets") == "service" else []
    fields = {"workers": [worker], "strategies": strategies, "controlnet_services": services}
    return cluster_of({**fields, "loras": {"mib": lora_bytes / MIB}})


def make_folders(root: Path) -> tuple[Folders, int]:
    """A LoRA, a ControlNet and a conditioning image; and the LoRA's bytes."""
    model = load_model("digits")
    for name in ("loras", "controlnets", "images"):
        (root / name).mkdir()
    size = save_lora(
        random_lora(model.unet, LORA[0].file, RANK), root / "loras" / f"{LORA[0].file}.safetensors"
    ).size_bytes
    random_controlnet("net", model).net.save_pretrained(str(root / "controlnets" / "net"))
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(root / "images" / "1.png")
    return Folders(root / "loras", root / "controlnets", root / "images"), size


def plain_cases(steps: int) -> list[ServingCase]:
    """Without adapters, so that steps have 1, 2 and 4 rows."""

    of_rows = [[Request(i, 0, steps, guidance_scale=GUIDANCE, seed=i) for i in range(batch)] for batch in (1, 2)]
    of_rows.insert(0, [replace(of_rows[0][0], guidance_scale=1.0)])
    return [ServingCase("plain", {}, requests, batch=len(requests)) for requests in of_rows]


def plain_cells(cases: list[ServingCase], hardware: Hardware, profile: Profile) -> CellTimes:
    """Steps, decodes and overheads as the runner has them when step follows step."""
    return joined([cell_times(case.policy().chunking, served(case, profile, hardware)) for case in cases])


def served(case: ServingCase, profile: Profile, hardware: Hardware, serving: Serving | None = None) -> RealRun:
    """The case's run, in which nothing went wrong."""
    run = run_real(case.requests, case.policy(), profile, hardware, serving=serving)
    assert run.error is None, run.error
    assert not run.faults, run.faults
    return run


def means_of(samples: dict[tuple[str, int], list[int]], adapters: Adapters) -> Adapters:
    """The table with means of all times in the place where lookups look."""

    def mean(name: str, at: int, spread: Spread) -> Spread:
        taken = samples.get((name, at))
        return spread.around(spread.median if taken is None or QUANTITIES[name][1] != "ns" else round(fmean(taken)))

    tables = {
        name: {at: mean(name, at, spread) for at, spread in table.items()} for name, table in adapters.tables.items()
    }
    return Adapters("mean", tables)


def mean_latency_s(result: RunResult) -> float:
    """Mean latency of a run in which every request was served."""
    assert {record.status for record in result.requests} == {"done"}, result.requests
    return fmean(latencies_s(result.requests))


def serve(
    case: ServingCase, serving: Serving, profile: Profile, hardware: Hardware, file: Path, pieces: dict[str, list[int]]
) -> float:
    """The mean latency in seconds; the durations (ns) of the pieces are added by kind."""
    drop_from_cache(file)
    run = served(case, profile, hardware, serving)
    for work in run.result.work:
        pieces.setdefault(work.kind, []).append(work.end_ns - work.start_ns)
    return mean_latency_s(run.result)


class MeasuredCase(NamedTuple):
    """What was measured of one case: mean latencies (s) of its runs, durations (ns) of its pieces by kind."""

    seconds: list[float]
    pieces: dict[str, list[int]]


def compare(
    alone: list[ServingCase],
    loaded: list[ServingCase],
    rounds: int,
    load_every: int,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """``loaded`` cases take part in every ``load_every``-th round."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        root = Path(name)
        folders, lora_bytes = make_folders(root)
        settings = make_settings("digits", "cpu", rows="1,2,4", quick=True)
        profile = measure_profile(settings, root / "profile")
        hardware = stack.enter_context(open_hardware("digits", "cpu", profile))
        bench = Bench(hardware.model, hardware.device, hardware.denoise, hardware.decode[0], QUICK)
        session = stack.enter_context(open_session(settings, bench))
        plain = plain_cases(alone[0].requests[0].steps)
        cases = [*alone, *loaded]
        clusters = {case.name: cluster_for(case.strategies, lora_bytes) for case in cases}
        servings = {
            case.name: stack.enter_context(open_serving(hardware, clusters[case.name], case.requests, folders))
            for case in cases
        }
        measured = {case.name: MeasuredCase([], {}) for case in cases}
        passes = []
        for number in range(-1, rounds):
            for _ in range(CELLS_PER_ROUND):
                times = plain_cells(plain, hardware, profile)
                session.round(keep=number >= 0)
                if number >= 0:
                    passes.append(times)
            turn = number % len(alone)
            these = alone[turn:] + alone[:turn] + (loaded if number % load_every == 0 else [])
            for case in these:
                one = measured[case.name] if number >= 0 else MeasuredCase([], {})
                file = root / "loras" / f"{LORA[0].file}.safetensors"
                one.seconds.append(serve(case, servings[case.name], profile, hardware, file, one.pieces))
            say(f"round {number + 1} of {rounds}")
        means = refreshed(profile, passes, passes)
        adapters = means_of(session.samples, Adapters("measured", session.tables()))
        predicted = {
            case.name: mean_latency_s(
                simulate_cluster(case.requests, case.policy, means, clusters[case.name], adapters=adapters).run
            )
            for case in cases
        }
    rows = report(measured, predicted, out, say)
    steps, count = alone[0].requests[0].steps, len(loaded[0].requests)
    caption = (
        f"digits, {steps} guided steps; one request alone (batch 1, {rounds} runs each) and "
        f"{count} requests of a Poisson process (batch 2). Dots: means with 95% intervals; grey: from the least to the "
        "largest run; numbers: measured against predicted. Cells and runs in turn on one machine."
    )
    save(picture(rows, caption), out.parent, out.stem, ("png",))
    say("cells, ms: " + ", ".join(
        f"{name} {at}: {spread.median / 1e6:.2f}"
        for name, table in adapters.tables.items() if QUANTITIES[name][1] == "ns"
        for at, spread in table.items()
    ))  # fmt: skip
    say("steps, ms: " + ", ".join(f"{at}: {spread.median / 1e6:.2f}" for at, spread in means.steps.items()))


def report(
    measured: dict[str, MeasuredCase], predicted: dict[str, float], out: Path, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """A line for each case, the same as CSV, and by case: predicted and mean seconds, half of the mean's 95% interval,
    the least and the largest run, and the error."""
    rows = {}
    for name, (runs, _) in measured.items():
        half_s = 1.96 * stdev(runs) / len(runs) ** 0.5 if len(runs) > 1 else float("nan")
        rows[name] = [predicted[name], fmean(runs), half_s, min(runs), max(runs), fmean(runs) / predicted[name] - 1]
        ms = [value * 1e3 for value in rows[name]]
        say(
            f"{name:<48} predicted {ms[0]:6.1f} ms  measured {ms[1]:6.1f} +- {ms[2]:.1f} ms "
            f"({ms[3]:.1f} to {ms[4]:.1f})  {rows[name][5]:+.1%}"
        )
    columns = ("case", "runs", "predicted_s", "mean_s", "half_interval_s", "least_s", "largest_s", "error")
    lines = ((name, len(measured[name].seconds), *(f"{value:.5f}" for value in row)) for name, row in rows.items())
    write_rows(out, columns, lines)
    for name, case in measured.items():
        say(f"{name}: " + ", ".join(f"{kind} {fmean(spent) / 1e6:.2f} ms" for kind, spent in case.pieces.items()))
    return rows


@styled
def picture(rows: dict[str, list[float]], caption: str) -> Figure:
    """Predicted and measured latency of each case of a report; bars: 95% intervals, thin lines: all runs."""
    figure = new_figure(3.8)
    axis = figure.subplots()
    for place, (predicted_s, mean_s, half_s, least_s, largest_s, error) in enumerate(rows.values()):
        axis.plot([least_s, largest_s], [place, place], color="#9a9a9a", linewidth=0.8)
        label = "" if place else "measured"
        axis.errorbar(mean_s, place, xerr=half_s, fmt="o", color="#0072b2", capsize=3, label=label)
        label = "" if place else "predicted"
        axis.plot(predicted_s, place, "D", color="#d55e00", markersize=5, label=label)
        axis.annotate(f"{error:+.0%}", (largest_s, place), (5, 0), textcoords="offset points",
                      va="center", fontsize=6.5)  # fmt: skip
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.margins(x=0.08)
    axis.set_xlabel("mean latency of a run, s")
    legend_above(figure, axis.get_legend_handles_labels()[0])
    return finish(figure, "SwiftDiffusion on two CPU cores: predicted against measured", caption)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--load-every", type=int, default=5, help="rounds from one run under load to the next")
    parser.add_argument("--requests", type=int, default=16, help="of a run under load")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    alone, loaded = one_request(given.steps), under_load(given.steps, given.requests)
    compare(alone, loaded, given.rounds, given.load_every, given.out, print)
