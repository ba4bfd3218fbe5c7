"""Measures what LoRAs, ControlNets and links cost on a device: the table ``adapters.csv`` of a profile.

LoRAs and ControlNets are made at random, as large as trained ones; files are read as the operating system holds them,
which is from its cache after the first time. All points are visited in rounds, so that drift reaches them alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from profiler.bench import Bench, open_bench
from profiler.echo import open_echo
from profiler.sampling import spread_of
from profiler.settings import Settings
from synerdiff.adapters import Adapters
from synerdiff.core import NS_PER_S, InputError
from synerdiff.diffusion.controlnet import load_controlnet, random_controlnet
from synerdiff.diffusion.device import Lane
from synerdiff.diffusion.link import Link, Op
from synerdiff.diffusion.lora import random_lora, read_lora, save_lora
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.rows import RowInputs
from synerdiff.diffusion.split import Residuals, add_residuals, sum_residuals
from synerdiff.profile import Profile, Spread

RANKS = (2, 8, 32)
ROUNDS = 15
QUICK_ROUNDS = 5
WARM_UPS = 2

T = TypeVar("T")
Point = tuple[str, int]
"""Name and size, as in adapters.csv."""
Take = Callable[[], dict[Point, int]]
"""One sample of some points."""
OnProgress = Callable[[int, int, str], None]


def measure_adapters(
    profile: Profile, device: torch.device, quick: bool = False, on_progress: OnProgress | None = None
) -> Adapters:
    """Measure the table for a finished profile, with its model, dtype, resolution and row buckets.

    Raises InputError when the profile does not say what it was made of.
    """
    settings = settings_of(profile, device, quick)
    with tempfile.TemporaryDirectory(prefix="synerdiff-") as folder, open_bench(settings, device) as bench:
        with open_echo(device) as link:
            session = _Session(bench, Path(folder), link)
            rounds = QUICK_ROUNDS if quick else ROUNDS
            for number in range(rounds + WARM_UPS):
                session.round(keep=number >= WARM_UPS)
                if on_progress is not None:
                    on_progress(number + 1, rounds + WARM_UPS, "adapters")
        return Adapters(profile.name, session.tables())


def settings_of(profile: Profile, device: torch.device, quick: bool) -> Settings:
    """The settings under which the profile was measured."""
    info = profile.info
    if info.get("model") is None or profile.row_buckets is None:
        raise InputError(f"profile '{profile.name}' does not name its model or its row buckets; measure it again.")
    sides = info.get("resolution")
    resolution = (sides, sides) if isinstance(sides, int) else tuple(sides) if isinstance(sides, list) else None
    return Settings(str(info["model"]), str(device), profile.row_buckets, info.get("dtype"), resolution, quick)


class _Session:
    """Everything that is timed, ready to be run again and again."""

    def __init__(self, bench: Bench, folder: Path, link: Link) -> None:
        self._bench, self._folder, self._link = bench, folder, link
        self._samples: dict[Point, list[int]] = {}
        self._constants: dict[Point, int] = {}
        model = bench.model
        self._weights = MergedWeights(model.unet)
        self._sizes: dict[str, int] = {}
        for rank in RANKS:
            for which in ("one", "two"):
                lora = random_lora(model.unet, f"{which}{rank}", rank)
                self._sizes[lora.name] = save_lora(lora, folder / f"{lora.name}.safetensors").size_bytes
        self._net = random_controlnet("random", model)
        self._net.net.save_pretrained(str(folder / "random"))
        self._takes: list[Take] = [self._loras(rank) for rank in RANKS]
        self._takes += [self._rows(rows) for rows in model.row_buckets or (1,)]
        self._takes += [self._load, self._transfers]
        self._sizes_of_messages()

    def round(self, keep: bool) -> None:
        for take in self._takes:
            for point, value in take().items():
                if keep:
                    self._samples.setdefault(point, []).append(max(1, value))

    def tables(self) -> dict[str, dict[int, Spread]]:
        found: dict[str, dict[int, Spread]] = {}
        for (name, at), samples in self._samples.items():
            found.setdefault(name, {})[at] = spread_of(samples)
        for (name, at), value in self._constants.items():
            found.setdefault(name, {})[at] = Spread(value, value, value, 1)
        return found

    # --- LoRAs --------------------------------------------------------------------------------------------------

    def _loras(self, rank: int) -> Take:
        """Read and copied beside the denoise lane, merged and restored on it."""
        bench, names = self._bench, (f"one{rank}", f"two{rank}")
        size = self._sizes[names[0]]
        device = bench.model.device

        def take() -> dict[Point, int]:
            read = [_timed(bench.decode, partial(read_lora, f"{name}.safetensors", self._folder)) for name in names]
            files = [file.pinned() if device.type == "cuda" else file for file, _ in read]
            copied = [_timed(bench.decode, partial(file.to, device)) for file in files]
            merge_ns = [_timed(bench.denoise, partial(self._weights.merge, file))[1] for file, _ in copied]
            restore_ns = _timed(bench.denoise, self._weights.restore)[1]
            sent_ns = self._asked_ns(size) - self._asked_ns(0)
            return {
                # A loader is a process of its own: its file crosses the link between the two.
                ("lora_read", size): sum(spent_ns for _, spent_ns in read) // 2 + max(0, sent_ns),
                ("lora_copy", size): sum(spent_ns for _, spent_ns in copied) // 2,
                ("lora_merge", size): merge_ns[0],
                ("lora_merge_more", size): max(0, merge_ns[1] - merge_ns[0]),
                ("lora_restore", size): restore_ns,
            }

        return take

    # --- ControlNets and halves of a step -----------------------------------------------------------------------

    def _rows(self, rows: int) -> Take:
        bench, model = self._bench, self._bench.model
        call = self._net.example_call(model, rows)
        inputs: RowInputs = call.inputs

        def take() -> dict[Point, int]:
            residuals, forward_ns = _timed(bench.denoise, lambda: self._net.residuals(call))
            encoded, encode_ns = _timed(bench.denoise, lambda: model.split.encode(inputs))
            _, decode_ns = _timed(bench.denoise, lambda: model.split.decode(encoded))
            _, add_ns = _timed(
                bench.denoise, lambda: add_residuals(encoded, sum_residuals(rows, [(call.rows, residuals)]))
            )
            return {
                ("controlnet_forward", rows): forward_ns,
                ("denoise_encoder", rows): encode_ns,
                ("denoise_decoder", rows): decode_ns,
                ("residual_add", rows): add_ns,
            }

        return take

    def _load(self) -> dict[Point, int]:
        model, folder = self._bench.model, self._folder / "random"
        return {
            ("controlnet_load", self._net.size_bytes): _timed(
                self._bench.decode, lambda: load_controlnet(folder, model, "again")
            )[1]
        }

    def _sizes_of_messages(self) -> None:
        model = self._bench.model
        call = self._net.example_call(model, 1)
        residuals: Residuals = self._net.residuals(call)
        row_bytes = sum(tensor.numel() * tensor.element_size() for tensor in call.inputs.tensors())
        noise = call.inputs.latents
        self._constants |= {
            ("controlnet_bytes", 0): self._net.size_bytes,
            ("latent_bytes", 1): row_bytes,
            ("residual_bytes", 1): residuals.size_bytes,
            ("prediction_bytes", 1): noise.numel() * noise.element_size(),
        }

    # --- the link -----------------------------------------------------------------------------------------------

    def _transfers(self) -> dict[Point, int]:
        """Half a round trip without data, and the bandwidth that all residuals of the largest step need."""
        largest = max(self._bench.model.row_buckets or (1,)) * self._constants["residual_bytes", 1]
        empty_ns, full_ns = self._asked_ns(0), self._asked_ns(largest)
        return {
            ("link_latency", 0): empty_ns // 2,
            ("link_bytes_per_s", 0): largest * NS_PER_S // max(1, full_ns - empty_ns),
        }

    def _asked_ns(self, size: int) -> int:
        """From a question to its answer of so many bytes."""
        since_ns = time.monotonic_ns()
        self._link.ask(Op.READ, {"bytes": size}, timeout_s=60)
        return time.monotonic_ns() - since_ns


def _timed(lane: Lane, function: Callable[[], T]) -> tuple[T, int]:
    """What it returns, and how long it took on the lane."""
    work = lane.submit(function)
    found = work.result()
    return found, work.end_ns - work.start_ns


def rows_line(adapters: Adapters, names: Sequence[str]) -> list[str]:
    """Medians in milliseconds by size, a line for each name."""
    lines = []
    for name in names:
        table = adapters.tables.get(name, {})
        lines.append(f"  {name:<20}" + "  ".join(f"{at}: {s.median / 1e6:.3g}" for at, s in sorted(table.items())))
    return lines
