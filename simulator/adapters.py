"""What adapters come through: a worker's loader lanes for LoRA files, and the GPUs of shared ControlNet services."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulator.pieces import Draws
from synerdiff.config.cluster import LinkSpeed, LoraStorage, Service
from synerdiff.core import NS_PER_S, InputError, LoraUse, SampleId, WorkRecord
from synerdiff.engine.adapters import Cache
from synerdiff.profile.adapters import Adapters


class Loader:
    """Loads files in the order in which they are asked for, each on the loader lane that is free first.

    A file stays while a sample needs it, whatever the caches do. Files on the GPU when nobody needs them are those in
    the device cache; a file in the host cache is copied and not read.
    """

    def __init__(self, storage: LoraStorage, adapters: Adapters, draws: Draws, gpu: int) -> None:
        self.storage = storage
        self.adapters = adapters
        self.draws = draws
        self.gpu = gpu
        self.host = Cache(round(storage.host_cache_mib * (1 << 20)), storage.cache)
        self.device = Cache(round(storage.device_cache_mib * (1 << 20)), storage.cache)
        self.lanes_free_ns = [0] * storage.loaders
        self.ready_ns: dict[str, int] = {}
        """File -> when it is (or was) on the GPU, for files that some sample needs."""
        self.users: dict[str, int] = {}
        self.requested = 0
        """How often a sample has asked for a LoRA."""
        self.reads = 0
        """How often that meant reading the file from storage."""
        self.copies = 0
        """How often it meant copying it to the GPU."""
        self.records: list[WorkRecord] = []

    def need(self, loras: tuple[LoraUse, ...], now_ns: int, present: set[str]) -> None:
        """A sample needs these from now on; files in ``present`` are in the weights already."""
        for file, _ in loras:
            self.requested += 1
            self.users[file] = self.users.get(file, 0) + 1
            if file in self.ready_ns:
                self.device.use(file)
                self.host.use(file)
            elif file in present:
                self.ready_ns[file] = now_ns

    def ready(self, file: str, now_ns: int) -> bool:
        """Whether a needed file is on the GPU."""
        return self.ready_ns.get(file, now_ns + 1) <= now_ns

    def fetch(self, file: str, sample: SampleId, now_ns: int) -> int:
        """Start to load a needed file unless that has been done; the instant at which it is on the GPU."""
        ready_ns = self.ready_ns.get(file)
        if ready_ns is None:
            ready_ns = now_ns if self.device.use(file) else self._load(file, sample, now_ns)
            self.ready_ns[file] = ready_ns
        return ready_ns

    def release(self, loras: tuple[LoraUse, ...]) -> None:
        """A sample needs these no more."""
        for file, _ in loras:
            self.users[file] -= 1
            if not self.users[file]:
                del self.users[file]
                self.ready_ns.pop(file, None)

    @property
    def known(self) -> set[str]:
        """Files that are on the GPU, coming, or in the host cache."""
        return {*self.ready_ns, *self.device.names, *self.host.names}

    def _load(self, file: str, sample: SampleId, now_ns: int) -> int:
        size = self.storage.bytes_of(file)
        work_ns = self.draws.draw(self.adapters.spread("lora_copy", size))
        self.copies += 1
        if not self.host.use(file):
            self.reads += 1
            work_ns += self._read_ns(size)
            self.host.put(file, size)
        self.device.put(file, size)
        lane = self.lanes_free_ns.index(min(self.lanes_free_ns))
        start_ns = max(now_ns, self.lanes_free_ns[lane])
        end_ns = self.lanes_free_ns[lane] = start_ns + work_ns
        name = "loader" if len(self.lanes_free_ns) == 1 else f"loader{lane}"
        self.records.append(WorkRecord.other(self.gpu, name, "load", start_ns, end_ns, (sample,)))
        return end_ns

    def _read_ns(self, size: int) -> int:
        if self.storage.storage_gb_per_s is not None:
            return round(size / self.storage.storage_gb_per_s)  # 1 GB/s is one byte a nanosecond
        return self.draws.draw(self.adapters.spread("lora_read", size))


def link_of(link: LinkSpeed, adapters: Adapters | None) -> tuple[int, int]:
    """(bytes a second, latency in ns) between two GPUs: as given, else the profile's; without one the latency is 0."""
    latency_ns = 0 if adapters is None else adapters.constant("link_latency")
    if link.latency_us is not None:
        latency_ns = round(link.latency_us * 1000)
    if link.gb_per_s is not None:
        return round(link.gb_per_s * NS_PER_S), latency_ns
    assert adapters is not None
    return adapters.constant("link_bytes_per_s"), latency_ns


def transfer_ns(size: int, bytes_per_s: int, latency_ns: int) -> int:
    """latency + size / bandwidth, rounded up."""
    return latency_ns - (-size * NS_PER_S // bytes_per_s)


class ServiceGpu:
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
        """Whether it may be asked for that ControlNet."""
        return not self.fixed or name in self.held


class ControlNetServices:
    """All service GPUs. A call goes to the replica that can start its forward first, ties to the first listed.

    Because calls never overtake each other and nothing else runs there, the end of a call is known when it is made.
    """

    def __init__(self, services: Sequence[Service], adapters: Adapters | None, draws: Draws) -> None:
        self.replicas = [ServiceGpu(service) for service in services]
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
        best: ServiceGpu | None = None
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
        self, replica: ServiceGpu, kind: str, start_ns: int, end_ns: int, rows: int, samples: tuple[SampleId, ...]
    ) -> None:
        self.records.append(WorkRecord.other(replica.gpu, "controlnet", kind, start_ns, end_ns, samples, rows))
