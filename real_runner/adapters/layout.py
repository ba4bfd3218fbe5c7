"""Which processes a cluster file with one worker asks for, and who talks to whom.

Rank 0 is the worker; then come the guidance peer, the ControlNet services and the LoRA loaders, as far as the
strategies need them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from synerdiff.config.cluster import Cluster
from synerdiff.core import InputError


@dataclass(frozen=True, slots=True)
class Role:
    """One process. ``gpu``: as the cluster numbers them, on a CPU only a name; -1 for a loader, which needs none."""

    rank: int
    kind: Literal["worker", "guidance", "controlnet", "loader"]
    gpu: int
    index: int = 0

    @property
    def name(self) -> str:
        """As messages call it."""
        if self.kind == "loader":
            return f"LoRA loader {self.index}"
        what = {"worker": "the worker", "guidance": "the guidance peer", "controlnet": "the ControlNet service"}
        return f"{what[self.kind]} on GPU {self.gpu}"


def roles_of(cluster: Cluster) -> list[Role]:
    """All processes by rank. Raises InputError for what cannot be run on hardware."""
    if len(cluster.workers) != 1:
        raise InputError(f"the cluster has {len(cluster.workers)} workers; a run on hardware has one.")
    worker, strategies = cluster.workers[0], cluster.strategies
    if set(worker.lanes) != {worker.denoise_gpu}:
        raise InputError("workers[0]: on hardware every decode lane is on the denoise GPU.")
    if cluster.link.gb_per_s is not None or cluster.link.latency_us is not None:
        raise InputError("link: a run on hardware has the links that it has; leave this out.")
    if cluster.loras.storage_gb_per_s is not None:
        raise InputError("loras.storage_gb_per_s: a run on hardware has the storage that it has; leave this out.")
    if worker.controlnet_slots is not None:
        raise InputError("workers[0].controlnet_slots: on hardware a worker holds all ControlNets of its trace.")
    if any(cluster.loras.sizes_mib):
        raise InputError("loras.sizes_mib: on hardware files have the sizes that they have; leave this out.")
    kinds: list[tuple[Literal["worker", "guidance", "controlnet", "loader"], int, int]] = [
        ("worker", worker.denoise_gpu, 0)
    ]
    if strategies.guidance == "two-gpus":
        assert worker.guidance_gpu is not None
        kinds.append(("guidance", worker.guidance_gpu, 0))
    if strategies.controlnets == "service":
        kinds += [("controlnet", service.gpu, index) for index, service in enumerate(cluster.controlnet_services)]
    if strategies.loras == "asynchronous":
        kinds += [("loader", -1, index) for index in range(cluster.loras.loaders)]
    return [Role(rank, kind, gpu, index) for rank, (kind, gpu, index) in enumerate(kinds)]


def links_of(roles: list[Role]) -> list[tuple[int, int]]:
    """Pairs of ranks that talk to each other, in the order in which every process opens its own."""
    talks = {("worker", "guidance"), ("worker", "controlnet"), ("worker", "loader"), ("guidance", "controlnet")}
    return [(a.rank, b.rank) for a, b in combinations(roles, 2) if (a.kind, b.kind) in talks]


def core_of(rank: int) -> int | None:
    """The core for a process on a CPU: the first is the denoise lane's, the others are shared in turn."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    others = cores[1:] or cores
    return others[(rank - 1) % len(others)]
