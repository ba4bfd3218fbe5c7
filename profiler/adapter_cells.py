"""Measures what LoRAs, ControlNets and links cost on a device: the table ``adapters.csv`` of a profile.

LoRAs and ControlNets are made at random, as large as trained ones. All points are visited in rounds, so that drift
reaches them alike.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from profiler.bench import Bench, open_bench
from profiler.sampling import spread_of
from profiler.second_process import SecondProcess, open_second_process
from profiler.settings import Settings
from synerdiff.core import NS_PER_S, InputError
from synerdiff.device.lanes import Lane, find_device
from synerdiff.device.link import LinkLost
from synerdiff.diffusion.controlnet import example_call, load_controlnet, random_controlnet
from synerdiff.diffusion.denoisers.controlnet import ControlNet
from synerdiff.diffusion.denoisers.unet import Residuals, add_residuals, sum_residuals
from synerdiff.diffusion.execution import execution_of
from synerdiff.diffusion.lora import random_lora, read_lora, save_lora
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.rows import RowInputs
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile, Spread

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
    profile: Profile, device_name: str, quick: bool = False, on_progress: OnProgress | None = None
) -> Adapters:
    """Measure the table for a finished profile, with its model, dtype, resolution and row buckets.

    Raises InputError when the profile does not say what it was made of, and when the second process dies.
    """
    device = find_device(device_name)
    settings = settings_of(profile, device, quick)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    try:
        with open_bench(settings, device) as bench, open_session(settings, bench) as session:
            for number in range(rounds + WARM_UPS):
                session.round(keep=number >= WARM_UPS)
                if on_progress is not None:
                    on_progress(number + 1, rounds + WARM_UPS, "adapters")
            return Adapters(profile.name, session.tables())
    except LinkLost as error:
        raise InputError(f"{error}; nothing was written.") from None


def settings_of(profile: Profile, device: torch.device, quick: bool) -> Settings:
    """The settings under which the profile was measured."""
    head = profile.head
    if not head.model or profile.row_buckets is None:
        raise InputError(f"profile '{profile.name}' does not name its model or its row buckets; measure it again.")
    execution = execution_of(profile, None, device.type == "cuda")
    return Settings(head.model, str(device), profile.row_buckets, head.dtype or None, head.size, quick, execution)


@contextmanager
def open_session(settings: Settings, bench: Bench) -> Iterator[Session]:
    """Everything ready, with the second process except on a machine with one GPU."""
    device = bench.device.torch_device
    with tempfile.TemporaryDirectory(prefix="synerdiff-") as name, ExitStack() as stack:
        folder = Path(name)
        net = random_controlnet("random", bench.model)
        net.net.save_pretrained(str(folder / net.name))
        second = None
        if device.type == "cpu" or torch.cuda.device_count() > 1:
            second = stack.enter_context(open_second_process(settings, folder / net.name, device))
        yield Session(bench, folder, net, second)


class Session:
    """Everything that is timed, ready to be run again and again. Without a ``second`` process the table has no link
    and no service.
    """

    def __init__(self, bench: Bench, folder: Path, net: ControlNet, second: SecondProcess | None) -> None:
        self._bench, self._folder, self._net, self._second = bench, folder, net, second
        self.samples: dict[Point, list[int]] = {}
        """What has been kept."""
        self._constants: dict[Point, int] = {}
        model = bench.model
        self._weights = MergedWeights(model.unet)
        self._sizes: dict[str, int] = {}
        for rank in RANKS:
            for which in ("one", "two"):
                lora = random_lora(model.unet, f"{which}{rank}", rank)
                self._sizes[lora.name] = save_lora(lora, folder / f"{lora.name}.safetensors").size_bytes
        self._sizes_of_messages()
        buckets = model.row_buckets or (1,)
        self._takes: list[Take] = [self._loras(rank) for rank in RANKS]
        self._takes.append(self._load)
        self._of_steps: list[Take] = [self._rows(rows) for rows in buckets]
        if second is not None:
            self._of_steps += [take(rows, second) for rows in buckets for take in (self._served, self._halved)]
            self._of_steps.append(self._link(second))

    def round(self, keep: bool) -> None:
        """Everything once; parts of a step twice, of which the second counts: in a run a step follows a step."""
        for take in [*self._takes, *self._of_steps]:
            if take in self._of_steps:
                take()
            for point, value in take().items():
                if keep:
                    self.samples.setdefault(point, []).append(max(1, value))

    def tables(self) -> dict[str, dict[int, Spread]]:
        tables: dict[str, dict[int, Spread]] = {}
        for (name, at), samples in self.samples.items():
            tables.setdefault(name, {})[at] = spread_of(samples)
        for (name, at), value in self._constants.items():
            tables.setdefault(name, {})[at] = Spread.exactly(value, 1)
        return tables

    # --- LoRAs --------------------------------------------------------------------------------------------------

    def _loras(self, rank: int) -> Take:
        """Read and copied beside the denoise lane, merged and restored on it."""
        bench, names = self._bench, (f"one{rank}", f"two{rank}")
        size = self._sizes[names[0]]
        device = bench.model.device

        def take() -> dict[Point, int]:
            for name in names:
                drop_from_cache(self._folder / f"{name}.safetensors")
            read = [_timed(bench.decode, partial(read_lora, f"{name}.safetensors", self._folder)) for name in names]
            files = [file.pinned() if device.type == "cuda" else file for file, _ in read]
            copied = [_timed(bench.decode, partial(file.to, device)) for file in files]
            merge_ns = [_timed(bench.denoise, partial(self._weights.merge, file))[1] for file, _ in copied]
            restore_ns = _timed(bench.denoise, self._weights.restore)[1]
            sent_ns = 0 if self._second is None else self._asked_ns(size) - self._asked_ns(0)
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
        call = example_call(self._net, model, rows)
        inputs: RowInputs = call.inputs

        def take() -> dict[Point, int]:
            residuals, forward_ns = _timed(bench.denoise, lambda: self._net.residuals(call))
            encoded, encode_ns = _timed(bench.denoise, lambda: model.split.encode(inputs))
            _, decode_ns = _timed(bench.denoise, lambda: model.split.decode(encoded))
            parts = [(call.rows, residuals)]
            _, add_ns = _timed(bench.denoise, lambda: add_residuals(encoded, sum_residuals(rows, parts)))
            return {
                ("controlnet_forward", rows): forward_ns,
                ("denoise_encoder", rows): encode_ns,
                ("denoise_decoder", rows): decode_ns,
                ("residual_add", rows): add_ns,
            }

        return take

    def _load(self) -> dict[Point, int]:
        model, folder = self._bench.model, self._folder / self._net.name
        _, load_ns = _timed(self._bench.decode, lambda: load_controlnet(folder, model, "again"))
        return {("controlnet_load", self._net.size_bytes): load_ns}

    def _sizes_of_messages(self) -> None:
        model = self._bench.model
        call = example_call(self._net, model, 1)
        residuals: Residuals = self._net.residuals(call)
        row_bytes = sum(tensor.numel() * tensor.element_size() for tensor in call.inputs.tensors())
        noise = call.inputs.latents
        self._constants |= {
            ("controlnet_bytes", 0): self._net.size_bytes,
            ("latent_bytes", 1): row_bytes,
            ("residual_bytes", 1): residuals.size_bytes,
            ("prediction_bytes", 1): noise.numel() * noise.element_size(),
        }

    # --- the second process -------------------------------------------------------------------------------------

    def _served(self, rows: int, second: SecondProcess) -> Take:
        """A forward with the ControlNet in the second process, as the runner makes it."""
        bench, model = self._bench, self._bench.model
        inputs = example_call(self._net, model, rows).inputs
        spent: dict[Point, int] = {}

        def step() -> None:
            second.call(inputs)
            since_ns = _now_ns(bench)
            encoded = model.split.encode(inputs)
            spent["denoise_encoder_beside", rows] = _now_ns(bench) - since_ns
            residuals, spent["controlnet_forward_beside", rows] = second.residuals()
            steered = add_residuals(encoded, residuals)
            since_ns = _now_ns(bench)
            model.split.decode(steered)
            spent["denoise_decoder_beside", rows] = _now_ns(bench) - since_ns

        def take() -> dict[Point, int]:
            bench.denoise.submit(step).result()
            return dict(spent)

        return take

    def _halved(self, rows: int, second: SecondProcess) -> Take:
        """A forward here and another one there at the same time, as the halves of the guidance run."""
        bench, model = self._bench, self._bench.model
        inputs = example_call(self._net, model, rows).inputs

        def both() -> int:
            second.step(inputs)
            since_ns = _now_ns(bench)
            model.denoise(inputs)
            own_ns = _now_ns(bench) - since_ns
            return (own_ns + second.prediction_ns()) // 2

        return lambda: {("denoise_forward_beside", rows): bench.denoise.submit(both).result()}

    def _link(self, second: SecondProcess) -> Take:
        """The bandwidth that all residuals of the largest step need, and what else a call takes twice.

        That is everything from the question to the answer but the forward: packing, waking who waits, unpacking, while
        this process computes as well, but less than the other one.
        """
        bench, model = self._bench, self._bench.model
        buckets = model.row_buckets or (1,)
        inputs, fewest = (example_call(self._net, model, rows).inputs for rows in (max(buckets), min(buckets)))
        largest = max(buckets) * self._constants["residual_bytes", 1]
        both_ways = largest + max(buckets) * self._constants["latent_bytes", 1]

        def call() -> int:
            since_ns = time.monotonic_ns()
            second.call(inputs)
            model.split.encode(fewest)
            _, forward_ns = second.residuals()
            return time.monotonic_ns() - since_ns - forward_ns

        def take() -> dict[Point, int]:
            empty_ns, full_ns = self._asked_ns(0), self._asked_ns(largest)
            bytes_per_s = largest * NS_PER_S // max(1, full_ns - empty_ns)
            handed_over_ns = bench.denoise.submit(call).result()
            latency_ns = max(0, handed_over_ns - both_ways * NS_PER_S // bytes_per_s) // 2
            return {("link_bytes_per_s", 0): bytes_per_s, ("link_latency", 0): latency_ns}

        return take

    def _asked_ns(self, size: int) -> int:
        """From a question to its answer of so many bytes."""
        second = self._second
        assert second is not None

        def ask() -> int:
            since_ns = time.monotonic_ns()
            second.data(size)
            return time.monotonic_ns() - since_ns

        return self._bench.denoise.submit(ask).result()


def drop_from_cache(file: Path) -> None:
    """Have the operating system forget what it holds of a file, so that it is read from storage; where it can."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _now_ns(bench: Bench) -> int:
    """Once all that was launched has ended."""
    if bench.on_gpu:
        torch.cuda.current_stream().synchronize()
    return time.monotonic_ns()


def _timed(lane: Lane, function: Callable[[], T]) -> tuple[T, int]:
    """What it returns, and how long it took on the lane."""
    work = lane.submit(function)
    result = work.result()
    return result, work.end_ns - work.start_ns


def rows_line(adapters: Adapters, names: Sequence[str]) -> list[str]:
    """Medians in milliseconds by size, a line for each name."""
    lines = []
    for name in names:
        table = adapters.tables.get(name, {})
        lines.append(f"  {name:<26}" + "  ".join(f"{at}: {s.median / 1e6:.3g}" for at, s in sorted(table.items())))
    return lines
