"""Opens what a worker needs for its adapters, by the cluster's strategies: in its own process or beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from real_runner.adapters.controlnets import ControlNetSource, OwnControlNets, RemoteControlNets, controlnet_place
from real_runner.adapters.ledger import Clock, Ledger
from real_runner.adapters.loras import FileSource, LoraStore, OwnReader, RemoteReader, Weights
from real_runner.adapters.peer import GuidancePeer
from real_runner.adapters.processes import (
    Processes,
    Spec,
    processes_of,
    replicas_of,
    require_processes,
    started_by_torchrun,
)
from real_runner.adapters.serving import Folders, Parts, Serving
from real_runner.hardware import Hardware
from synerdiff.config.cluster import Cluster
from synerdiff.core import Request
from synerdiff.diffusion.controlnet import load_controlnet
from synerdiff.diffusion.merging import MergedWeights

TIMEOUT_S = 30.0
"""After so long without an answer a process counts as lost; below the engine's watchdog."""


def open_serving(
    hardware: Hardware,
    cluster: Cluster,
    requests: Sequence[Request],
    folders: Folders,
    timeout_s: float = TIMEOUT_S,
) -> Serving:
    """Load what the requests ask for and start the processes that the cluster's strategies name.

    Use as a context manager: leaving ends the processes. Raises InputError for what cannot be served.
    """
    layout, model = processes_of(cluster), hardware.model
    names = tuple(sorted({use.name for request in requests for use in request.controlnets}))
    spec = Spec(
        cluster=cluster.model_dump(mode="json"),
        model=model.name,
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        resolution=(model.height, model.width),
        row_buckets=model.row_buckets,
        loras="" if folders.loras is None else str(folders.loras.resolve()),
        controlnets="" if folders.controlnets is None else str(folders.controlnets.resolve()),
        controlnet_names=names,
        timeout_s=timeout_s,
        one_machine=not started_by_torchrun(),
    )
    if folders.loras is None:
        layout = [process for process in layout if process.kind != "loader"]
    require_processes(layout)
    device, gpu, clock, ledger = model.device, layout[0].gpu, Clock(model.device), Ledger()
    with ExitStack() as started:
        processes = Processes(layout, spec) if len(layout) > 1 else None
        links = {} if processes is None else processes.links
        if processes is not None:
            started.callback(processes.close)
        peer = next((GuidancePeer(links[r.rank], ledger, timeout_s) for r in layout if r.kind == "guidance"), None)
        store = None
        if folders.loras is not None:
            loaders = [RemoteReader(links[process.rank], timeout_s) for process in layout if process.kind == "loader"]
            sources: list[FileSource] = [*loaders] if loaders else [OwnReader(folders.loras)]
            store = LoraStore(cluster.loras, sources, device, gpu, clock, ledger, background=bool(loaders))
        controlnets: ControlNetSource
        served = None
        if cluster.strategies.controlnets == "service":
            replicas = replicas_of(layout, cluster, links)
            if all(replica.fixed for replica in replicas):
                served = frozenset().union(*(replica.names for replica in replicas))
            controlnets = RemoteControlNets(replicas, ledger, timeout_s)
        else:
            places = {name: controlnet_place(name, folders.controlnets) for name in names}
            nets = {name: load_controlnet(place, model, name) for name, place in places.items()}
            controlnets = OwnControlNets(nets, gpu, "denoise", clock, ledger)
        weights = Weights(MergedWeights(model.unet), gpu, clock, ledger, peer)
        parts = Parts(weights, store, controlnets, served, peer, ledger, clock, processes)
        started.pop_all()
    return Serving(hardware, cluster, folders, parts, timeout_s)
