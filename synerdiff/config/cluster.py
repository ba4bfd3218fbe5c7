"""A cluster as a YAML file: workers and their GPUs, ControlNet services, links, LoRA storage and caches, strategies.

The fields are described in ``docs/swiftdiffusion.md``; an unknown field is an error that lists the known ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from synerdiff.core import NS_PER_S, PPM
from synerdiff.files import read_yaml
from synerdiff.profile.folder import is_profile
from synerdiff.profile.tables import Profile
from synerdiff.schema import Also, Listed, Section, sentence, validated

Gpu = Annotated[int, Field(ge=0, le=4095)]
MIB = 1 << 20
_Kind = TypeVar("_Kind", bound="Kind")


class Strategies(Section):
    """How adapters and guidance are served; each choice stands alone."""

    controlnets: Literal["inline", "service"] = "inline"
    loras: Literal["synchronous", "asynchronous"] = "synchronous"
    lora_bound_steps: int = Field(default=20, ge=0, le=10_000)
    """asynchronous: steps that a sample may take before all its LoRAs are merged."""
    guidance: Literal["one-gpu", "two-gpus"] = "one-gpu"


def _a_number(value: Any) -> Any:
    if isinstance(value, bool | float):  # they equal a literal: True is 1, 2.0 is 2
        raise ValueError(f"{value} is no whole number; it must be 1, 2, 4 or 8")
    return value


Degree = Annotated[Literal[1, 2, 4, 8], BeforeValidator(_a_number)]
"""GPUs that take each step of a worker together."""


class Kind(Section):
    """What GPUs of one kind are: whose times they have, and how fast."""

    profile: str | None = Field(default=None, min_length=1)
    """Of a card of its own, by name or folder (relative to the cluster's file); without it, the run's."""
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

    def served(self, base: Profile, others: Mapping[str, Profile], degree: int = 1) -> Profile:
        """Its profile as it has it; ``others``: those that are named, ``base``: the run's."""
        own = base if self.profile is None else others[self.profile]
        return own.on_gpus(degree).on_worker(self.speed_ppm, self.sample_host_ns)


class WorkerEntry(Kind):
    """One worker. Decode lanes on the denoise GPU (the default: one) contend with its steps, others do not."""

    denoise_gpu: Gpu
    degree: Degree = 1
    """GPUs from ``denoise_gpu`` on that take each step together, in the profile's times of that degree."""
    decode_gpus: Listed[Gpu] | None = Field(default=None, min_length=1, max_length=64)
    guidance_gpu: Gpu | None = None
    """two-gpus: where the unconditional half runs."""
    controlnet_slots: int | None = Field(default=None, ge=1, le=10_000)
    """inline: how many ControlNets its GPU holds (least recently used goes); without it, all."""

    @property
    def lanes(self) -> tuple[int, ...]:
        """GPU of each decode lane; without any named, one on the denoiser's."""
        return (self.denoise_gpu,) if self.decode_gpus is None else self.decode_gpus

    @property
    def gpus(self) -> set[int]:
        own = {*range(self.denoise_gpu, self.denoise_gpu + self.degree), *self.lanes}
        return own | ({self.guidance_gpu} if self.guidance_gpu is not None else set())


class EqualWorkers(Kind):
    """So many equal workers, their GPUs one after the other, instead of a list of workers."""

    count: int = Field(ge=1, le=4096)
    degree: Degree = 1
    controlnet_slots: int | None = None


class Pool(Kind):
    """GPUs that do one stage for all workers, one piece of work at a time each."""

    count: int = Field(ge=1, le=4096)


PoolOf = Annotated[
    Pool | None,
    BeforeValidator(lambda given: {"count": given} if type(given) is int else given),
    Also(lambda own: {"type": "integer"}),
]
"""A number alone stands for so many GPUs."""


class Stages(Section):
    """Stages on GPUs of their own; one that is not named stays on the workers, which denoise."""

    encode: PoolOf = None
    decode: PoolOf = None
    latent_bytes: int | None = Field(default=None, ge=0, le=10**12)
    """Of one image at the profile's first resolution; without it, the model's."""
    embedding_bytes: int | None = Field(default=None, ge=0, le=10**12)
    """Of one prompt; without it, the model's."""

    @property
    def pools(self) -> tuple[Pool, ...]:
        """Those that are apart."""
        return tuple(pool for pool in (self.encode, self.decode) if pool is not None)

    @model_validator(mode="after")
    def _is_some(self) -> Stages:
        if not self.pools:
            raise ValueError("name the GPUs of encode, of decode or of both, for example decode: 2")
        return self


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


NamedRouter = Annotated[
    RouterEntry,
    BeforeValidator(lambda given: {"kind": given} if isinstance(given, str) else given),
    Also(lambda own: {"type": "string"}),
]
"""A router's name alone stands for it."""


class Cluster(Section):
    """Workers, services and how they work together."""

    router: NamedRouter = RouterEntry(kind="shortest-queue")

    workers: Listed[WorkerEntry] = Field(min_length=1, max_length=4096)
    strategies: Strategies = Strategies()
    controlnet_services: Listed[Service] = ()
    stages: Stages | None = None
    link: LinkSpeed = LinkSpeed()
    loras: LoraStorage = LoraStorage()

    @model_validator(mode="before")
    @classmethod
    def _equal_workers(cls, data: Any) -> Any:
        """``{count: 4}``, or a list of such, becomes the workers."""
        given = data.get("workers") if isinstance(data, dict) else None
        blocks = given if isinstance(given, list) else [given]
        counted = bool(blocks) and all(isinstance(block, dict) and "count" in block for block in blocks)
        if not counted and not isinstance(given, dict):
            return data
        workers: list[dict[str, Any]] = []
        gpu = 0
        for index, block in enumerate(blocks):
            where = "workers" if block is given else f"workers[{index}]"
            try:
                equal = EqualWorkers.model_validate(block)
            except ValidationError as error:
                raise ValueError(f"{where}: {sentence(error)}") from None
            fields = equal.model_dump(exclude={"count"})
            workers += [{"denoise_gpu": gpu + number * equal.degree, **fields} for number in range(equal.count)]
            gpu += equal.count * equal.degree
        return {**data, "workers": workers}

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
        if self.stages is not None and self.stages.decode is not None:
            for index, worker in enumerate(self.workers):
                if worker.decode_gpus is not None:
                    raise ValueError(f"workers[{index}] has decode_gpus, and stages.decode decodes for all workers")
        return self

    @property
    def gpus(self) -> set[int]:
        """Every GPU that the cluster has, used or not; those of stages come last."""
        own = self._first_gpus
        return own | {gpu for gpus in self.stage_gpus for gpu in gpus}

    @property
    def _first_gpus(self) -> set[int]:
        workers: set[int] = set().union(*(worker.gpus for worker in self.workers))
        return workers | {service.gpu for service in self.controlnet_services}

    @property
    def stage_gpus(self) -> tuple[range, range]:
        """GPUs of encode and of decode, numbered after all others."""
        first = max(self._first_gpus) + 1
        encode, decode = (None, None) if self.stages is None else (self.stages.encode, self.stages.decode)
        middle = first + (0 if encode is None else encode.count)
        return range(first, middle), range(middle, middle + (0 if decode is None else decode.count))

    @property
    def kinds(self) -> Counter[tuple[str | None, float, float | None]]:
        """(profile, speed, host time) -> GPUs that are such; services are not counted."""
        kinds: Counter[tuple[str | None, float, float | None]] = Counter()
        for worker in self.workers:
            kinds[worker.profile, worker.speed, worker.sample_host_s] += worker.degree
        for pool in () if self.stages is None else self.stages.pools:
            kinds[pool.profile, pool.speed, pool.sample_host_s] += pool.count
        return kinds

    @property
    def profiles(self) -> list[str]:
        """Names of the profiles that it names, each once."""
        return sorted({name for name, _, _ in self.kinds if name is not None})


def _take(owner: dict[int, str], gpu: int, place: str) -> None:
    if gpu in owner:
        raise ValueError(f"GPU {gpu} belongs to {owner[gpu]} and to {place}; every GPU has one owner")
    owner[gpu] = place


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file; InputError names the file and the field that is wrong."""
    return cluster_of(read_yaml(path, "cluster file"), str(path), path.parent)


def cluster_of(fields: dict[str, Any], where: str = "cluster", base: Path | None = None) -> Cluster:
    """A cluster from its fields, checked; InputError starts with ``where``. A profile that lies in a folder relative to
    ``base`` is named by its path from here."""
    cluster = validated(Cluster, fields, where)
    if base is None or not any(is_profile(base / name) for name in cluster.profiles):
        return cluster

    def placed(kind: _Kind) -> _Kind:
        near = kind.profile is not None and is_profile(base / kind.profile)
        return kind.model_copy(update={"profile": str(base / (kind.profile or ""))}) if near else kind

    stages = cluster.stages
    if stages is not None:
        pools = {name: pool and placed(pool) for name, pool in (("encode", stages.encode), ("decode", stages.decode))}
        stages = stages.model_copy(update=pools)
    workers = tuple(placed(worker) for worker in cluster.workers)
    return cluster.model_copy(update={"workers": workers, "stages": stages})
