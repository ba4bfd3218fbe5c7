"""How so many GPUs are divided between workers and ControlNet services under each set of strategies."""

from __future__ import annotations

from dataclasses import dataclass

from synerdiff.config.cluster import MIB, Cluster, cluster_of
from synerdiff.core import NS_PER_S, InputError
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile

STRATEGIES = ("service", "asynchronous", "two-gpus")
SETS: dict[str, tuple[str, ...]] = {
    "inline, synchronous": (),
    "ControlNet service": ("service",),
    "asynchronous LoRAs": ("asynchronous",),
    "guidance on two GPUs": ("two-gpus",),
    "service and asynchronous": ("service", "asynchronous"),
    "all three": STRATEGIES,
}
"""Name -> strategies; the first is the baseline."""
BASELINE = "inline, synchronous"
BOUND_STEPS = 20


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for on average. All requests ask for ControlNets, a share of them for LoRAs."""

    steps: int
    controlnets: float
    loras: float
    """Of a request that asks for any."""
    lora_share: float


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
    two = "two-gpus" in strategies
    return cluster_of(
        {
            "workers": [
                {"denoise_gpu": 2 * w, "guidance_gpu": 2 * w + 1} if two else {"denoise_gpu": w} for w in range(workers)
            ],
            "controlnet_services": [
                {"gpu": gpus - 1 - service, "controlnets": list(controlnets)} for service in range(services)
            ],
            "strategies": {
                "controlnets": "service" if services else "inline",
                "loras": "asynchronous" if "asynchronous" in strategies else "synchronous",
                "lora_bound_steps": BOUND_STEPS,
                "guidance": "two-gpus" if two else "one-gpu",
            },
            "loras": {"mib": lora_mib, "loaders": 2, "host_cache_mib": host_cache_mib},
        }
    )
