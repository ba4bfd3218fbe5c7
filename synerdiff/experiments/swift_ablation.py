"""What each strategy is worth to one request alone: latency and GPU-seconds, by published component times."""

from __future__ import annotations

from dataclasses import dataclass

from synerdiff.config.cluster import cluster_of
from synerdiff.core import NS_PER_S, Request
from synerdiff.experiments.swift_layouts import BOUND_STEPS, STRATEGIES
from synerdiff.experiments.swift_profiles import LORA_MIB, h800_adapters, h800_profile

STEPS = 50
NAMES = {"service": "ControlNet service", "asynchronous": "asynchronous LoRAs", "two-gpus": "guidance on two GPUs"}


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
    from policies.registry import build_policy
    from simulator import simulate_cluster

    two = "two-gpus" in strategies
    asynchronous = "asynchronous" in strategies
    service = "service" in strategies and controlnets > 0
    names = [f"controlnet{number}" for number in range(controlnets)]
    hosted = [name for name in names for _ in range(2 if two else 1)] if service else []
    cluster = cluster_of(
        {
            "workers": [{"denoise_gpu": 0, **({"guidance_gpu": 1} if two else {})}],
            "controlnet_services": [{"gpu": 2 + n, "controlnets": [name]} for n, name in enumerate(hosted)],
            "strategies": {
                "controlnets": "service" if service else "inline",
                "loras": "asynchronous" if asynchronous else "synchronous",
                "lora_bound_steps": BOUND_STEPS,
                "guidance": "two-gpus" if two else "one-gpu",
            },
            "loras": {"mib": LORA_MIB[1], "loaders": 2 if asynchronous else 1},
        }
    )
    request = Request(0, 0, STEPS, loras=tuple(f"lora{n}" for n in range(loras)), controlnets=tuple(names))
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
