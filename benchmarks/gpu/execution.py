"""The denoiser's forward alone: eager, compiled and as a CUDA graph, at a few row counts.

python -m benchmarks.gpu.execution --model sd15 --device cuda --rows 2,16 --out execution.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.floors import beside_floor, gpu_key, work_of
from benchmarks.gpu.lanes import command
from profiler.datasheets import MODELS
from profiler.machine import device_name
from profiler.sampling import QUICK, spread_of, warm_up
from profiler.timing import Side, alone
from synerdiff.device import open_device
from synerdiff.device.lanes import find_device
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.denoisers.unet import EagerDenoiser
from synerdiff.diffusion.stages import prepare_steps

SAMPLES = 20
KINDS = ("eager", "graphs", "compiled")
"""Compiled last: compiling takes longest, and an interrupted measurement then lacks only that."""


class Forward:
    """One forward of fixed inputs, to be run again and again."""

    def __init__(self, denoise: Callable[[Any], torch.Tensor], inputs: Any) -> None:
        self._denoise, self._inputs = denoise, inputs

    def again(self) -> Callable[[], object]:
        return self._run

    @torch.inference_mode()
    def _run(self) -> None:
        self._denoise(self._inputs)


def measure(model_name: str, device_text: str, rows: tuple[int, ...], quick: bool, keep: Callable[[Any], None]) -> None:
    device = find_device(device_text)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    model = load_model(model_name, device, torch.bfloat16 if on_gpu else None)
    condition = model.encode_prompt(model.prompts.default_prompt(0))
    results: dict[str, Any] = {"model": model_name, "device": device_name(device), "times": [], "skipped": {}}
    floors = model_name in MODELS
    with open_device(device) as lanes:
        lane = lanes.lane("denoise")
        for kind in KINDS:
            if kind == "graphs" and not on_gpu:
                results["skipped"][kind] = "CUDA graphs need a GPU"
                continue
            if kind == "compiled" and not on_gpu:
                results["skipped"][kind] = "compiling for a CPU says nothing about a GPU and takes minutes"
                continue
            for count in rows[:1] if kind == "compiled" else rows:
                began_s = time.monotonic()
                eager = EagerDenoiser(model.unet)
                denoise: Any = eager
                if kind == "compiled":
                    denoise = EagerDenoiser(torch.compile(model.unet, dynamic=False))
                elif kind == "graphs":
                    model.denoise = eager
                    prepare_steps(model, (count,), lane)
                    denoise = model.denoise
                side = Side(lane, Forward(denoise, model.example_rows(count, condition)))
                warm_up(lambda n, side=side: alone(side, n), 2.0)  # type: ignore[misc]
                prepared_s = time.monotonic() - began_s
                spread = spread_of(alone(side, QUICK.most if quick else SAMPLES))
                row: dict[str, Any] = {"kind": kind, "rows": count, "ms": spread.median / 1e6, "n": spread.n}
                row |= {"p10_ms": spread.p10 / 1e6, "p90_ms": spread.p90 / 1e6, "it_per_s": 1e9 / spread.median}
                if floors:
                    row |= beside_floor(spread.median, *work_of(model_name, count), gpu_key(results["device"]))
                results["times"].append(row | {"prepared_s": prepared_s})
                keep(results)
    keep(results)


if __name__ == "__main__":
    command(__doc__.splitlines()[0], "2,16", measure)
