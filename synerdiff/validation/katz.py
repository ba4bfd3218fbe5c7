"""Katz against diffusers on an H800: end-to-end latency predicted from published component times alone.

Each prediction is a simulated run of one request on a cluster like the one that the authors used, so that overlap,
waiting and queueing come out of the engine and not of a formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from synerdiff.config.cluster import Cluster, cluster_of
from synerdiff.core import NS_PER_S, ControlNetUse, InputError, LoraUse, Request
from synerdiff.experiments.h800 import LORA_MIB, SYSTEMS, h800_adapters, h800_profile
from synerdiff.files import read_rows

STEPS = 50
FILE = "katz_h800_sdxl.csv"


def published_cluster(system: str, n_controlnets: int) -> Cluster:
    """The GPUs that the authors gave one request.

    diffusers: one. katz: two for the halves of the guidance, and two service GPUs for each ControlNet, one per half.
    """
    loras = {"mib": LORA_MIB[1]}
    if system == "diffusers":
        return cluster_of({"workers": [{"denoise_gpu": 0}], "loras": loras})
    if system != "katz":
        raise InputError(f"there is no system '{system}'; known are {', '.join(SYSTEMS)}.")
    services = [
        {"gpu": 2 + 2 * number + half, "controlnets": [f"controlnet{number}"]}
        for number in range(n_controlnets)
        for half in (0, 1)
    ]
    strategies = {"loras": "asynchronous", "lora_bound_steps": 20, "guidance": "two-gpus"}
    if n_controlnets:
        strategies["controlnets"] = "service"
    return cluster_of(
        {
            "workers": [{"denoise_gpu": 0, "guidance_gpu": 1}],
            "controlnet_services": services,
            "strategies": strategies,
            "loras": {**loras, "loaders": 2},
        }
    )


@lru_cache
def predict(system: str, n_controlnets: int, n_loras: int) -> float:
    """Seconds from a request's arrival to its image: one request alone, one image, 50 guided steps.

    ``system`` is ``diffusers`` or ``katz``; each ControlNet and LoRA is a different one.
    """
    from policies.registry import build_policy
    from simulator import simulate_cluster

    for name, count in (("n_controlnets", n_controlnets), ("n_loras", n_loras)):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 64:
            raise InputError(f"{name} is {count!r}; a whole number from 0 to 64 is needed.")
    cluster = published_cluster(system, n_controlnets)
    request = Request(
        0,
        0,
        STEPS,
        loras=tuple(LoraUse(f"lora{number}") for number in range(n_loras)),
        controlnets=tuple(ControlNetUse(f"controlnet{number}") for number in range(n_controlnets)),
    )
    result = simulate_cluster(
        [request],
        lambda: build_policy("continuous-serial", {"batch": 1}),
        h800_profile(system),
        cluster,
        adapters=h800_adapters(system),
    )
    return result.run.requests[0].finished_ns / NS_PER_S


@dataclass(frozen=True, slots=True)
class Comparison:
    """One published combination: seconds, medians over the logged requests."""

    system: str
    n_controlnets: int
    n_loras: int
    gpus: int
    published_s: float
    published_mean_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """(predicted - published) / published, of the median."""
        return self.predicted_s / self.published_s - 1


def compare(data_folder: Path) -> list[Comparison]:
    """Every published combination of diffusers and katz beside its prediction; InputError without the file."""
    rows = read_rows(
        data_folder / FILE,
        ("system", "n_controlnet", "n_lora", "n_gpus", "e2e_p50_s", "e2e_mean_s"),
        "table of published latencies",
    )
    comparisons = []
    for row in rows:
        system = row.name("system")
        if system not in SYSTEMS:
            continue
        controlnets, loras = row.integer("n_controlnet", 0, 64), row.integer("n_lora", 0, 64)
        comparisons.append(
            Comparison(
                system,
                controlnets,
                loras,
                row.integer("n_gpus", 1, 1000),
                row.number("e2e_p50_s", 1e-6, 1e6),
                row.number("e2e_mean_s", 1e-6, 1e6),
                predict(system, controlnets, loras),
            )
        )
    if not comparisons:
        raise InputError(f"{data_folder / FILE}: it has no row of {' or '.join(SYSTEMS)}.")
    return comparisons
