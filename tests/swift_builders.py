"""Clusters and adapter tables for tests, in round nanoseconds."""

from __future__ import annotations

from typing import Any

from simulator import ClusterResult, simulate_cluster
from synerdiff.config.cluster import MIB, Cluster, cluster_of
from synerdiff.core import Request
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile
from tests.builders import exact, make_profile

LORA = 400 * MIB
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)


def toy_profile(**more: Any) -> Profile:
    """T(1) = 60, T(R) = 50 R otherwise; a decode takes 40; nothing contends."""
    return make_profile({rows: 60 if rows == 1 else 50 * rows for rows in ROWS}, {"whole": [40]}, **more)


def toy_adapters(**changed: Any) -> Adapters:
    """Read 200, copy 50, merge 20, restore 7; ControlNet forward 15 a row; encoder 20 and decoder 30 a row.

    The link moves a byte a nanosecond after 5: latents 10 bytes a row, residuals 15, predictions 8.
    """
    tables = {
        "lora_read": {LORA: 200},
        "lora_copy": {LORA: 50},
        "lora_merge": {LORA: 20},
        "lora_restore": {LORA: 7},
        "controlnet_load": {1000: 500},
        "controlnet_bytes": {0: 1000},
        "controlnet_forward": {1: 15, 16: 240},
        "denoise_encoder": {rows: 20 * rows for rows in ROWS},
        "denoise_decoder": {rows: 30 * rows for rows in ROWS},
        "latent_bytes": {1: 10},
        "residual_bytes": {1: 15},
        "prediction_bytes": {1: 8},
        "link_bytes_per_s": {0: 1_000_000_000},
        "link_latency": {0: 5},
        **changed,
    }
    return Adapters("test", {name: {at: exact(value) for at, value in table.items()} for name, table in tables.items()})


def cluster(workers: int = 1, services: Any = (), storage: Any = None, **strategies: Any) -> Any:
    """GPU 0 is the first worker's; the halves' second GPUs and the services count from 100 and 200."""
    return cluster_of(
        {
            "workers": [{"denoise_gpu": w, "guidance_gpu": 100 + w} for w in range(workers)]
            if strategies.get("guidance") == "two-gpus"
            else [{"denoise_gpu": w} for w in range(workers)],
            "controlnet_services": [{"gpu": 200 + i, **service} for i, service in enumerate(services)],
            "strategies": strategies,
            "loras": storage or {},
        }
    )


def serve(requests: list[Request], described: Cluster, policy: Any, **more: Any) -> ClusterResult:
    """Run on the toy profile; ``policy`` is a name or a factory."""
    from policies.registry import build_policy

    factory = (lambda: build_policy(policy, {"batch": 1})) if isinstance(policy, str) else policy
    arguments = {"profile": toy_profile(), "adapters": toy_adapters(), **more}
    profile = arguments.pop("profile")
    return simulate_cluster(requests, factory, profile, described, **arguments)


def spans(result: ClusterResult, *lanes: str) -> list[tuple[int, str, str, int, int]]:
    """(gpu, lane, kind, start, end) of the records on these lanes, or on all."""
    return [(w.gpu, w.lane, w.kind, w.start_ns, w.end_ns) for w in result.run.work if not lanes or w.lane in lanes]
