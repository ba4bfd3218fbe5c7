"""A process beside the worker: ControlNet service, guidance peer or LoRA loader, run by ``python -m`` or torchrun.

It answers one message after another until it is told to stop or its worker is gone, and leaves Ctrl-C to the worker.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from real_runner.adapters.controlnets import RemoteControlNets, Replica, controlnet_place
from real_runner.adapters.layout import Role, core_of, links_of, roles_of
from real_runner.adapters.spans import Clock, Ledger
from real_runner.faults import one_line
from synerdiff.config.cluster import Cluster, cluster_of
from synerdiff.device.link import Link, LinkLost, Message, Op
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.model import DiffusionModel

LOADER_NICENESS = 10
START_S = 120.0
"""How long a process waits for the others to come up."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What every process of a run knows. ``dtype``: torch's name; paths as text, empty for none."""

    cluster: dict[str, Any]
    model: str
    device: str
    dtype: str
    resolution: tuple[int, int]
    row_buckets: tuple[int, ...] | None
    loras: str
    controlnets: str
    controlnet_names: tuple[str, ...]
    timeout_s: float
    one_machine: bool

    def load_model(self, device: torch.device) -> DiffusionModel:
        model = load_model(self.model, device, getattr(torch, self.dtype), self.resolution)
        model.row_buckets = self.row_buckets
        return model

    @property
    def controlnet_folder(self) -> Path | None:
        return Path(self.controlnets) if self.controlnets else None


def spec_from(text: str) -> Spec:
    fields = json.loads(text)
    for name in ("resolution", "row_buckets", "controlnet_names"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Spec(**fields)


class Answers(Protocol):
    """What a role does. ``answer`` may be called by one thread per link; what it raises is sent back as a reason."""

    def answer(self, message: Message, memory: Any) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]: ...

    def new_memory(self) -> Any:
        """What is remembered of one link."""


def device_of(role: Role, spec: Spec) -> torch.device:
    """A loader keeps to the host. On one machine GPUs are numbered as in the cluster, else within their machine."""
    if spec.device == "cpu" or role.kind == "loader":
        return torch.device("cpu")
    return torch.device("cuda", role.gpu if spec.one_machine else role.gpu % torch.cuda.device_count())


def open_links(role: Role, roles: list[Role], spec: Spec, store: Any) -> dict[int, Link]:
    """This process's links, by the rank at the other end. Raises LinkLost."""
    links = {}
    for first, second in links_of(roles):
        if role.rank not in (first, second):
            continue
        other = roles[second if role.rank == first else first]
        # Tensors between two processes stay on the host when one of them has no GPU.
        host = torch.device("cpu")
        device = host if "loader" in (role.kind, other.kind) else device_of(role, spec)
        side = int(role.rank == second)
        links[other.rank] = Link(
            store,
            f"{first}-{second}",
            other.name,
            side,
            device,
            one_machine=spec.one_machine,
            timeout_s=START_S,
        )
    return links


def replicas_of(roles: list[Role], cluster: Cluster, links: Mapping[int, Link]) -> list[Replica]:
    """The ControlNet services at the other ends of these links."""
    found = []
    for role in roles:
        if role.kind == "controlnet":
            service = cluster.controlnet_services[role.index]
            found.append(Replica(links[role.rank], service.controlnets, service.slots is None))
    return found


def ready_key(rank: int) -> str:
    """Under which a process says that it is ready, or ``failed:`` and why it cannot start."""
    return f"ready{rank}"


def serve(rank: int, spec: Spec, store: Any) -> None:
    """Be the process of that rank until the worker says stop or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cluster = cluster_of(spec.cluster)
    roles = roles_of(cluster)
    role = roles[rank]
    device = device_of(role, spec)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store.set(f"up{rank}", "1")
    links = open_links(role, roles, spec, store)
    worker = links[0]
    try:
        answers = _answers_for(role, roles, cluster, spec, device, links)
    except Exception as error:  # the worker reports it
        store.set(ready_key(rank), f"failed: {one_line(error)}")
        return
    store.set(ready_key(rank), "ready")
    if spec.device == "cpu":
        if (core := core_of(rank)) is not None:
            os.sched_setaffinity(0, {core})
        if role.kind == "loader":
            # Nobody waits for a file before the bound; who computes on the same core comes first.
            os.nice(LOADER_NICENESS)
    if role.kind == "controlnet":
        for link in [link for other, link in links.items() if other != 0]:
            threading.Thread(target=_answer_all, args=(link, answers), daemon=True).start()
    _answer_all(worker, answers)


def _answers_for(
    role: Role, roles: list[Role], cluster: Cluster, spec: Spec, device: torch.device, links: Mapping[int, Link]
) -> Answers:
    from real_runner.adapters.roles import ControlNetService, GuidanceHalf, LoraLoader

    if role.kind == "loader":
        return LoraLoader(Path(spec.loras))
    model = spec.load_model(device)
    if role.kind == "controlnet":
        return ControlNetService(cluster.controlnet_services[role.index], model, spec.controlnet_folder)
    remote = None
    if cluster.strategies.controlnets == "service":
        remote = RemoteControlNets(replicas_of(roles, cluster, links), Ledger(), spec.timeout_s)
    places = {name: controlnet_place(name, spec.controlnet_folder) for name in spec.controlnet_names}
    return GuidanceHalf(role.gpu, model, places, remote, Clock(device))


def _answer_all(link: Link, answers: Answers) -> None:
    memory = answers.new_memory()
    try:
        while (message := link.receive()).op is not Op.STOP:
            number = {"number": message.fields.get("number", 0)}
            try:
                fields, tensors = answers.answer(message, memory)
            except Exception as error:  # it concerns what was asked, and this process lives on
                reason = {"reason": one_line(error.with_traceback(None)), "spans": [], "faults": []}
                link.send(Op.FAILED, reason | number)
            else:
                link.send(Op.DONE, dict(fields) | number, tensors)
    except LinkLost:
        return


def main(arguments: list[str]) -> None:
    """RANK STORE SPEC: this process's rank, the file where the processes meet, and the spec as JSON."""
    rank, store, spec = arguments
    distributed: Any = torch.distributed
    try:
        serve(int(rank), spec_from(spec), distributed.FileStore(store, -1))
    except LinkLost:
        return
    finally:
        sys.stderr.flush()
    # Threads that still wait for a link must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
