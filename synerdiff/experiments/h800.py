"""Estimated profiles of SDXL on an H800, built from the component times that Katz's authors published.

Nothing here was measured by this project, and nothing was fitted to an end-to-end latency. Every number stands in
``COMPONENTS`` with its source; ``docs/swiftdiffusion.md`` shows the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Corun, Head, Profile, Spread

MS = 1_000_000
MIB = 1 << 20
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
SYSTEMS = ("diffusers", "katz")
LORA_MIB = (325, 380, 435)
"""Published sizes of LoRA files, smallest, middle and largest."""
CONTROLNET_BYTES = 2386 * MIB
_LOGS = "modelscope/Katz, published logs on H800"
_PAPER = "Katz's publication, as summarised by this project"
_OURS = "our estimate, not published"


@dataclass(frozen=True, slots=True)
class Component:
    """A published component time or size, with its unit and where it was published."""

    value: float
    unit: str
    source: str


_SHARED: dict[str, Component] = {
    "gflop_per_row": Component(6761, "GFLOP", "SDXL denoiser at 1024x1024, counted on its public configuration"),
    "controlnet_gflop_per_row": Component(3020, "GFLOP", "SDXL ControlNet, counted on its public configuration"),
    "tflops_of_more_rows": Component(400, "TFLOP/s", f"speed at which further rows run; {_OURS}"),
    "encoder_mid_share": Component(0.44, "of a step", "FLOPs of encoder and mid block: 44 of 101%"),
    "lora_read": Component(480, "ms for 380 MiB", f"file read of one LoRA; {_PAPER}"),
    "lora_copy": Component(16, "ms for 380 MiB", f"25 GB/s to the GPU; {_OURS}"),
    "controlnet_load": Component(3884, "ms", "median of GenTD26's ControlNet loads"),
    "residual_bytes": Component(53_700_000, "bytes a row", "9 down residuals and 1 mid of SDXL in 16 bit"),
    "latent_bytes": Component(131_080, "bytes a row", "4 x 128 x 128 values in 16 bit, and the timestep"),
    "prediction_bytes": Component(131_072, "bytes a row", "4 x 128 x 128 values in 16 bit"),
    "link_gb_per_s": Component(100, "GB/s", f"half of what the H800's NVLink gives in one direction; {_OURS}"),
    "link_latency": Component(0.02, "ms", _OURS),
}

COMPONENTS: dict[str, dict[str, Component]] = {
    "diffusers": {
        **_SHARED,
        "step": Component(54.2, "ms, 2 rows", f"denoising step without adapters; {_LOGS}"),
        "step_rows": Component(2, "rows", "both halves of the guidance on one GPU"),
        "step_dispatch": Component(0, "ms", "contained in the step"),
        "controlnet_forward": Component(28, "ms, 2 rows", f"each ControlNet adds 28 ms to a step; {_PAPER}"),
        "residual_add": Component(0, "ms", "contained in the 28 ms"),
        "lora_load_1": Component(3200, "ms", f"middle of 3.0-3.4 s for one LoRA; {_PAPER}"),
        "lora_load_2": Component(7410, "ms", f"median load call with two LoRAs; {_LOGS}"),
        "lora_restore": Component(0, "ms", f"not published; taken as nothing, in favour of diffusers; {_OURS}"),
        "text_vae_post": Component(180, "ms", f"middle of 0.17-0.20 s (with ControlNets 0.17-0.19); {_LOGS}"),
    },
    "katz": {
        **_SHARED,
        "step": Component(30.4, "ms, 1 row", f"one half of the guidance, compiled; {_LOGS}"),
        "step_rows": Component(1, "rows", "each half of the guidance on its own GPU"),
        "step_dispatch": Component(1.0, "ms", f"denoising loop per step (31.4 ms) less the step (30.4 ms); {_LOGS}"),
        "controlnet_forward": Component(13.6, "ms, 1 row", f"step of a ControlNet service; {_LOGS}"),
        "residual_add": Component(0.1, "ms a row", f"161 MB read and written at 1.6 TB/s; {_OURS}"),
        "lora_merge": Component(122, "ms", f"patch call, per LoRA; {_LOGS}"),
        "lora_restore": Component(232, "ms", f"(0.599 - 0.135) s / 2 between requests with and without LoRAs; {_LOGS}"),
        "text_vae_post": Component(140, "ms", _LOGS),
    },
}
"""System -> component -> value, unit and source."""

TEXT_SHARE, VAE_SHARE = 0.15, 0.70
"""How text encoding, VAE and post-processing share their published sum; only the sum shows in a latency. Ours."""


def built_profile(name: str) -> tuple[Profile, Adapters] | None:
    """The profile of that name and its adapters; None for a name that is none of ``h800-sdxl-SYSTEM``."""
    system = name.removeprefix("h800-sdxl-")
    return (h800_profile(system), h800_adapters(system)) if name != system and system in SYSTEMS else None


def h800_profile(system: str) -> Profile:
    """The estimated profile of SDXL 1024x1024 on one H800 under ``diffusers`` or ``katz``; steps of 1 to 16 rows."""
    parts = {name: part.value for name, part in COMPONENTS[system].items()}
    per_row_ms = parts["gflop_per_row"] / parts["tflops_of_more_rows"]
    steps = {rows: _exact(round((parts["step"] + (rows - parts["step_rows"]) * per_row_ms) * MS)) for rows in ROWS}
    rest_ns = parts["text_vae_post"] * MS
    decode = _exact(round(rest_ns * VAE_SHARE))
    # Beside each other step and decode take turns: neither gains nor loses (1/s_u + 1/s_v = 1).
    corun = {rows: Corun(_ppm(2.0), _ppm(2.0), False) for rows in (1, ROWS[-1])}
    return Profile(
        name=f"h800-sdxl-{system}",
        provenance="estimated",
        row_buckets=ROWS,
        steps=steps,
        chunks={"whole": (decode,)},
        corun={("whole", 0): corun},
        overheads={
            "step_dispatch": _exact(round(parts["step_dispatch"] * MS)),
            "text_encode": _exact(round(rest_ns * TEXT_SHARE)),
            "result_copy": _exact(round(rest_ns) - round(rest_ns * VAE_SHARE) - round(rest_ns * TEXT_SHARE)),
        },
        head=_head(system),
    )


def h800_adapters(system: str) -> Adapters:
    """What adapters cost there; LoRA files of 325 to 435 MiB, times in proportion to their size."""
    parts = {name: part.value for name, part in COMPONENTS[system].items()}
    if system == "diffusers":
        read_copy = parts["lora_read"] + parts["lora_copy"]
        parts["lora_merge"] = parts["lora_load_1"] - read_copy
        # The second injection walks layers that hold the first: 7.41 s is more than twice 3.2 s.
        parts["lora_merge_more"] = parts["lora_load_2"] - 2 * parts["lora_load_1"]
    profile = h800_profile(system)
    sized = ("lora_read", "lora_copy", "lora_merge", "lora_merge_more", "lora_restore")
    tables: dict[str, dict[int, Spread]] = {
        name: {mib * MIB: _exact(round(parts[name] * MS * mib / LORA_MIB[1])) for mib in LORA_MIB}
        for name in sized
        if name in parts
    }
    more_ms = parts["controlnet_gflop_per_row"] / parts["tflops_of_more_rows"]
    tables["controlnet_forward"] = {
        rows: _exact(round((parts["controlnet_forward"] + (rows - parts["step_rows"]) * more_ms) * MS)) for rows in ROWS
    }
    tables["residual_add"] = {rows: _exact(round(parts["residual_add"] * rows * MS)) for rows in ROWS}
    encoder = {rows: round(profile.step_ns(rows) * parts["encoder_mid_share"]) for rows in ROWS}
    tables["denoise_encoder"] = {rows: _exact(encoder[rows]) for rows in ROWS}
    tables["denoise_decoder"] = {rows: _exact(profile.step_ns(rows) - encoder[rows]) for rows in ROWS}
    tables["controlnet_load"] = {CONTROLNET_BYTES: _exact(round(parts["controlnet_load"] * MS))}
    tables["controlnet_bytes"] = {0: _exact(CONTROLNET_BYTES)}
    for name in ("latent_bytes", "residual_bytes", "prediction_bytes"):
        tables[name] = {1: _exact(round(parts[name]))}
    tables["link_bytes_per_s"] = {0: _exact(round(parts["link_gb_per_s"] * 1e9))}
    tables["link_latency"] = {0: _exact(round(parts["link_latency"] * MS))}
    return Adapters(profile.name, tables)


def _head(system: str) -> Head:
    """What profile.yaml says besides the tables: device, model and every assumption."""
    return Head(
        device="NVIDIA H800 SXM 80 GB",
        gpu="h800",
        model="sdxl",
        resolutions=((1024, 1024),),
        dtype="float16",
        notes={
            "model_title": "Stable Diffusion XL, 1024x1024",
            "n_meaning": "n is 0 in every cell: nothing was measured by this project, and p10 = p90 = median",
            "assumptions": {
                name: {"value": part.value, "unit": part.unit, "source": part.source}
                for name, part in COMPONENTS[system].items()
            },
        },
    )


def _exact(value: int) -> Spread:
    return Spread(value, value, value, 0)


def _ppm(slowdown: float) -> Spread:
    return _exact(round(slowdown * 1_000_000))
