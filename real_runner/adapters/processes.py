"""The processes of a run: which a cluster file with one worker asks for, who talks to whom, what each knows.

Rank 0 is the worker; then come the guidance peer, the ControlNet services and the LoRA loaders, as far as the
strategies need them. The worker starts them on this machine, or torchrun has, on one or many.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch

from real_runner.adapters.controlnets import Replica
from synerdiff.config.cluster import Cluster
from synerdiff.core import InputError
from synerdiff.device.link import Link, LinkLost, Op
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.model import DiffusionModel

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_S = 5.0
_LOOK_EVERY_S = 0.02
Kind = Literal["worker", "guidance", "controlnet", "loader"]
START_S = 120.0
"""How long a process waits for the others to come up."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process. ``gpu``: as the cluster numbers them, on a CPU only a name; -1 for a loader, which needs none."""

    rank: int
    kind: Kind
    gpu: int
    index: int = 0

    @property
    def name(self) -> str:
        """As messages call it."""
        if self.kind == "loader":
            return f"LoRA loader {self.index}"
        what = {"worker": "the worker", "guidance": "the guidance peer", "controlnet": "the ControlNet service"}
        return f"{what[self.kind]} on GPU {self.gpu}"


def processes_of(cluster: Cluster) -> list[Process]:
    """All processes by rank. Raises InputError for what cannot be run on hardware."""
    if len(cluster.workers) != 1:
        raise InputError(f"the cluster has {len(cluster.workers)} workers; a run on hardware has one.")
    if cluster.router.kind == "shared-queue":
        raise InputError("router: a run on hardware has one worker and no shared queue; leave this out.")
    worker, strategies = cluster.workers[0], cluster.strategies
    if set(worker.lanes) != {worker.denoise_gpu}:
        raise InputError("workers[0]: on hardware every decode lane is on the denoise GPU.")
    if cluster.link.gb_per_s is not None or cluster.link.latency_us is not None:
        raise InputError("link: a run on hardware has the links that it has; leave this out.")
    if cluster.loras.storage_gb_per_s is not None:
        raise InputError("loras.storage_gb_per_s: a run on hardware has the storage that it has; leave this out.")
    if worker.speed != 1 or worker.sample_host_s is not None:
        raise InputError("workers[0]: a run on hardware has the speed that it has; leave speed and sample_host_s out.")
    if worker.controlnet_slots is not None:
        raise InputError("workers[0].controlnet_slots: on hardware a worker holds all ControlNets of its trace.")
    if any(cluster.loras.sizes_mib):
        raise InputError("loras.sizes_mib: on hardware files have the sizes that they have; leave this out.")
    kinds: list[tuple[Kind, int, int]] = [("worker", worker.denoise_gpu, 0)]
    if strategies.guidance == "two-gpus":
        assert worker.guidance_gpu is not None
        kinds.append(("guidance", worker.guidance_gpu, 0))
    if strategies.controlnets == "service":
        kinds += [("controlnet", service.gpu, index) for index, service in enumerate(cluster.controlnet_services)]
    if strategies.loras == "asynchronous":
        kinds += [("loader", -1, index) for index in range(cluster.loras.loaders)]
    return [Process(rank, kind, gpu, index) for rank, (kind, gpu, index) in enumerate(kinds)]


def links_of(layout: list[Process]) -> list[tuple[int, int]]:
    """Pairs of ranks that talk to each other, in the order in which every process opens its own."""
    talks = {("worker", "guidance"), ("worker", "controlnet"), ("worker", "loader"), ("guidance", "controlnet")}
    return [(a.rank, b.rank) for a, b in combinations(layout, 2) if (a.kind, b.kind) in talks]


def core_of(rank: int) -> int | None:
    """The core for a process on a CPU: the first is the denoise lane's, the others are shared in turn."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    others = cores[1:] or cores
    return others[(rank - 1) % len(others)]


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
        """The model as the process that runs it has it."""
        model = load_model(self.model, device, getattr(torch, self.dtype), self.resolution)
        model.row_buckets = self.row_buckets
        return model

    @property
    def controlnet_folder(self) -> Path | None:
        """Where ControlNets lie, None for none."""
        return Path(self.controlnets) if self.controlnets else None


def spec_from(text: str) -> Spec:
    """A `Spec` from its JSON."""
    fields = json.loads(text)
    for name in ("resolution", "row_buckets", "controlnet_names"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Spec(**fields)


def device_of(process: Process, spec: Spec) -> torch.device:
    """A loader keeps to the host. On one machine GPUs are numbered as in the cluster, else within their machine."""
    if spec.device == "cpu" or process.kind == "loader":
        return torch.device("cpu")
    return torch.device("cuda", process.gpu if spec.one_machine else process.gpu % torch.cuda.device_count())


def open_links(process: Process, layout: list[Process], spec: Spec, store: Any) -> dict[int, Link]:
    """This process's links, by the rank at the other end. Raises LinkLost."""
    links = {}
    for first, second in links_of(layout):
        if process.rank not in (first, second):
            continue
        other = layout[second if process.rank == first else first]
        # Tensors between two processes stay on the host when one of them has no GPU.
        device = device_of(other if other.kind == "loader" else process, spec)
        side = int(process.rank == second)
        links[other.rank] = Link(
            store, f"{first}-{second}", other.name, side, device, one_machine=spec.one_machine, timeout_s=START_S
        )
    return links


def replicas_of(layout: list[Process], cluster: Cluster, links: Mapping[int, Link]) -> list[Replica]:
    """The ControlNet services at the other ends of these links."""
    of = [(links[one.rank], cluster.controlnet_services[one.index]) for one in layout if one.kind == "controlnet"]
    return [Replica(link, service.controlnets, service.slots is None) for link, service in of]


def ready_key(rank: int) -> str:
    """Under which a process says that it is ready, or ``failed:`` and why it cannot start."""
    return f"ready{rank}"


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def own_rank() -> int:
    """This process's rank under torchrun; 0, the worker's, without it."""
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def torchrun_store() -> Any:
    """Where the processes that torchrun has started meet."""
    torch_distributed = distributed()
    store, _, _ = next(torch_distributed.rendezvous("env://"))
    store.set_timeout(timedelta(seconds=START_S))
    return torch_distributed.PrefixStore("synerdiff", store)


def distributed() -> Any:
    """torch.distributed, parts of which are not typed."""
    return torch.distributed


class Processes:
    """The worker's links, by rank, and the processes that it has started. Close it in any case: that ends them."""

    def __init__(self, layout: list[Process], spec: Spec) -> None:
        self.started: dict[int, subprocess.Popen[bytes]] = {}
        self.links: dict[int, Link] = {}
        self._layout = layout
        self._folder = Path(tempfile.mkdtemp(prefix="synerdiff-"))
        try:
            text = json.dumps(asdict(spec))
            if started_by_torchrun():
                store = torchrun_store()
                store.set("spec", text)
            else:
                store = self._start(text)
            self._wait_for(store, [f"up{process.rank}" for process in layout[1:]])
            self.links = open_links(layout[0], layout, spec, store)
            self._wait_for(store, [ready_key(process.rank) for process in layout[1:]])
            for process in layout[1:]:
                answer = store.get(ready_key(process.rank)).decode()
                if answer.startswith("failed: "):
                    raise InputError(f"{process.name} cannot start: {answer.removeprefix('failed: ').rstrip('.')}.")
        except LinkLost as error:
            self.close()
            raise InputError(f"a process beside the worker cannot start: {error}.") from None
        except BaseException:
            self.close()
            raise

    def _start(self, text: str) -> Any:
        meeting = self._folder / "meeting"
        environment = dict(os.environ)
        places = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        for process in self._layout[1:]:
            command = [sys.executable, "-m", "real_runner.adapters.beside", str(process.rank), str(meeting), text]
            self.started[process.rank] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        return distributed().FileStore(str(meeting), -1)

    def _wait_for(self, store: Any, keys: list[str]) -> None:
        """Wait until each process beside the worker has set its key."""
        until = time.monotonic() + START_S
        for process, key in zip(self._layout[1:], keys, strict=True):
            while not store.check([key]):
                child = self.started.get(process.rank)
                if child is not None and child.poll() is not None:
                    raise InputError(f"{process.name} ended with exit code {child.returncode} before it was up.")
                if time.monotonic() > until:
                    raise InputError(f"{process.name} did not come up within {START_S:g} s.")
                time.sleep(_LOOK_EVERY_S)

    def close(self) -> None:
        """Tell all to stop, and end those that do not."""
        for link in self.links.values():
            with suppress(LinkLost):
                link.send(Op.STOP)
        until = time.monotonic() + STOP_S
        for child in self.started.values():
            if not self.links:
                child.terminate()
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def require_processes(layout: list[Process]) -> None:
    """InputError unless torchrun, if it started this process, has started one for each process of the layout."""
    if not started_by_torchrun():
        return
    world = int(os.environ["WORLD_SIZE"])
    if world != len(layout):
        names = ", ".join(process.name for process in layout)
        raise InputError(f"torchrun started {world} processes; this run needs {len(layout)}: {names}.")
