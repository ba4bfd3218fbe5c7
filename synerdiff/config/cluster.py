"""A cluster as a YAML file: workers and their GPUs, ControlNet services, links, LoRA storage and caches, strategies.

The fields are described in ``docs/swiftdiffusion.md``; an unknown field is an error that lists the known ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from synerdiff.core import NS_PER_S, PPM
from synerdiff.files import read_yaml
from synerdiff.profile.tables import Profile
from synerdiff.schema import Listed, Section, sentence, validated

Gpu = Annotated[int, Field(ge=0, le=4095)]
MIB = 1 << 20


class Strategies(Section):
    """How adapters and guidance are served; each choice stands alone."""

    controlnets: Literal["inline", "service"] = "inline"
    loras: Literal["synchronous", "asynchronous"] = "synchronous"
    lora_bound_steps: int = Field(default=20, ge=0, le=10_000)
    """asynchronous: steps that a sample may take before all its LoRAs are merged."""
    guidance: Literal["one-gpu", "two-gpus"] = "one-gpu"


class WorkerEntry(Section):
    """One worker. Decode lanes on the denoise GPU (the default: one) contend with its steps, others do not."""

    denoise_gpu: Gpu
    decode_gpus: Listed[Gpu] | None = Field(default=None, min_length=1, max_length=64)
    guidance_gpu: Gpu | None = None
    """two-gpus: where the unconditional half runs."""
    controlnet_slots: int | None = Field(default=None, ge=1, le=10_000)
    """inline: how many ControlNets its GPU holds (least recently used goes); without it, all."""
    speed: float = Field(default=1.0, ge=0.001, le=1000)
    """Divides the times of steps, chunks, ControlNets and merges."""
    sample_host_s: float | None = Field(default=None, ge=0, le=3600)
    """Host time after each sample, in which its lanes start nothing; without it, the profile's overhead sample_host."""

    @property
    def speed_ppm(self) -> int:
        """Its speed in parts per million of the profile's."""
        return round(self.speed * PPM)

    @property
    def sample_host_ns(self) -> int | None:
        """Host time per sample; None: the profile's."""
        return None if self.sample_host_s is None else round(self.sample_host_s * NS_PER_S)

    def profile(self, base: Profile) -> Profile:
        """The profile as this worker has it."""
        return base.on_worker(self.speed_ppm, self.sample_host_ns)

    @property
    def lanes(self) -> tuple[int, ...]:
        """GPU of each decode lane; without any named, one on the denoiser's."""
        return (self.denoise_gpu,) if self.decode_gpus is None else self.decode_gpus

    @property
    def gpus(self) -> set[int]:
        return {self.denoise_gpu, *self.lanes} | ({self.guidance_gpu} if self.guidance_gpu is not None else set())


class EqualWorkers(Section):
    """So many equal workers of one GPU each, GPUs from 0, instead of a list of workers."""

    count: int = Field(ge=1, le=4096)
    speed: float = 1.0
    sample_host_s: float | None = None
    controlnet_slots: int | None = None


class Service(Section):
    """One GPU that runs ControlNets for all workers, one call at a time."""

    gpu: Gpu
    controlnets: Listed[Annotated[str, Field(min_length=1, max_length=300)]] = ()
    """Those that it holds at the start; without ``slots`` these and no others."""
    slots: int | None = Field(default=None, ge=1, le=10_000)
    """How many it holds at once: it then loads any other that is asked of it, in place of the least recently used."""

    @model_validator(mode="after")
    def _fits(self) -> Service:
        if self.slots is None and not self.controlnets:
            raise ValueError("name the controlnets that it holds, or give slots")
        for name in self.controlnets:
            if self.controlnets.count(name) > 1:
                raise ValueError(f"the ControlNet '{name}' is named twice")
        if self.slots is not None and len(self.controlnets) > self.slots:
            raise ValueError(f"{len(self.controlnets)} controlnets do not fit {self.slots} slots")
        return self


class LinkSpeed(Section):
    """Between GPUs; what is left out is taken from the profile's adapters.csv."""

    gb_per_s: float | None = Field(default=None, ge=1e-6, le=1e6)
    latency_us: float | None = Field(default=None, ge=0, le=1e6)


class LoraStorage(Section):
    """LoRA files, their way to a worker, and what each worker keeps of them."""

    mib: float = Field(default=400, ge=1e-6, le=1e6)
    """Size of a LoRA that sizes_mib does not name."""
    sizes_mib: dict[str, Annotated[float, Field(ge=1e-6, le=1e6)]] = {}
    loaders: int = Field(default=1, ge=1, le=64)
    """Files that one worker reads at a time."""
    storage_gb_per_s: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Of each loader; without it, lora_read of the profile."""
    host_cache_mib: float = Field(default=0, ge=0, le=1e9)
    device_cache_mib: float = Field(default=0, ge=0, le=1e9)
    cache: Literal["lru", "lfu"] = "lru"

    def bytes_of(self, name: str) -> int:
        return round(self.sizes_mib.get(name, self.mib) * MIB)


class RouterEntry(Section):
    """Which worker serves a request: a router, or the shared queue and how workers take from it."""

    kind: str
    batch: int | None = Field(default=None, ge=1, le=4096)
    """shared-queue: images of a group."""
    max_wait_s: float | None = Field(default=None, ge=0, le=3600)
    """shared-queue: longest wait of a group's oldest request for a full one."""
    slots: int | None = Field(default=None, ge=1, le=4096)
    """shared-queue, instead of groups: a worker that holds fewer samples takes the oldest request."""
    slack: int | None = Field(default=None, ge=0, le=10**6)
    """adapter-affinity: how many samples a worker may have above the shortest queue."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Those that are given."""
        return self.model_dump(exclude={"kind"}, exclude_none=True)


def named_router(given: Any) -> Any:
    """A router's name alone stands for it."""
    return {"kind": given} if isinstance(given, str) else given


class Cluster(Section):
    """Workers, services and how they work together."""

    router: Annotated[RouterEntry, BeforeValidator(named_router)] = RouterEntry(kind="shortest-queue")

    workers: Listed[WorkerEntry] = Field(min_length=1, max_length=4096)
    strategies: Strategies = Strategies()
    controlnet_services: Listed[Service] = ()
    link: LinkSpeed = LinkSpeed()
    loras: LoraStorage = LoraStorage()

    @model_validator(mode="before")
    @classmethod
    def _equal_workers(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("workers"), dict):
            return data
        try:
            equal = EqualWorkers.model_validate(data["workers"])
        except ValidationError as error:
            raise ValueError(f"workers: {sentence(error)}") from None
        fields = equal.model_dump(exclude={"count"})
        return {**data, "workers": [{"denoise_gpu": gpu, **fields} for gpu in range(equal.count)]}

    @model_validator(mode="after")
    def _gpus_are_their_own(self) -> Cluster:
        owner: dict[int, str] = {}
        for index, worker in enumerate(self.workers):
            if self.strategies.guidance == "two-gpus" and worker.guidance_gpu is None:
                raise ValueError(f"workers[{index}] has no guidance_gpu, which guidance on two GPUs needs")
            if worker.guidance_gpu == worker.denoise_gpu:
                raise ValueError(f"workers[{index}]: guidance_gpu and denoise_gpu are both {worker.denoise_gpu}")
            for gpu in sorted(worker.gpus):
                _take(owner, gpu, f"workers[{index}]")
        for index, service in enumerate(self.controlnet_services):
            _take(owner, service.gpu, f"controlnet_services[{index}]")
        if self.strategies.controlnets == "service" and not self.controlnet_services:
            raise ValueError("controlnets are a service, and controlnet_services is empty")
        return self

    @property
    def gpus(self) -> set[int]:
        """Every GPU that the cluster has, used or not."""
        workers: set[int] = set().union(*(worker.gpus for worker in self.workers))
        return workers | {service.gpu for service in self.controlnet_services}


def _take(owner: dict[int, str], gpu: int, place: str) -> None:
    if gpu in owner:
        raise ValueError(f"GPU {gpu} belongs to {owner[gpu]} and to {place}; every GPU has one owner")
    owner[gpu] = place


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file; InputError names the file and the field that is wrong."""
    return cluster_of(read_yaml(path, "cluster file"), str(path))


def cluster_of(fields: dict[str, Any], where: str = "cluster") -> Cluster:
    """A cluster from its fields, checked; InputError starts with ``where``."""
    return validated(Cluster, fields, where)
