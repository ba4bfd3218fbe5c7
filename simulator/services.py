"""ControlNets: those that a worker's own GPU holds, and services on GPUs of their own that all workers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulator.pieces import Draws
from synerdiff.config.cluster import Service
from synerdiff.core import InputError, SampleId, WorkRecord
from synerdiff.engine.caches import Cache
from synerdiff.profile.adapters import Adapters


class Replica:
    """One service GPU: calls run one at a time, in the order in which they came."""

    def __init__(self, service: Service) -> None:
        self.gpu = service.gpu
        self.fixed = service.slots is None
        self.held = Cache(len(service.controlnets) if service.slots is None else service.slots)
        for name in service.controlnets:
            self.held.put(name)
        self.free_ns = 0
        self.loads = 0

    def serves(self, name: str) -> bool:
        return not self.fixed or name in self.held


class ControlNetServices:
    """All service GPUs. A call goes to the replica that can start its forward first, ties to the first listed.

    Because calls never overtake each other and nothing else runs there, the end of a call is known when it is made.
    """

    def __init__(self, services: Sequence[Service], adapters: Adapters | None, draws: Draws) -> None:
        self.replicas = [Replica(service) for service in services]
        self.adapters = adapters
        self.draws = draws
        self.records: list[WorkRecord] = []

    def require(self, names: Iterable[str]) -> None:
        """InputError when one of these is served nowhere."""
        for name in names:
            if not any(replica.serves(name) for replica in self.replicas):
                known = ", ".join(sorted(set().union(*(replica.held.names for replica in self.replicas)))) or "none"
                raise InputError(
                    f"no ControlNet service serves '{name}', which a request asks for; they serve {known}, and none "
                    "has slots to load others."
                )

    def call(self, name: str, rows: int, samples: tuple[SampleId, ...], now_ns: int) -> int:
        """A call that reaches the services now; the instant at which its residuals leave them."""
        assert self.adapters is not None
        load_ns = 0 if all(replica.fixed for replica in self.replicas) else self._load_ns()
        best: Replica | None = None
        best_ns = 0
        for replica in self.replicas:
            if replica.serves(name):
                start_ns = max(now_ns, replica.free_ns) + (0 if name in replica.held else load_ns)
                if best is None or start_ns < best_ns:
                    best, best_ns = replica, start_ns
        assert best is not None
        if not best.held.use(name):
            best.loads += 1
            best.held.put(name)
            self._record(best, "load", best_ns - load_ns, best_ns, 0, samples)
        end_ns = best.free_ns = best_ns + self.draws.draw(self.adapters.spread_beside("controlnet_forward", rows))
        self._record(best, "controlnet", best_ns, end_ns, rows, samples)
        return end_ns

    def _load_ns(self) -> int:
        assert self.adapters is not None
        return self.adapters.ns("controlnet_load", self.adapters.constant("controlnet_bytes"))

    def _record(
        self, replica: Replica, kind: str, start_ns: int, end_ns: int, rows: int, samples: tuple[SampleId, ...]
    ) -> None:
        self.records.append(WorkRecord.other(replica.gpu, "controlnet", kind, start_ns, end_ns, samples, rows))
