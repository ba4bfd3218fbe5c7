"""Batching rules for serving engines, written from what was found: SGLang's ``--batching-config``, vllm-omni's options.

SGLang (multimodal_gen) reads ``{schema_version, rules}``; a rule has exactly one of ``model`` and ``model_contains``, a
required ``max_batch_size``, optionally ``resolution`` (WIDTHxHEIGHT), and a free ``calibration``; unknown keys fail
there. vllm-omni takes ``max_num_seqs`` and ``diffusion_batching_config`` with a ``compute_unit_budget``: its batch at a
resolution is ceil(budget / (height / 16 * width / 16)), at most max_num_seqs. It has no free field, so what the numbers
rest on stands in comments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from synerdiff import __version__
from synerdiff.core import InputError
from synerdiff.files import atomic
from synerdiff.profile.capacity import DEFAULT_BATCH, most_samples
from synerdiff.profile.tables import Profile, Size

ENGINES = ("sglang", "vllm-omni")
MODEL_PATHS = {"sdxl": "stable-diffusion-xl", "sd15": "stable-diffusion-v1-5"}
"""Our name of an architecture -> what the paths of its checkpoints contain."""
_SIDE = 16
"""Pixels a side of vllm-omni's compute unit."""


class Choice(NamedTuple):
    """A batch that was chosen for a profile, and why."""

    profile: Profile
    batch: int | None
    """None: the default."""
    sample_rows: int
    basis: Mapping[str, Any]
    """What it was chosen for, for people."""


def check_engine(name: str | None, profiles: Iterable[Profile]) -> None:
    """InputError for an engine whose rules are not known, and for a profile that names no model or resolution."""
    if name is None:
        return
    if name not in ENGINES:
        raise InputError(f"--emit is '{name}'; allowed are {' and '.join(ENGINES)}.")
    for profile in profiles:
        head = profile.head
        if not head.model or head.size is None:
            what = "resolution" if head.model else "model"
            raise InputError(f"--emit {name}: profile '{profile.name}' names no {what}, which its rules need.")


def emit(engine: str, choices: Sequence[Choice], folder: Path, profiles: Sequence[str] = ()) -> list[Path]:
    """Write the engine's rules into the folder, a file for each choice; the paths.

    What an earlier answer about ``profiles`` has left there, and this one does not write, is removed.
    """
    kind = "json" if engine == "sglang" else "yaml"
    paths = []
    for choice in choices:
        which = f"-{choice.profile.name}" if len(choices) > 1 else ""
        path = folder / f"{engine}-batching{which}.{kind}"
        text = sglang_rules(choice) if engine == "sglang" else vllm_omni_options(choice)
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        paths.append(path)
    for old in {folder / f"{engine}-batching{which}.{kind}" for which in ["", *(f"-{name}" for name in profiles)]}:
        if old not in paths:
            old.unlink(missing_ok=True)
    return paths


def sglang_rules(choice: Choice) -> str:
    """JSON: one rule per resolution of the profile."""
    model = choice.profile.head.model
    which = {"model": model} if "/" in model else {"model_contains": MODEL_PATHS.get(model, model)}
    rules = [
        {**which, "resolution": f"{width}x{height}", "max_batch_size": batch, "calibration": calibration(choice)}
        for (height, width), batch in batches(choice).items()
    ]
    return json.dumps({"schema_version": 1, "rules": rules}, indent=2, allow_nan=False) + "\n"


def vllm_omni_options(choice: Choice) -> str:
    """YAML: the two options, the rest as comments."""
    own = batches(choice)
    budget = min(batch * (height // _SIDE) * (width // _SIDE) for (height, width), batch in own.items())
    options = {"max_num_seqs": max(own.values()), "diffusion_batching_config": {"compute_unit_budget": budget}}
    lines = [f"# {name}: {json.dumps(value)}" for name, value in calibration(choice).items()]
    return "\n".join([*lines, yaml.safe_dump(options, sort_keys=False)])


def batches(choice: Choice) -> dict[Size, int]:
    """Resolution -> samples in a step at most."""
    profile = choice.profile
    assert profile.head.size is not None  # check_engine has seen to it
    own = profile.sizes or {profile.head.size: profile}
    most = {size: most_samples(one, choice.sample_rows) for size, one in own.items()}
    return {size: min(choice.batch or DEFAULT_BATCH, most_of) for size, most_of in most.items()}


def calibration(choice: Choice) -> dict[str, Any]:
    """What the numbers rest on: our version, the profile, its error band, and what was asked for."""
    profile = choice.profile
    return {
        "synerdiff": __version__,
        "profile": profile.name,
        "provenance": profile.provenance,
        "profile_hash": profile.content_hash[:16],
        "device": profile.head.device,
        "model": profile.head.model,
        "error_band": error_band(profile),
        "batch_counts": "images in one denoising step",
        **choice.basis,
    }


def error_band(profile: Profile) -> Any:
    """By how much the profile's times may be off, as far as it says."""
    stated = profile.head.notes.get("band")
    if isinstance(stated, dict):
        return stated
    widest = max((max(s.p90 / s.median - 1, 1 - s.p10 / s.median) for s in profile.steps.values()), default=0.0)
    if profile.provenance == "measured" and widest:
        return {
            "low": round(1 - widest, 4),
            "high": round(1 + widest, 4),
            "meaning": "widest p10 to p90 of a step's time",
        }
    return f"unknown: the times are {profile.provenance}, and the profile states no band"
