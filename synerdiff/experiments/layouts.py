"""How so many GPUs are divided between workers and ControlNet services under each set of strategies, and what each
strategy is worth to one request alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.registry import build_policy
from simulator import simulate_cluster
from synerdiff.config.cluster import MIB, Cluster, cluster_of
from synerdiff.core import NS_PER_S, ControlNetUse, InputError, LoraUse, Request
from synerdiff.experiments.adapter_mix import MIXES
from synerdiff.experiments.h800 import LORA_MIB, h800_adapters, h800_profile
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile

STRATEGIES = ("service", "asynchronous", "two-gpus")
CONTROLNETS = tuple(f"controlnet{rank}" for rank in range(1, 17))
"""Those that a service of Katz's production trace asks for."""
BOUND_STEPS = 20
STEPS = 50
NAMES = {"service": "ControlNet service", "asynchronous": "asynchronous LoRAs", "two-gpus": "guidance on two GPUs"}


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for on average. All requests ask for ControlNets, a share of them for LoRAs."""

    steps: int
    controlnets: float
    loras: float
    """Of a request that asks for any."""
    lora_share: float

    @classmethod
    def of(cls, service: str, steps: int, lora_share: float) -> Demand:
        """What requests of that service's mix ask for."""
        controlnets, loras = MIXES[service, "controlnet"], MIXES[service, "lora"]
        return cls(steps, controlnets.per_request, loras.per_request, lora_share)


def worker_image_s(
    strategies: tuple[str, ...], demand: Demand, profile: Profile, adapters: Adapters, size: int
) -> float:
    """Time that an image holds a worker, LoRAs of ``size`` bytes never cached and taken out after each image.

    steps * (T(rows) + dispatch + inline ControlNets) + decode + LoRAs * (merge + restore, and synchronous: read and
    copy). Waits for services are left out.
    """
    rows = 1 if "two-gpus" in strategies else 2
    step_ns = float(profile.step_ns(rows) + profile.overhead_ns("step_dispatch"))
    if "service" not in strategies:
        step_ns += demand.controlnets * (adapters.ns("controlnet_forward", rows) + adapters.ns("residual_add", rows))
    names = ("lora_merge", "lora_restore") if "asynchronous" in strategies else (
        "lora_read", "lora_copy", "lora_merge", "lora_restore"
    )  # fmt: skip
    lora_ns = demand.lora_share * demand.loras * sum(adapters.ns(name, size) for name in names)
    return (demand.steps * step_ns + profile.decode_ns() + lora_ns) / NS_PER_S


def service_image_s(strategies: tuple[str, ...], demand: Demand, adapters: Adapters) -> float:
    """Time that an image holds services: steps * ControlNets * forward, two calls of a row each or one of two rows."""
    calls = 2 if "two-gpus" in strategies else 1
    return demand.steps * demand.controlnets * calls * adapters.ns("controlnet_forward", 2 // calls) / NS_PER_S


def divide(gpus: int, strategies: tuple[str, ...], worker_s: float, service_s: float) -> tuple[int, int]:
    """(workers, service GPUs) that sustain most: the S with the largest min(W / worker_s, S / service_s), fewest S."""
    each = 2 if "two-gpus" in strategies else 1
    if "service" not in strategies:
        if gpus < each:
            raise InputError(f"guidance on two GPUs needs at least 2; {gpus} were given.")
        return gpus // each, 0
    if gpus < each + 1:
        raise InputError(f"a ControlNet service beside a worker of {each} GPUs needs {each + 1}; {gpus} were given.")
    rates = {s: min((gpus - s) // each / worker_s, s / service_s) for s in range(1, gpus - each + 1)}
    services = max(rates, key=lambda s: (rates[s], -s))
    return (gpus - services) // each, services


def layout(
    gpus: int,
    strategies: tuple[str, ...],
    demand: Demand,
    profile: Profile,
    adapters: Adapters,
    lora_mib: float,
    host_cache_mib: float,
    controlnets: tuple[str, ...],
) -> Cluster:
    """A cluster of at most so many GPUs; services hold every ControlNet, workers' own GPUs too."""
    worker_s = worker_image_s(strategies, demand, profile, adapters, round(lora_mib * MIB))
    workers, services = divide(gpus, strategies, worker_s, service_image_s(strategies, demand, adapters))
    hosts = [(gpus - 1 - service, controlnets) for service in range(services)]
    return _cluster(workers, hosts, strategies, {"mib": lora_mib, "loaders": 2, "host_cache_mib": host_cache_mib})


def _cluster(
    workers: int, services: Sequence[tuple[int, Sequence[str]]], strategies: tuple[str, ...], loras: Mapping[str, Any]
) -> Cluster:
    """``services``: (GPU, the ControlNets that it holds)."""
    two = "two-gpus" in strategies
    return cluster_of(
        {
            "workers": [
                {"denoise_gpu": 2 * w, "guidance_gpu": 2 * w + 1} if two else {"denoise_gpu": w} for w in range(workers)
            ],
            "controlnet_services": [{"gpu": gpu, "controlnets": list(names)} for gpu, names in services],
            "strategies": {
                "controlnets": "service" if services else "inline",
                "loras": "asynchronous" if "asynchronous" in strategies else "synchronous",
                "lora_bound_steps": BOUND_STEPS,
                "guidance": "two-gpus" if two else "one-gpu",
            },
            "loras": loras,
        }
    )


@dataclass(frozen=True, slots=True)
class Ablation:
    """One request alone on a cluster made for it: a service GPU per ControlNet (two with guidance on two GPUs)."""

    name: str
    system: str
    strategies: tuple[str, ...]
    gpus: int
    latency_s: float

    @property
    def gpu_seconds(self) -> float:
        """GPUs that are held * latency."""
        return self.gpus * self.latency_s


def solo(name: str, system: str, strategies: tuple[str, ...], controlnets: int, loras: int) -> Ablation:
    """Simulate one guided request of 50 steps."""
    names = [f"controlnet{number}" for number in range(controlnets)]
    replicas = 0 if "service" not in strategies else 2 if "two-gpus" in strategies else 1
    hosts = [(2 + number, [name]) for number, name in enumerate(name for name in names for _ in range(replicas))]
    loaders = 2 if "asynchronous" in strategies else 1
    cluster = _cluster(1, hosts, strategies, {"mib": LORA_MIB[1], "loaders": loaders})
    uses = tuple(LoraUse(f"lora{n}") for n in range(loras))
    request = Request(0, 0, STEPS, loras=uses, controlnets=tuple(map(ControlNetUse, names)))
    result = simulate_cluster(
        [request],
        lambda: build_policy("continuous-serial", {"batch": 1}),
        h800_profile(system),
        cluster,
        adapters=h800_adapters(system),
    )
    return Ablation(name, system, strategies, result.gpus, result.run.requests[0].finished_ns / NS_PER_S)


def ablation(controlnets: int = 3, loras: int = 2) -> list[Ablation]:
    """diffusers; the compiled denoiser without strategies, with each alone, with all but each, with all."""
    cases = [
        ("diffusers", "diffusers", ()),
        ("compiled denoiser, direct merge", "katz", ()),
        *[(f"+ {NAMES[strategy]}", "katz", (strategy,)) for strategy in STRATEGIES],
        *[
            (f"all but {NAMES[strategy]}", "katz", tuple(s for s in STRATEGIES if s != strategy))
            for strategy in STRATEGIES
        ],
        ("all three", "katz", STRATEGIES),
    ]
    return [solo(name, system, strategies, controlnets, loras) for name, system, strategies in cases]
