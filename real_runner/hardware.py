"""A model on a device with its lanes open: what one or many runs use."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch

from real_runner.account import is_out_of_memory
from real_runner.pieces import picture_of
from synerdiff.core import InputError, Request
from synerdiff.device import open_device
from synerdiff.device.cuda import CudaDevice
from synerdiff.device.lanes import Device, Lane, available_cores
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.decoder import WHOLE, Chunking
from synerdiff.diffusion.execution import execution_of
from synerdiff.diffusion.kernels import apply_execution
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.stages import ChunkFunction, captures, prepare_chunks, prepare_steps
from synerdiff.profile.tables import Profile, Size

ChunkFunctions = tuple[ChunkFunction, ...]


class Hardware:
    """One denoise lane, decode lanes, and two places that are no lanes of the worker: ``intake`` and ``results``.

    On a CPU the first lane is pinned to the first core and decode lanes to the others; on a GPU the denoise stream has
    the higher priority, and with row buckets every step and chunk is a captured graph unless the model's execution is
    eager. Use as a context manager.
    """

    def __init__(
        self,
        model: DiffusionModel,
        device: Device,
        decode_lanes: int,
        row_buckets: Sequence[int] | None,
        others: Mapping[Size, Sequence[int] | None] | None = None,
    ) -> None:
        """``row_buckets``: the model's; ``others``: those of further resolutions. None: eager steps."""
        self.model = model
        self.models = {(model.height, model.width): model} | {size: model.at(size) for size in others or {}}
        """By resolution, with the same weights."""
        self.device = device
        self.hung = False
        """A lane never came back: closing would wait for it for ever."""
        self.warm_up_ns = 0
        self._warm_rows: set[tuple[DiffusionModel, int]] = set()
        self._chunks: dict[tuple[DiffusionModel, int, Chunking], ChunkFunctions] = {}
        on_cpu = device.torch_device.type == "cpu"
        cores = available_cores() if on_cpu else []
        self._threads_before = torch.get_num_threads()
        if on_cpu:
            # What the engine's own thread computes must not spread over the lanes' cores.
            torch.set_num_threads(1)
        # Without graphs a launch takes long, so each lane launches from a thread of its own.
        buckets = {(model.height, model.width): row_buckets, **(others or {})}
        threads = not on_cpu and (None in buckets.values() or not captures(model))
        self.denoise = self._lane("denoise", cores[:1], high_priority=True, launch_thread=threads)
        rest = cores[1:] or cores
        self.decode = [
            self._lane(f"decode{i}", rest[i % len(rest) :][:1] if rest else [], launch_thread=threads)
            for i in range(decode_lanes)
        ]
        self.intake = self._lane("intake", [], launch_thread=True)
        self.results = self._lane("results", [], launch_thread=True)
        began_ns = time.monotonic_ns()
        # The largest first, so that the smaller ones find their memory in the lane's pool.
        for size, rows in sorted(buckets.items(), key=lambda one: -one[0][0] * one[0][1]):
            if rows is not None:
                prepare_steps(self.models[size], rows, self.denoise)
        self.warm_up_ns = time.monotonic_ns() - began_ns

    def at(self, request: Request) -> DiffusionModel:
        """The model at the request's resolution."""
        return self.model if request.size is None else self.models[request.size]

    def _lane(
        self, name: str, cores: Sequence[int], *, high_priority: bool = False, launch_thread: bool = False
    ) -> Lane:
        if self.device.torch_device.type == "cpu":
            return self.device.lane(name, high_priority=high_priority, core=cores[0] if cores else None)

        assert isinstance(self.device, CudaDevice)
        return self.device.lane(name, high_priority=high_priority, launch_thread=launch_thread)

    def chunk_functions(self, lane: int, chunking: Chunking, model: DiffusionModel | None = None) -> ChunkFunctions:
        """The chunks of a decode as they run on that decode lane; on a GPU captured at the first call.

        ``model``: one of ``models``, by default the first.
        """
        model = model or self.model
        key = (model, lane, chunking)
        if key not in self._chunks:
            self._chunks[key] = prepare_chunks(model, chunking, self.decode[lane])
        return self._chunks[key]

    def warm_up(self, rows: Sequence[int], chunking: Chunking, model: DiffusionModel | None = None) -> None:
        """Run what will run, on the lanes that will run it, unless it has run; adds the time to ``warm_up_ns``.

        ``model``: one of ``models``, by default the first. Raises InputError when steps of so many rows do not fit into
        memory.
        """
        began_ns = time.monotonic_ns()
        model = model or self.model
        for count in rows:
            if (model, count) in self._warm_rows:
                continue
            try:
                self._warm_step(model, count)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    f"a step of {count} rows at {model.height}x{model.width}, which the profile allows, does not fit "
                    "into the memory of this device."
                ) from None
            self._warm_rows.add((model, count))
        for lane in range(len(self.decode)):
            if (model, lane, chunking) not in self._chunks:
                self._warm_decode(model, lane, chunking)
        self.device.synchronize()
        self.device.align_clocks()
        self.warm_up_ns += time.monotonic_ns() - began_ns

    def _warm_step(self, model: DiffusionModel, rows: int) -> None:
        states = [model.start(seed, 2, 4.0) for seed in range(rows // 2)]
        states += [model.start(seed, 2, 1.0) for seed in range(rows % 2)]
        for _ in range(2):
            self.denoise.submit(lambda: model.step(states)).result()

    def _warm_decode(self, model: DiffusionModel, lane: int, chunking: Chunking) -> None:
        latent = model.start(0, 2).latent
        for _ in range(2):
            hidden = latent
            for chunk in self.chunk_functions(lane, chunking, model):
                hidden = self.decode[lane].submit(lambda chunk=chunk, hidden=hidden: chunk(hidden)).result()  # type: ignore[misc]
        self.results.submit(lambda: picture_of(hidden)).result()

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)
        if not self.hung:
            self.device.close()

    def __enter__(self) -> Hardware:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_hardware(
    model_name: str,
    device_name: str,
    profile: Profile,
    *,
    decode_lanes: int = 1,
    dtype: str | None = None,
    scheduler: str | None = None,
    check: Callable[[DiffusionModel], None] | None = None,
    execution: str | None = None,
) -> Hardware:
    """Load the model as the profile was measured (resolutions, dtype, row buckets, execution) and open its lanes.

    ``check`` sees the model before anything is warmed up, and may refuse what it is to serve.

    Raises InputError when profile and model do not belong together or something cannot be loaded.
    """
    made_for = profile.head.model
    if made_for and made_for != model_name:
        raise InputError(f"profile '{profile.name}' was made for the model {made_for}, not for {model_name}.")
    device = open_device(device_name)
    chosen = execution_of(profile, execution, device.torch_device.type == "cuda")
    model = load_model(
        model_name,
        device.torch_device,
        dtype or profile.head.dtype or None,
        profile.head.size,
        scheduler,
    )
    if check is not None:
        check(model)
    apply_execution(model, chosen)
    others = {size: one.row_buckets for size, one in profile.others.items()}
    return Hardware(model, device, decode_lanes, profile.row_buckets, others)


def chunking_of(profile: Profile, name: str) -> Chunking:
    """Where the profile's chunking cuts the decode; InputError when the profile does not say."""
    if name == WHOLE.name:
        return WHOLE
    cuts = profile.head.cuts.get(name)
    if cuts is None:
        raise InputError(
            f"profile '{profile.name}' does not say where its chunking {name} cuts the decode, so it cannot be run."
        )
    return Chunking(name, cuts)
