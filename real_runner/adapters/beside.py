"""A process beside the worker: ControlNet service, guidance peer or LoRA loader, run by ``python -m`` or torchrun.

It answers one message after another until it is told to stop or its worker is gone, and leaves Ctrl-C to the worker.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from real_runner.account import one_line
from real_runner.adapters import processes
from real_runner.adapters.controlnets import (
    Call,
    ImageMemory,
    OwnControlNets,
    RemoteControlNets,
    control_call_in,
    controlnet_place,
    forward,
)
from real_runner.adapters.ledger import Clock, Ledger, at
from real_runner.adapters.loras import OwnReader
from real_runner.adapters.peer import lora_fields, lora_in, lora_tensors
from synerdiff.config.cluster import Cluster, Service, cluster_of
from synerdiff.device.link import Link, LinkLost, Message, Op
from synerdiff.diffusion.controlnet import load_controlnet
from synerdiff.diffusion.denoisers.controlnet import ControlCall, ControlNet
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.rows import RowInputs, select_rows
from synerdiff.engine.adapters import Cache

LOADER_NICENESS = 10


Answer = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]
"""Fields and tensors of a message."""


class Answers(Protocol):
    """What a process does. ``answer`` may be called by one thread per link; what it raises is sent back as a reason."""

    def answer(self, message: Message, memory: Any) -> Answer:
        """Do what a message asks for; ``memory`` is what was remembered of this link."""

    def new_memory(self) -> Any:
        """What is remembered of one link."""


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
        nets = {name: load_controlnet(place, model, name) for name, place in controlnets.items() if remote is None}
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
        noise, began = forward(self._model, inputs, calls, self._controlnets, self._clock)
        self._ledger.add(self._gpu, "guidance", "half", began, self._clock.now(), len(inputs.latents), samples)
        return noise


def serve(rank: int, spec: processes.Spec, store: Any) -> None:
    """Be the process of that rank until the worker says stop or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cluster = cluster_of(spec.cluster)
    layout = processes.processes_of(cluster)
    process = layout[rank]
    device = processes.device_of(process, spec)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store.set(f"up{rank}", "1")
    links = processes.open_links(process, layout, spec, store)
    worker = links[0]
    try:
        answers = _answers_for(process, layout, cluster, spec, device, links)
    except Exception as error:  # the worker reports it
        store.set(processes.ready_key(rank), f"failed: {one_line(error)}")
        return
    store.set(processes.ready_key(rank), "ready")
    if spec.device == "cpu":
        if (core := processes.core_of(rank)) is not None:
            os.sched_setaffinity(0, {core})
        if process.kind == "loader":
            # Nobody waits for a file before the bound; who computes on the same core comes first.
            os.nice(LOADER_NICENESS)
    if process.kind == "controlnet":
        for link in [link for other, link in links.items() if other != 0]:
            threading.Thread(target=_answer_all, args=(link, answers), daemon=True).start()
    _answer_all(worker, answers)


def _answers_for(
    process: processes.Process,
    layout: list[processes.Process],
    cluster: Cluster,
    spec: processes.Spec,
    device: torch.device,
    links: Mapping[int, Link],
) -> Answers:
    if process.kind == "loader":
        return LoraLoader(Path(spec.loras))
    model = spec.load_model(device)
    if process.kind == "controlnet":
        return ControlNetService(cluster.controlnet_services[process.index], model, spec.controlnet_folder)
    remote = None
    if cluster.strategies.controlnets == "service":
        remote = RemoteControlNets(processes.replicas_of(layout, cluster, links), Ledger(), spec.timeout_s)
    places = {name: controlnet_place(name, spec.controlnet_folder) for name in spec.controlnet_names}
    return GuidanceHalf(process.gpu, model, places, remote, Clock(device))


def _answer_all(link: Link, answers: Answers) -> None:
    memory = answers.new_memory()
    try:
        while (message := link.receive()).op is not Op.STOP:
            number = {"number": message.fields.get("number", 0)}
            try:
                fields, tensors = answers.answer(message, memory)
            except Exception as error:  # it concerns what was asked, and this process lives on
                reason = {"reason": one_line(error.with_traceback(None)), "entries": [], "faults": []}
                link.send(Op.FAILED, reason | number)
            else:
                link.send(Op.DONE, dict(fields) | number, tensors)
    except LinkLost:
        return


def serve_under_torchrun() -> None:
    """Be the process of this rank, once the worker has said what it needs; this process then ends."""
    store = processes.torchrun_store()
    with suppress(LinkLost):
        serve(processes.own_rank(), processes.spec_from(store.get("spec").decode()), store)
    os._exit(0)


def main(arguments: list[str]) -> None:
    """RANK STORE SPEC: this process's rank, the file where the processes meet, and the spec as JSON."""
    rank, store, spec = arguments
    distributed: Any = torch.distributed
    try:
        serve(int(rank), processes.spec_from(spec), distributed.FileStore(store, -1))
    except LinkLost:
        return
    finally:
        sys.stderr.flush()
    # Threads that still wait for a link must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
