"""Measure synerdiff on a GPU, part by part; README.md beside this file says what comes back and how long it takes.

    python benchmarks/gpu/parts.py 1 --out results/gpu [--minutes 9] [--model digits --device cpu --quick]

A part runs a few commands, one after the other, until its minutes are over. What a command finished is kept and packed,
and the same command line goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from synerdiff.core import InputError  # noqa: E402
from synerdiff.files import atomic  # noqa: E402
from synerdiff.profile.tables import Profile  # noqa: E402

SYNERDIFF = (sys.executable, "-m", "synerdiff.cli")
LARGEST_FILE = 16 * 2**20
MOST_FILES = 8
STOP_S = 25
"""What a command gets, after being interrupted, to write what it has."""

RESOLUTION = {"sd15": 512, "sdxl": 1024}
QUICK_ROWS = "2,16"
PROFILE_ROWS = {"sd15": "1,2,3,4,6,8,12,16,24,32", "sdxl": "1,2,3,4,6,8,12,16"}
VALIDATED = ("dynamic", "continuous-serial", "continuous-parallel", "synerdiff-feedback")
VALIDATED_LOADS = (0.5, 0.8, 0.95)
SDXL_POLICIES = ("continuous-serial", "synerdiff-feedback")
HEADLINE = ("static", "dynamic", "continuous-serial", "continuous-parallel", "synerdiff-feedback", "auto")
HEADLINE_LOAD = 0.8
SEEDS = (1, 2, 3)
PICTURES = {1: ("profile.png",), 2: ("prediction-errors.png", "requests.png", "timelines.png")}


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a part. ``done_codes``: exit codes of a command that did all it had to."""

    name: str
    command: tuple[str, ...]
    done_codes: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Options:
    """``model``: instead of a part's own models. ``work``: the folder of what parts keep."""

    work: Path
    model: str | None = None
    device: str = "cuda"
    quick: bool = False
    skip_fraction: float = 0.0
    requests: int | None = None
    """Requests a trace of the headline, instead of as many as its minutes allow."""

    def folder(self, part: int) -> Path:
        return self.work / f"part{part}"

    def models(self, *own: str) -> tuple[str, ...]:
        return own if self.model is None else (self.model,)

    def profile(self, model: str) -> Path:
        return self.folder(1) / model


@dataclass(frozen=True, slots=True)
class Part:
    """``minutes``: the allotment; nothing was measured to choose it but the floors."""

    title: str
    minutes: float
    steps: Callable[[Options], list[Step]]
    results: Callable[[Options], dict[str, Any]]


def load(folder: Path) -> Profile:
    from synerdiff.profile.folder import load_profile

    if not (folder / "profile.yaml").exists():
        raise InputError(f"{folder}: there is no finished profile of part 1, which this part needs; run part 1 first.")
    return load_profile(folder)


def capacity_per_s(profile: Profile, steps: float) -> float:
    """Images a second of serial continuous batching at its largest batch up to 8: what loads refer to."""
    from synerdiff.profile.capacity import default_batch, serial_capacity_samples_per_s

    return serial_capacity_samples_per_s(profile, steps, default_batch(profile))


def requests_within(seconds: float, rate_per_s: float, loads: Sequence[float], runs: int, most: int) -> int:
    """Requests a run so that ``runs`` runs at each of these loads, relative to ``rate_per_s``, last ``seconds``."""
    requests = int(seconds * rate_per_s / (runs * sum(1 / one for one in loads)))
    return max(12, min(most, requests))


def trace_step(out: Path, requests: int, seed: int, mix: Sequence[str]) -> Step:
    words = ("trace", "generate", "poisson", "--out", str(out), "--requests", str(requests), "--seed", str(seed))
    return Step(out.stem, (*SYNERDIFF, *words, *mix))


def profile_steps(options: Options) -> list[Step]:
    steps = []
    for model in options.models("sd15", "sdxl"):
        words = ["profile", "--model", model, "--device", options.device, "--out", str(options.profile(model))]
        if options.device != "cpu":
            words += ["--dtype", "bfloat16"]
        if model in RESOLUTION:
            words += ["--resolution", str(RESOLUTION[model])]
        if options.quick:
            words += ["--quick", "--rows", QUICK_ROWS]
        elif model in PROFILE_ROWS:
            words += ["--rows", PROFILE_ROWS[model]]
        steps.append(Step(f"profile {model}", (*SYNERDIFF, *words)))
    return steps


def validate_steps(options: Options) -> list[Step]:
    """Four policies at three loads, three repeats; requests so many that the runs last about four minutes."""
    folder, (model,) = options.folder(2), options.models("sd15")
    repeats, loads = (1, (0.8,)) if options.quick else (3, VALIDATED_LOADS)
    policies = VALIDATED[-1:] if options.quick else VALIDATED
    rate = capacity_per_s(load(options.profile(model)), 25)
    seconds = 8.0 if options.quick else 240.0
    requests = requests_within(seconds, rate, loads, repeats * len(policies), 400)
    trace = folder / "trace.csv"
    words = ["validate", "--profile", str(options.profile(model)), "--trace", str(trace), "--device", options.device]
    words += [word for policy in policies for word in ("--policy", policy)]
    words += [word for one in loads for word in ("--load", str(one))]
    words += ["--repeats", str(repeats), "--no-saturation", "--out", str(folder / "report")]
    # Exit code 1 says that a tolerance was exceeded: a finding, not a failure of this script.
    return [
        trace_step(trace, requests, 1, ("--mix", "fixed", "--steps", "25")),
        Step("validate", (*SYNERDIFF, *words), (0, 1)),
    ]


def headline_steps(
    options: Options, part: int, model: str, policies: Sequence[str], mix: Sequence[str], sizes: Sequence[int]
) -> list[Step]:
    """Traces, one per seed, and one process that runs all policies on them. ``sizes``: requests, backlog, seeds."""
    folder, (requests, backlog, seeds) = options.folder(part), sizes
    traces = [folder / f"trace-{seed}.csv" for seed in SEEDS[:seeds]]
    words = ["-m", "benchmarks.gpu.headline", "--profile", str(options.profile(model)), "--device", options.device]
    words += [word for trace in traces for word in ("--trace", str(trace))]
    words += [word for policy in policies for word in ("--policy", policy)]
    words += ["--load", str(HEADLINE_LOAD), "--backlog", str(backlog), "--out", str(folder / "cases")]
    words += ["--skip-fraction", str(options.skip_fraction)]
    made = [trace_step(path, requests, seed, mix) for seed, path in zip(SEEDS, traces, strict=False)]
    return [*made, Step("runs", (sys.executable, *words))]


def sdxl_steps(options: Options) -> list[Step]:
    """20 guided steps; 120 requests, so that more than 100 are left after warm-up and tail."""
    (model,) = options.models("sdxl")
    load(options.profile(model))
    sizes = (12, 24, 1) if options.quick else (120, 48, 1)
    return headline_steps(
        options,
        3,
        model,
        SDXL_POLICIES[:1] if options.quick else SDXL_POLICIES,
        ("--mix", "fixed", "--steps", "20"),
        sizes,
    )


def sd15_steps(options: Options) -> list[Step]:
    """20 to 50 guided steps. A claim on P99 needs 180 requests in each of three traces: 459 are then measured."""
    (model,) = options.models("sd15")
    rate = capacity_per_s(load(options.profile(model)), 35)
    seeds = 1 if options.quick else len(SEEDS)
    seconds = 6.0 if options.quick else 180.0
    policies = HEADLINE[-2:] if options.quick else HEADLINE
    fitting = requests_within(seconds, rate, (HEADLINE_LOAD,), seeds * len(policies), 180)
    sizes = (options.requests or fitting, 24 if options.quick else 64, seeds)
    return headline_steps(options, 4, model, policies, ("--mix", "guided-20-50"), sizes)


def forward_steps(options: Options, part: int, module: str, rows: dict[str, str]) -> list[Step]:
    steps = []
    for model in options.models("sd15", "sdxl"):
        words = ["-m", f"benchmarks.gpu.{module}", "--model", model, "--device", options.device]
        words += ["--rows", rows.get(model, "2,8"), "--out", str(options.folder(part) / f"{model}.json")]
        steps.append(Step(f"{module} {model}", (sys.executable, *words, *(["--quick"] if options.quick else []))))
    return steps


def profile_results(options: Options) -> dict[str, Any]:
    from benchmarks.gpu.floors import profile_table

    folders = [path for path in sorted(options.folder(1).glob("*")) if (path / "profile.yaml").exists()]
    return {path.name: profile_table(load(path)) for path in folders}


def validate_results(options: Options) -> dict[str, Any]:
    path = options.folder(2) / "report" / "validation.json"
    return read_json(path) if path.exists() else {}


def headline_results(part: int) -> Callable[[Options], dict[str, Any]]:
    def results(options: Options) -> dict[str, Any]:
        from benchmarks.gpu.headline import conclude

        cases = [read_json(path) for path in sorted((options.folder(part) / "cases").glob("*.json"))]
        short = [{name: value for name, value in case.items() if name != "latencies_s"} for case in cases]
        return {**conclude(cases), "runs": short}

    return results


def forward_results(part: int) -> Callable[[Options], dict[str, Any]]:
    return lambda options: {path.stem: read_json(path) for path in sorted(options.folder(part).glob("*.json"))}


PARTS = {
    1: Part("profiles of SD1.5 and SDXL", 9.0, profile_steps, profile_results),
    2: Part("prediction against hardware, SD1.5", 5.5, validate_steps, validate_results),
    3: Part("SDXL, two policies", 5.5, sdxl_steps, headline_results(3)),
    4: Part("headline, SD1.5", 6.0, sd15_steps, headline_results(4)),
    5: Part(
        "does overlap win, and on which lanes",
        2.0,
        lambda options: forward_steps(options, 5, "lanes", {"sd15": "2,8,16", "sdxl": "2,8"}),
        forward_results(5),
    ),
    6: Part(
        "eager, compiled, graphs",
        2.0,
        lambda options: forward_steps(options, 6, "execution", {"sd15": "2,16", "sdxl": "2,8"}),
        forward_results(6),
    ),
}


def read_json(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def write_json(path: Path, data: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def run_part(number: int, options: Options, until_s: float) -> tuple[list[dict[str, Any]], bool]:
    """Run what is not yet done, by ``time.monotonic`` until ``until_s``; what ran so far, and whether all is done."""
    folder = options.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "ledger.json"
    ran: list[dict[str, Any]] = json.loads(ledger.read_text(encoding="utf-8")) if ledger.exists() else []
    for step in PARTS[number].steps(options):
        command = portable(step, options)
        if any(one["command"] == command and one["done"] for one in ran):
            print(f"{step.name}: done before", flush=True)
            continue
        left_s = until_s - time.monotonic()
        if left_s <= STOP_S:
            return ran, False
        print(f"{step.name}: at most {left_s:.0f} s", flush=True)
        began_s = time.monotonic()
        code = run_command(step, folder / f"log-{step.name.replace(' ', '-')}.txt", left_s - STOP_S)
        entry: dict[str, Any] = {"name": step.name, "command": command, "exit_code": code}
        entry |= {"wall_s": round(time.monotonic() - began_s, 1), "at": now(), "done": code in step.done_codes}
        ran.append(entry)
        write_json(ledger, ran)
        print(f"{step.name}: exit code {code}, {entry['wall_s']} s", flush=True)
        if not entry["done"]:
            return ran, False
    return ran, True


def portable(step: Step, options: Options) -> str:
    """The command without this machine's paths, so that a part that was begun elsewhere is recognised."""
    text = " ".join(("python", *step.command[1:]))
    return text.replace(str(options.work), "WORK")


def run_command(step: Step, log: Path, limit_s: float) -> int:
    """The exit code; a command that is too slow is interrupted (it then keeps what it has), at last killed."""
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(step.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_S)
            raise
        try:
            process.wait(STOP_S - 5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # Whatever it returns after an interruption, it has not done all it had to.
    return 130


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def provenance(options: Options) -> dict[str, Any]:
    from profiler.machine import code_version, device_name, host, software
    from synerdiff.device.lanes import find_device

    machine = {"device": device_name(find_device(options.device)), "commit": code_version(), **host(), **software()}
    return {
        **machine,
        "date": now(),
        "quick": options.quick,
        "model_instead": options.model,
        "device_option": options.device,
    }


def pack(number: int, options: Options, out: Path, data: dict[str, Any]) -> list[Path]:
    """partN.json, partN.tar.gz (all that the part keeps, to go on elsewhere) and its pictures: eight files at most."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"part{number}.json", data)
    files = [out / f"part{number}.json", out / f"part{number}.tar.gz"]
    folder = options.folder(number)
    with atomic(files[1]) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (".pdf", ".part"):
                archive.add(path, f"part{number}/{path.relative_to(folder)}")
    for name in PICTURES.get(number, ()):
        for path in sorted(folder.rglob(name))[: MOST_FILES - len(files)]:
            files.append(out / f"part{number}-{path.parent.name}-{name}")
            shutil.copyfile(path, files[-1])
    for path in files:
        if path.stat().st_size > LARGEST_FILE:
            print(f"{path}: {path.stat().st_size} bytes, more than 16 MiB, so it may not come back", file=sys.stderr)
    return files


def unpack_earlier(earlier: Path, work: Path) -> None:
    """Parts that were measured elsewhere, unless ``work`` has them already."""
    for number in PARTS:
        archive = earlier / f"part{number}.tar.gz"
        if archive.exists() and not (work / f"part{number}").exists():
            with tarfile.open(archive) as tar:
                tar.extractall(work, filter="data")


def main() -> None:
    listed = "; ".join(f"{number}: {part.title} ({part.minutes:g} min)" for number, part in PARTS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"Parts: {listed}.")
    parser.add_argument("part", type=int, choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for partN.json, partN.tar.gz and pictures")
    parser.add_argument("--work", type=Path, help="folder of what parts keep (default: OUT/work)")
    parser.add_argument("--earlier", type=Path, help="folder with partN.tar.gz of earlier parts (default: OUT)")
    parser.add_argument("--minutes", type=float, help="stop after so many (default: the part's allotment)")
    parser.add_argument("--model", help="this model instead of the part's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a dry run: little of everything")
    parser.add_argument("--skip-fraction", type=float, default=0.0, help="guidance that policies may skip, parts 3, 4")
    parser.add_argument("--requests", type=int, help="requests a trace, part 4 (default: as its minutes allow)")
    given = parser.parse_args()
    work = (given.work or given.out / "work").resolve()
    options = Options(work, given.model, given.device, given.quick, given.skip_fraction, given.requests)
    part = PARTS[given.part]
    until_s = time.monotonic() + 60 * (given.minutes or part.minutes)
    try:
        facts = provenance(options)
        work.mkdir(parents=True, exist_ok=True)
        unpack_earlier(given.earlier or given.out, work)
        ran, complete = run_part(given.part, options, until_s)
        head = {"part": given.part, "title": part.title, "complete": complete, "provenance": facts, "commands": ran}
        files = pack(given.part, options, given.out, {**head, "results": part.results(options)})
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    for path in files:
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    last: dict[str, Any] = ran[-1] if ran else {"done": True}
    failed = not last["done"] and last["exit_code"] != 130
    if failed:
        log = options.folder(given.part) / f"log-{last['name'].replace(' ', '-')}.txt"
        print(f"{last['name']} failed; the end of its log:\n" + "\n".join(log.read_text().splitlines()[-15:]))
    elif not complete:
        print("The minutes are over; the same command goes on from here.")
    sys.exit(1 if failed else 0 if complete else 3)


if __name__ == "__main__":
    main()
