"""What the processes beside a worker do with a message: run a ControlNet, run half of the guidance, read a LoRA."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from real_runner.adapters.controlnets import (
    Call,
    ImageMemory,
    OwnControlNets,
    RemoteControlNets,
    control_call_in,
    controlnet_place,
)
from real_runner.adapters.forward import forward
from real_runner.adapters.loras import OwnReader
from real_runner.adapters.peer import lora_fields, lora_in, lora_tensors
from real_runner.adapters.spans import Clock, Ledger, at
from synerdiff.config.cluster import Service
from synerdiff.device.link import Message, Op
from synerdiff.diffusion.controlnet import load_controlnet
from synerdiff.diffusion.denoisers.controlnet import ControlCall, ControlNet
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.rows import RowInputs, select_rows
from synerdiff.engine.caches import Cache

Answer = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]


class LoraLoader:
    """Reads LoRAs from the allowed folder."""

    def __init__(self, folder: Path) -> None:
        self._reader = OwnReader(folder)

    def new_memory(self) -> None:
        return None

    def answer(self, message: Message, memory: Any) -> Answer:
        lora = self._reader.read(str(message.fields["file"]))
        return lora_fields(lora), lora_tensors(lora)


class ControlNetService:
    """One GPU's ControlNets, one call at a time, for the worker and its peer."""

    def __init__(self, service: Service, model: DiffusionModel, folder: Path | None) -> None:
        self._gpu, self._model, self._folder = service.gpu, model, folder
        # Only the model's shapes are needed from here on.
        model.unet.to("meta")
        model.vae.to("meta")
        self._held = Cache(len(service.controlnets) if service.slots is None else service.slots)
        self._nets: dict[str, ControlNet] = {}
        self._turn = threading.Lock()
        for name in service.controlnets:
            self._take(name)

    def new_memory(self) -> ImageMemory:
        return ImageMemory()

    def answer(self, message: Message, memory: ImageMemory) -> Answer:
        call = control_call_in(message, memory)
        samples = tuple(message.fields["samples"])
        ledger = Ledger()
        with self._turn:
            since_ns = time.monotonic_ns()
            if not self._held.use(call.name):
                self._take(call.name)
                since_ns = self._span(ledger, "load", since_ns, 0, samples)
            residuals = self._nets[call.name].residuals(call)
            self._span(ledger, "controlnet", since_ns, len(call.rows), samples)
        return ledger.sent(), residuals.named()

    def _span(self, ledger: Ledger, kind: str, since_ns: int, rows: int, samples: tuple[int, ...]) -> int:
        if self._model.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        now_ns = time.monotonic_ns()
        ledger.add(self._gpu, "controlnet", kind, at(since_ns), at(now_ns), rows, samples)
        return now_ns

    def _take(self, name: str) -> None:
        self._nets[name] = load_controlnet(controlnet_place(name, self._folder), self._model, name)
        self._held.put(name)
        for other in [other for other in self._nets if other not in self._held]:
            del self._nets[other]


class GuidanceHalf:
    """The unconditional rows of each step, with the same LoRAs and ControlNets as the worker's."""

    def __init__(
        self,
        gpu: int,
        model: DiffusionModel,
        controlnets: Mapping[str, Path],
        remote: RemoteControlNets | None,
        clock: Clock,
    ) -> None:
        self._gpu, self._model, self._clock = gpu, model, clock
        self._weights = MergedWeights(model.unet)
        self._ledger = Ledger() if remote is None else remote.ledger
        nets = {}
        if remote is None:
            nets = {name: load_controlnet(place, model, name) for name, place in controlnets.items()}
        self._controlnets = remote or OwnControlNets(nets, gpu, "guidance", clock, self._ledger)

    def new_memory(self) -> ImageMemory:
        return ImageMemory()

    def answer(self, message: Message, memory: ImageMemory) -> Answer:
        fields = message.fields
        samples = tuple(fields["samples"])
        start = self._clock.now()
        if message.op is Op.STEP:
            noise = self._half(message, memory, samples)
            return self._ledger.sent(), {"noise": noise}
        if message.op is Op.MERGE:
            self._weights.merge(lora_in(message), float(fields["scale"]))
            kind = "merge"
        else:
            self._weights.restore([str(name) for name in fields["keep"]])
            kind = "restore"
        self._ledger.add(self._gpu, "guidance", kind, start, self._clock.now(), samples=samples)
        return self._ledger.sent(), {}

    def _half(self, message: Message, memory: ImageMemory, samples: tuple[int, ...]) -> torch.Tensor:
        inputs = RowInputs.from_named(message.tensors)
        calls = []
        for name, rows, images, scales, users in message.fields["calls"]:
            control = ControlCall(
                str(name), tuple(rows), select_rows(inputs, rows), memory.batch(images, message), tuple(scales)
            )
            calls.append(Call(control, tuple(images), tuple(users)))
        done = forward(self._model, inputs, calls, self._controlnets, self._clock)
        self._ledger.add(self._gpu, "guidance", "half", done.began, self._clock.now(), len(inputs.latents), samples)
        return done.outputs
