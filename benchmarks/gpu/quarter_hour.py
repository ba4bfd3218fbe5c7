"""A quarter of an hour on a GPU: everything worth measuring first, in one script with one deadline.

    python benchmarks/gpu/quarter_hour.py --out DIR --seconds 560
    python benchmarks/gpu/quarter_hour.py --out DIR --seconds 120 --device cpu --model digits    # a rehearsal

Each step is a process of its own with a share of the time; what a step leaves over goes to those after it. Results are
kept as they come, and the archive is written anew after every step and when the script is interrupted. README.md
beside this file says what comes back.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu.report import beside_floor, card_of, read_json, read_results, report_text, work_of  # noqa: E402
from synerdiff.core import NS_PER_S, InputError  # noqa: E402
from synerdiff.files import atomic, write_text  # noqa: E402
from synerdiff.profile.folder import load_profile  # noqa: E402

STOP_S = 12.0
"""What a step gets, after being interrupted, to write what it has."""
START_S = 8.0
"""Importing torch and loading a model, which `profile --minutes` does not count or counts late."""
PACK_S = 6.0
LEAST_S = 6.0
"""A step with less time than this is not begun."""
MOST_FILES = 8
RESOLUTION = {"sd15": 512, "sdxl": 1024}
GPU_TESTS = (
    "tests/diffusion/test_execution.py",
    "tests/real_runner/test_gpu.py",
    "tests/device",
    "tests/profiler/test_measure.py",
)
POLICIES = ("continuous-serial", "synerdiff-feedback", "continuous-parallel", "auto", "dynamic", "static")
"""In the order of their value; time that is short cuts the last."""
VALIDATED = ("continuous-serial", "synerdiff-feedback")
LOAD = 0.8


@dataclass(frozen=True, slots=True)
class Options:
    """What a run of the script was asked for."""

    work: Path
    model: str | None = None
    """Instead of both models: a rehearsal."""
    device: str = "cuda"

    def model_of(self, slot: str) -> str:
        """The model of a slot, ``small`` or ``large``."""
        return self.model or {"small": "sd15", "large": "sdxl"}[slot]

    def profile(self, slot: str) -> Path:
        """The profile's folder: its name says which card it was measured on."""
        device = (read_json(self.work / "environment.json") or {}).get("device", "")
        return self.work / slot / f"{self.model_of(slot)}-{card_of(device) or self.device.partition(':')[0]}"


@dataclass(frozen=True, slots=True)
class QuarterStep:
    """``seconds``: its share of 560, and of a rehearsal. ``command``: given its limit in seconds; raises InputError
    when something that it needs was not measured. ``done``: exit codes of a step that did all it had to."""

    name: str
    seconds: tuple[float, float]
    command: Callable[[Options, float], Sequence[str]]
    done: tuple[int, ...] = (0,)


def _task(name: str, *words: str) -> Callable[[Options, float], Sequence[str]]:
    def command(options: Options, limit_s: float) -> Sequence[str]:
        own = [sys.executable, str(Path(__file__).resolve()), "--task", name, "--work", str(options.work), *words]
        own += ["--device", options.device, "--seconds", f"{limit_s:.1f}"]
        return [*own, *(["--model", options.model] if options.model else [])]

    return command


def _tests(options: Options, limit_s: float) -> Sequence[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail=3", "-p", "no:cacheprovider", *GPU_TESTS]


def _profile(slot: str, rows: str, rehearsal_rows: str) -> Callable[[Options, float], Sequence[str]]:
    def command(options: Options, limit_s: float) -> Sequence[str]:
        model, cpu = options.model_of(slot), options.device == "cpu"
        minutes = max(0.05, (limit_s - START_S) / 60)
        words = [sys.executable, "-m", "synerdiff.cli", "profile", "--model", model, "--device", options.device]
        words += ["--quick", "--rows", rehearsal_rows if cpu else rows, "--minutes", f"{minutes:.3f}"]
        words += ["--out", str(options.profile(slot)), *([] if cpu else ["--dtype", "bfloat16"])]
        return words + (["--resolution", str(RESOLUTION[model])] if model in RESOLUTION else [])

    return command


def _validate(options: Options, limit_s: float) -> Sequence[str]:
    """Two policies at one load, three repeats; so many requests that the runs take half of the time."""
    from synerdiff.profile.capacity import default_batch, serial_capacity_samples_per_s
    from traces.generate import generate
    from traces.native import write_trace

    profile = load_profile(options.profile("small"))
    steps, repeats = (8, 1) if options.device == "cpu" else (25, 3)
    rate = serial_capacity_samples_per_s(profile, steps, default_batch(profile))
    requests = max(8, min(400, int(0.5 * limit_s * rate * LOAD / (repeats * len(VALIDATED)))))
    trace = options.work / "validate-trace.csv"
    write_trace(trace, generate("poisson", requests=requests, rate_per_s=1.0, seed=1, mix="fixed", steps=steps))
    words = [sys.executable, "-m", "synerdiff.cli", "validate", "--profile", str(options.profile("small"))]
    words += ["--trace", str(trace), "--device", options.device, "--load", str(LOAD), "--no-saturation"]
    words += [word for policy in VALIDATED for word in ("--policy", policy)]
    return [*words, "--repeats", str(repeats), "--out", str(options.work / "validate")]


PLAN = (
    QuarterStep("environment", (15, 8), _task("environment")),
    QuarterStep("gpu tests", (45, 10), _tests, (0, 1, 5)),
    QuarterStep("ceilings", (15, 6), _task("ceilings")),
    QuarterStep("profile, small model", (35, 22), _profile("small", "1,2,4,8,16", "1,2")),
    QuarterStep("profile, large model", (95, 22), _profile("large", "1,2,4,8", "1,2")),
    QuarterStep("forward, large model", (45, 8), _task("forward")),
    # Exit code 1 says that a tolerance was exceeded: a finding, not a failure of this script.
    QuarterStep("validate, small model", (90, 20), _validate, (0, 1)),
    QuarterStep("runs, small model", (140, 12), _task("runs", "--slot", "small")),
    QuarterStep("runs, large model", (66, 8), _task("runs", "--slot", "large")),
    QuarterStep("across resolutions, small model", (8, 8), _task("across")),
)


class StepLedger:
    """What has been run: a line for each step as it ends, also read by a later call."""

    def __init__(self, out: Path) -> None:
        self._path = out / "steps.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]

    def done(self, step: str) -> bool:
        return any(one["step"] == step and one["done"] for one in self.entries)

    def add(self, **entry: Any) -> None:
        self.entries.append(entry)
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")


def allowance(shares_s: Sequence[float], left_s: float) -> float:
    """Seconds for the first of the steps that are left: its share and all that is spare, or less when time is short.

    Never less than a step needs while that is there, so that the last ones are cut.
    """
    needed = sum(shares_s)
    share_s = shares_s[0] * left_s / needed if left_s < needed else shares_s[0] + left_s - needed
    return max(share_s, min(LEAST_S, left_s))


def run_plan(
    plan: Sequence[QuarterStep], options: Options, out: Path, until_s: float, pack: Callable[[StepLedger], None]
) -> bool:
    """Run what is not yet done until ``until_s`` of the monotonic clock; whether all is done."""
    ledger = StepLedger(out)
    rehearsal = int(options.device == "cpu")
    try:
        for place, step in enumerate(plan):
            if ledger.done(step.name):
                print(f"{step.name}: done before", flush=True)
                continue
            shares = [other.seconds[rehearsal] for other in plan[place:] if not ledger.done(other.name)]
            limit_s = allowance(shares, until_s - time.monotonic() - PACK_S)
            if limit_s < LEAST_S:
                print(f"{step.name}: no time is left for it", flush=True)
                continue
            print(f"{step.name}: at most {limit_s:.0f} s", flush=True)
            began_s = time.monotonic()
            log = options.work / f"log-{step.name.replace(', ', '-').replace(' ', '-')}.txt"
            try:
                code = run_command(step.command(options, limit_s), log, limit_s)
            except InputError as error:
                log.write_text(f"{error}\n", encoding="utf-8")
                code = 2
            spent_s = round(time.monotonic() - began_s, 1)
            ledger.add(step=step.name, exit_code=code, wall_s=spent_s, done=code in step.done, at=_now())
            print(f"{step.name}: exit code {code}, {spent_s} s", flush=True)
            if code not in (*step.done, 130):
                print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]), flush=True)
            pack(ledger)
    finally:
        pack(ledger)
    return all(ledger.done(step.name) for step in plan)


def run_command(command: Sequence[str], log: Path, limit_s: float) -> int:
    """The exit code; a command that is too slow is interrupted (it then keeps what it has), at last killed: 130."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return 130
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            raise
        finally:
            try:
                process.wait(min(STOP_S, max(2.0, 0.2 * limit_s)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def pack_results(plan: Sequence[QuarterStep], options: Options, out: Path, ledger: StepLedger) -> None:
    """steps.jsonl, results.json, report.md, results.tar.gz (all that the steps keep, to go on elsewhere) and pictures:
    eight files at most."""
    results = read_results(options.work)
    write_text(out / "results.json", json.dumps({"steps": ledger.entries, **results}) + "\n")
    write_text(out / "report.md", report_text(results, ledger.entries, [step.name for step in plan]))
    with atomic(out / "results.tar.gz") as temporary, tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(options.work.rglob("*")):
            if path.is_file() and path.suffix not in (".pdf", ".part"):
                archive.add(path, str(path.relative_to(options.work)))
        archive.add(out / "steps.jsonl", "steps.jsonl") if (out / "steps.jsonl").exists() else None
    pictures = [*options.work.glob("*/*/profile.png"), *options.work.glob("validate/prediction-errors.png")]
    for path in sorted(pictures)[: MOST_FILES - 4]:
        with atomic(out / f"{path.parent.name}-{path.name}") as temporary:
            temporary.write_bytes(path.read_bytes())


def unpack(archive: Path, options: Options, out: Path) -> None:
    """What an earlier call measured, on this machine or another."""
    with tarfile.open(archive) as tar:
        tar.extractall(options.work, filter="data")
    if (options.work / "steps.jsonl").exists() and not (out / "steps.jsonl").exists():
        (options.work / "steps.jsonl").replace(out / "steps.jsonl")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM ends the script as Ctrl-C does: the archive is written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- tasks: what a process of its own measures ----------------------------------------------------------------------


def keep(path: Path, found: Any) -> None:
    """Write a step's result as JSON, atomically."""
    write_text(path, json.dumps(found, indent=1) + "\n")


def environment_task(options: Options, slot: str, until_s: float) -> None:
    """Step: what machine and software this is."""
    from profiler.machine import GpuWatch, code_version, device_name, host, software
    from synerdiff.device.lanes import find_device

    device = find_device(options.device)
    found: dict[str, Any] = {"device": device_name(device), "device_option": options.device}
    found |= {
        "model_instead": options.model,
        "commit": code_version() or "unknown",
        "date": _now(),
        **host(),
        **software(),
    }
    if device.type == "cuda":
        watch = GpuWatch(device)
        watch.look()
        found |= {"driver": watch.driver, "clocks": watch.summary()}
    keep(options.work / "environment.json", found)


def ceilings_task(options: Options, slot: str, until_s: float) -> None:
    """What the device reaches on the operations that times are estimated from; small sizes on a CPU."""
    import torch
    from torch.nn import functional as F

    from synerdiff.device.lanes import find_device

    device = find_device(options.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    side, pixels, channels, n = (8192, 128, 512, 2**29) if on_gpu else (256, 16, 32, 2**20)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    a, big = made(side, side), made(n)
    image, weight = made(1, channels, pixels, pixels), made(channels, channels, 3, 3)
    last, last_weight = (one.to(memory_format=torch.channels_last) for one in (image, weight))
    heads, ones = made(1, 1, pixels * pixels, channels), made(channels)
    products, attention = 2 * side**3, 4 * (pixels * pixels) ** 2 * channels
    convolution, size = 18 * pixels**2 * channels**2, big.element_size()
    work: dict[str, tuple[Callable[[], object], float, str]] = {
        "copy": (lambda: big.clone(), 2 * n * size / 1e9, "GB/s"),
        f"product of {side}": (lambda: a @ a, products / 1e12, "TFLOP/s"),
        "convolution, contiguous": (lambda: F.conv2d(image, weight, padding=1), convolution / 1e12, "TFLOP/s"),
        "convolution, channels last": (lambda: F.conv2d(last, last_weight, padding=1), convolution / 1e12, "TFLOP/s"),
        "GroupNorm at batch 1": (lambda: F.group_norm(image, 32, ones, ones), 2 * image.numel() * size / 1e9, "GB/s"),
        f"attention, head size {channels}": (
            lambda: F.scaled_dot_product_attention(heads, heads, heads),
            attention / 1e12,
            "TFLOP/s",
        ),
    }
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, (run, amount, unit) in work.items():
            if time.monotonic() > until_s:
                break
            seconds = median(_seconds(run, device) for _ in range(5))
            found[name] = {"value": amount / seconds, "unit": unit, "ms": 1e3 * seconds}
            keep(options.work / "ceilings.json", found)


def _seconds(run: Callable[[], object], device: Any, repeats: int = 10) -> float:
    """Mean seconds of back-to-back calls, after two that do not count."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        run()
    wait()
    began_s = time.monotonic()
    for _ in range(repeats):
        run()
    wait()
    return (time.monotonic() - began_s) / repeats


def variants(on_gpu: bool) -> list[tuple[str, Any]]:
    """What is put beside what, in the order of its value: no lever, each alone, those that need no compiler together,
    then torch's compiler, and 8-bit products last."""
    from synerdiff.diffusion.execution import LEVERS, ModelExecution

    kind, exact = "graphs" if on_gpu else "eager", [name for name in LEVERS if name != "float8"]
    if not on_gpu:
        exact.remove("cudnn-benchmark")
    quick = tuple(name for name in exact if name != "compile")
    alone = [("channels-last", "group-norm"), *((name,) for name in quick if name != "group-norm")]
    named = {kind: (), **{" + ".join(levers): levers for levers in alone}, "all but compile": quick}
    if on_gpu:
        named |= {"compile": ("compile",), "compiled": tuple(exact), "compiled + float8": LEVERS}
    found = [(name, ModelExecution(kind, tuple(levers))) for name, levers in named.items()]
    return [*found, ("eager", ModelExecution("eager"))] if on_gpu else found


def forward_task(options: Options, slot: str, until_s: float) -> None:
    """The large model's forward at 2 and 8 rows and its decode, with each lever alone and with all of them; and how far
    three steps and a decode are from those without a lever."""
    import gc

    import torch

    from profiler.bench import Again, timed_chunk
    from profiler.machine import device_name
    from profiler.sampling import QUICK, spread_of, warm_up
    from profiler.timing import Side, alone
    from synerdiff.core import InputError
    from synerdiff.device import open_device
    from synerdiff.device.lanes import find_device
    from synerdiff.diffusion.checkpoint import load_model
    from synerdiff.diffusion.decoder import WHOLE
    from synerdiff.diffusion.kernels import apply_execution
    from synerdiff.diffusion.model import DiffusionModel
    from synerdiff.diffusion.stages import prepare_chunks, prepare_steps

    device, name = find_device(options.device), options.model_of("large")
    on_gpu, buckets = device.type == "cuda", (2, 8)
    if not on_gpu:
        torch.set_num_threads(1)
    found: dict[str, Any] = {"model": name, "times": [], "skipped": {}}
    if not on_gpu:
        found["skipped"] = {"graphs": "CUDA graphs need a GPU", "compiled": "compiling for a CPU takes minutes"}
    plain: list[torch.Tensor] = []

    def forward(model: DiffusionModel, rows: int) -> Again:
        inputs = model.example_rows(rows, model.encode_prompt(model.prompts.default_prompt(0)))

        @torch.inference_mode()
        def run() -> None:
            model.denoise(inputs)

        return lambda: run

    def measure(kind: str, execution: Any, lanes: Any) -> None:
        torch.backends.cudnn.benchmark = False
        began_s = time.monotonic()
        model = load_model(name, device, torch.bfloat16 if on_gpu else None)
        apply_execution(model, execution)
        threads = on_gpu and execution.kind == "eager"
        denoise, decode = (lanes.lane(f"{lane}, {kind}", launch_thread=threads) for lane in ("denoise", "decode"))
        prepare_steps(model, buckets, denoise)
        (whole,) = prepare_chunks(model, WHOLE, decode)
        state = model.start(1, 3, 4.0)
        latent = state.latent
        while not state.done:
            denoise.submit(lambda: model.step([state])).result()
        image = decode.submit(lambda: whole(state.latent)).result().float().cpu()
        plain.append(image)
        sides = {f"{rows} rows": Side(denoise, forward(model, rows)) for rows in buckets}
        sides["decode"] = Side(decode, timed_chunk(whole, latent))
        prepared_s = time.monotonic() - began_s
        for what, side in sides.items():
            if time.monotonic() > until_s:
                found["skipped"][f"{kind}, {what}"] = "no time was left"
                continue
            warm_up(lambda n, side=side: alone(side, n), 0.5)  # type: ignore[misc]
            spread = spread_of(alone(side, QUICK.most))
            row: dict[str, Any] = {"kind": kind, "what": what, "n": spread.n, "prepared_s": prepared_s}
            row |= {"levers": list(execution.levers), "ms": spread.median / 1e6}
            row["image_apart"] = float((image - plain[0]).abs().max())
            if what != "decode":
                rows = int(what.split()[0])
                row |= {"rows": rows, "it_per_s": NS_PER_S / spread.median}
                if name in RESOLUTION:
                    row |= beside_floor(spread.median, *work_of(name, rows), card_of(device_name(device)))
            found["times"].append(row)
            keep(options.work / "forward.json", found)

    with open_device(device) as lanes:
        for kind, execution in variants(on_gpu):
            if time.monotonic() > until_s:
                found["skipped"][kind] = "no time was left"
                continue
            try:
                measure(kind, execution, lanes)
            except (InputError, RuntimeError) as error:  # a lever that fails costs the others nothing
                found["skipped"][kind] = str(error).strip().splitlines()[0]
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    keep(options.work / "forward.json", found)


ELSEWHERE = {"sd15": 768, "digits": 48}
"""A second resolution of the small model."""


def across_task(options: Options, slot: str, until_s: float) -> None:
    """Four pairs of a step at a second resolution and a chunk at the profile's, beside what the rule for slowdowns
    across resolutions makes of the profile's own cells: those beside steps that take as long alone."""
    from profiler.bench import Bench, TimedStep, lane_cores
    from profiler.sampling import QUICK, spread_of
    from profiler.timing import Side, Unsettled, alone, chunk_pieces, measure_corun
    from real_runner.hardware import chunking_of
    from synerdiff.device import open_device
    from synerdiff.device.lanes import find_device
    from synerdiff.diffusion.checkpoint import load_model
    from synerdiff.diffusion.stages import prepare_chunks, prepare_steps

    profile, device = load_profile(options.profile("small")), find_device(options.device)
    name, base = profile.head.model, profile.head.size
    if name not in ELSEWHERE or base is None:
        raise InputError(f"no second resolution of {name} is planned")
    away = (ELSEWHERE[name],) * 2
    on_gpu = device.type == "cuda"
    cores = (None, None) if on_gpu else lane_cores()
    found: list[dict[str, Any]] = []
    with open_device(device) as lanes:
        own, other = (load_model(name, device, profile.head.dtype, size) for size in (base, away))
        denoise = lanes.lane("denoise", high_priority=True, core=cores[0])
        bench = Bench(own, lanes, denoise, lanes.lane("decode0", core=cores[1]), QUICK)
        buckets = [rows for rows in (profile.row_buckets or (1, 2)) if rows in (1, 2, 4)][-2:]
        prepare_steps(other, buckets, denoise)
        for rows in buckets:
            step = TimedStep(other, rows)
            solo = spread_of(alone(Side(denoise, step.again), 5))
            both = replace(profile, others={away: replace(profile, steps={rows: solo}, row_buckets=(rows,), corun={})})
            for chunking in profile.chunkings[:2]:
                if time.monotonic() > until_s:
                    return
                functions = prepare_chunks(own, chunking_of(profile, chunking), bench.decode)
                times = [spread.median for spread in profile.chunks[chunking]]
                chunk = times.index(max(times))
                try:
                    pair = measure_corun(bench, step.again, chunk_pieces(bench, functions)[chunk], ([], []), until_s)
                except Unsettled as error:
                    print(f"{rows} rows beside {chunking}.{chunk}: {error}")
                    continue
                measured = [spread_of(samples).median / 1e6 for samples in pair]
                predicted = both.slowdowns_beside(away, rows, chunking, chunk, base)
                row: dict[str, Any] = {"step_side": away[0], "chunk_side": base[0], "rows": rows}
                row |= {"chunking": chunking, "chunk": chunk, "s_u": measured[0], "s_v": measured[1]}
                row |= {"predicted_s_u": predicted[0] / 1e6, "predicted_s_v": predicted[1] / 1e6}
                found.append({**row, "clamped": predicted[2] == 2})
                keep(options.work / "across.json", found)


def runs_task(options: Options, slot: str, until_s: float) -> None:
    """Policies against each other in one process: all images at once, then a load; a line for each finished run.

    Each has the batch size that the simulator finds best for it. A run that would not end in time is left out.
    """
    from real_runner.engine import run_real
    from real_runner.hardware import open_hardware
    from synerdiff.experiments.run import Outcome, Prepared, RunSpec, Served, execute, prepare, saturated
    from synerdiff.profile.capacity import most_samples
    from synerdiff.results.metrics import latencies_s, saturation_throughput
    from traces.generate import generate

    path = options.work / f"runs-{slot}.jsonl"
    before = {(one["policy"], one["kind"]) for one in read_results(options.work)["runs"][slot]}
    profile, cpu = load_profile(options.profile(slot)), options.device == "cpu"
    policies = POLICIES if slot == "small" else VALIDATED
    steps, backlog = (6 if cpu else 20, 32) if slot == "large" else (8 if cpu else 30, 64)
    trace = generate("poisson", requests=60, rate_per_s=1.0, seed=1, mix="fixed", steps=steps)
    trace = [replace(request, images=1) for request in (trace[:12] if cpu else trace)]
    prepared = {
        name: prepare(RunSpec(profile=profile, source=tuple(trace), policy=name, load=LOAD)) for name in policies
    }
    cases = [(name, "saturation", run.at_once(16 if cpu else backlog)) for name, run in prepared.items()]
    if slot == "small":
        cases += [(name, "load", run) for name, run in prepared.items()]
    most = most_samples(profile, 2)
    sizes = [size for size in (4, 8, 16) if size <= most] or [most]

    def with_best_batch(run: Prepared) -> tuple[Prepared, int, float]:
        """The run with the batch of least simulated mean latency, and how long that run takes."""
        tried = []
        for size in sizes:
            one = run.with_parameters(batch=size)
            result = execute(one).result
            if found := latencies_s(result.requests):
                tried.append((fmean(found), size, result.end_ns / NS_PER_S, one))
        _, size, end_s, one = min(tried, key=lambda found: found[:2])
        return one, size, end_s

    with open_hardware(profile.head.model, options.device, profile) as hardware, path.open("a") as out:
        for policy, kind, run in cases:
            if (policy, kind) in before:
                continue
            run, batch, predicted_s = with_best_batch(run)
            if time.monotonic() + 1.3 * predicted_s > until_s:
                print(f"{policy}, {kind}: {predicted_s:.0f} s are predicted, and no time is left", flush=True)
                continue
            real = run_real(run.served, run.policy(), profile, hardware, budget=run.budget)
            if real.error is not None:
                raise real.error
            ended = Outcome(run, Served(real.result))
            work = ended.frames[1]
            stepped = work[work["kind"] == "step"]
            dispatch = real.dispatch.summary()
            found: dict[str, Any] = {"policy": policy, "kind": kind, "batch": batch, "requests": len(run.served)}
            found |= {"images_per_s": None, "faults": len(real.faults), "dispatch": dispatch}
            found["step_s"] = float((stepped["end_ns"] - stepped["start_ns"]).median()) / NS_PER_S
            found["gap_s"] = dispatch["step_dispatch"]["p50_s"]
            if kind == "saturation":
                try:
                    found["images_per_s"] = saturation_throughput(work)
                except InputError as error:
                    found["note"] = str(error)
                found["predicted_images_per_s"] = saturated(prepared[policy].with_parameters(batch=batch), backlog)[1]
            else:
                found["mean_latency_s"] = fmean(latencies_s(real.result.requests))
                found["predicted_mean_latency_s"] = fmean(latencies_s(execute(run).result.requests))
            out.write(json.dumps(found) + "\n")
            out.flush()


TASKS = {
    "environment": environment_task,
    "ceilings": ceilings_task,
    "forward": forward_task,
    "across": across_task,
    "runs": runs_task,
}


def main() -> int:
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for what comes back: eight files at most")
    parser.add_argument("--work", type=Path, help="folder of what steps keep (default: OUT.work, beside OUT)")
    parser.add_argument("--earlier", type=Path, help="results.tar.gz of an earlier call, to go on from")
    parser.add_argument("--seconds", type=float, default=560.0, help="the deadline")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", help="this model instead of sd15 and sdxl: a rehearsal")
    parser.add_argument("--task", choices=sorted(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--slot", default="large", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.out is None and given.task is None:
        parser.error("--out is needed")
    work: Path = (given.work or given.out.with_name(given.out.name + ".work")).resolve()
    options = Options(work, given.model, given.device)
    until_s = began_s + given.seconds
    if given.task:
        TASKS[given.task](options, given.slot, until_s - 1)
        return 0
    for folder in (work, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    if given.earlier:
        unpack(given.earlier, options, given.out)
    try:
        with termination_interrupts():
            complete = run_plan(
                PLAN, options, given.out, until_s, lambda ledger: pack_results(PLAN, options, given.out, ledger)
            )
    except KeyboardInterrupt:
        print(f"{given.out}: interrupted; what was measured is in results.tar.gz, and the same command goes on.")
        return 130
    print(f"{given.out}: report.md, results.json, results.tar.gz; {'complete' if complete else 'incomplete'}")
    return 0 if complete else 3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
