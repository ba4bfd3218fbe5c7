"""Does overlap win, and on which lanes: plain streams, streams with priorities, or a decode in a green context.

    python -m benchmarks.gpu.lanes --model sd15 --device cuda --rows 2,8,16 --out lanes.json

Both slowdowns refer to the piece alone on a plain stream with the whole GPU, so that kinds of lanes can be compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from profiler.bench import Bench, TimedStep, lane_cores
from profiler.machine import device_name
from profiler.sampling import QUICK, Rule
from profiler.timing import Side, alone, chunk_pieces, measure_corun
from synerdiff.core import PPM
from synerdiff.device import open_device
from synerdiff.device.lanes import find_device
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.decoder import WHOLE, Chunking, choose_cuts
from synerdiff.diffusion.stages import prepare_chunks, prepare_steps
from synerdiff.files import atomic

RULE = Rule(least=10, most=30, width=0.02, cap_s=1.5)
SOLO_SAMPLES = 15
CHUNKS = 4
PLAIN, PRIORITIES, GREEN = "plain streams", "priorities", "decode in a green context"
KINDS = (PLAIN, PRIORITIES, GREEN)
DECODE_SHARE = 4
"""A green context gets 1 / this of the multiprocessors, in whole eights."""


def why_not(kind: str, device: torch.device) -> str:
    """Why this kind of lanes cannot be measured here; empty if it can."""
    if kind == PLAIN:
        return ""
    if device.type != "cuda":
        return f"{kind} need a GPU" if kind == PRIORITIES else "green contexts need a GPU"
    if kind == GREEN:
        try:
            from torch.cuda import green_contexts
        except ImportError:
            return f"torch {torch.__version__} has no torch.cuda.green_contexts"
        if not green_contexts.SUPPORTED:
            return f"torch {torch.__version__} was built without green contexts"
        if not hasattr(green_contexts.GreenContext, "Stream"):
            return f"torch {torch.__version__} gives no stream of a green context"
    return ""


@contextmanager
def bench_with(kind: str, model: Any, device: torch.device, rows: tuple[int, ...], rule: Rule) -> Iterator[Bench]:
    """The model on lanes of this kind, its steps captured there."""
    cores = lane_cores() if device.type == "cpu" else (None, None)
    eager = model.denoise
    with open_device(device) as lanes:
        denoise = lanes.lane("denoise", high_priority=kind == PRIORITIES, core=cores[0])
        decode = lanes.lane("decode0", core=cores[1])
        if kind == GREEN:
            # Contexts made one after the other may get the same multiprocessors, so only the decode is confined: it
            # cannot take more than its share, and steps use the whole GPU.
            context = green_context(device)
            decode.stream = context.Stream()  # type: ignore[attr-defined]
        try:
            prepare_steps(model, rows, denoise)
            yield Bench(model, lanes, denoise, decode, rule)
        finally:
            model.denoise, model.row_buckets = eager, None


def green_sms(multiprocessors: int) -> int:
    """The decode's share in whole eights (the unit in which Hopper hands them out), at least eight."""
    return max(8, multiprocessors // DECODE_SHARE // 8 * 8)


def green_context(device: torch.device) -> Any:
    """To be kept as long as its stream is used."""
    from torch.cuda.green_contexts import GreenContext

    total = torch.cuda.get_device_properties(device).multi_processor_count
    return GreenContext.create(num_sms=green_sms(total), device_id=device.index)


def measure_kind(bench: Bench, cuts: list[Chunking], rows: tuple[int, ...], solo_ns: dict[str, float]) -> list[Any]:
    """Cells of one kind of lanes. ``solo_ns`` holds the times on plain streams; the first call, on those, fills it."""
    cells = []
    first = not solo_ns
    steps = {count: TimedStep(bench.model, count) for count in rows}
    own_ns: dict[str, float] = {}
    for count, step in steps.items():
        own_ns[f"step {count}"] = median(alone(Side(bench.denoise, step), SOLO_SAMPLES))
    for cut in cuts:
        for chunk, piece in enumerate(chunk_pieces(bench, prepare_chunks(bench.model, cut, bench.decode))):
            name = f"{cut.name} {chunk}"
            own_ns[name] = median(alone(Side(bench.decode, piece), SOLO_SAMPLES))
            if first:
                solo_ns |= own_ns
            for count, step in steps.items():
                step_ppm, chunk_ppm = (median(samples) for samples in measure_corun(bench, step, piece, ([], [])))
                s_u = step_ppm / PPM * own_ns[f"step {count}"] / solo_ns[f"step {count}"]
                s_v = chunk_ppm / PPM * own_ns[name] / solo_ns[name]
                cell = {"chunking": cut.name, "chunk": chunk, "rows": count, "s_u": s_u, "s_v": s_v}
                cells.append(cell | {"overlap": overlap(s_u, s_v), "chunk_alone_ms": own_ns[name] / 1e6})
    return cells


def overlap(s_u: float, s_v: float) -> float:
    """1/s_u + 1/s_v: above 1 running beside each other pays."""
    return 1 / s_u + 1 / s_v


def measure(model_name: str, device_text: str, rows: tuple[int, ...], quick: bool, keep: Callable[[Any], None]) -> None:
    device = find_device(device_text)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = load_model(model_name, device, None if device.type == "cpu" else torch.bfloat16)
    rule = QUICK if quick else RULE
    results: dict[str, Any] = {"model": model_name, "device": device_name(device), "kinds": {}, "skipped": {}}
    solo_ns: dict[str, float] = {}
    cuts: list[Chunking] = []
    for kind in KINDS:
        reason = why_not(kind, device)
        if reason:
            results["skipped"][kind] = reason
            keep(results)
            continue
        try:
            with bench_with(kind, model, device, rows, rule) as bench, torch.inference_mode():
                if not cuts:
                    from profiler.timing import measure_atoms

                    atoms = measure_atoms(bench)
                    cuts = [WHOLE, choose_cuts([spread.median for spread in atoms.values()], CHUNKS)]
                results["kinds"][kind] = measure_kind(bench, cuts, rows, solo_ns)
        except (RuntimeError, AttributeError, TypeError) as error:
            # Green contexts are a beta feature: drivers and containers may refuse, its interface may change.
            if kind != GREEN:
                raise
            results["skipped"][kind] = f"refused: {str(error).splitlines()[0]}"
        keep(results)


def command(
    title: str, rows: str, measured: Callable[[str, str, tuple[int, ...], bool, Callable[[Any], None]], None]
) -> None:
    """The command line of a benchmark that writes its results, whole at any time, into one JSON file."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", default=rows)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    def keep(results: Any) -> None:
        with atomic(arguments.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    counts = tuple(int(part) for part in arguments.rows.split(","))
    measured(arguments.model, arguments.device, counts, arguments.quick, keep)


if __name__ == "__main__":
    command(__doc__.splitlines()[0], "2,8,16", measure)
