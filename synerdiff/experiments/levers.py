"""What `synerdiff fidelity` does: for each lever its study of images, in one folder, with tables and pictures.

Levers: `skips` (guidance skipped, beside fewer steps at equal cost), `lora-bound` (a LoRA merged only after K steps)
and `controlnet` (an outline that steers `digits`).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synerdiff import __version__
from synerdiff.core import InputError
from synerdiff.diffusion import SHIPPED_LORAS
from synerdiff.diffusion.checkpoint import has_random_weights, load_model
from synerdiff.diffusion.controlnet import load_controlnet
from synerdiff.diffusion.lora import LoraFile, read_lora
from synerdiff.experiments.fidelity_tradeoff import trade_off
from synerdiff.fidelity.adapters import BOUNDS, BoundRow, bound_lines, bound_study, outline_study, write_bounds
from synerdiff.fidelity.report import SettingResult, StudyResult, draw, lines
from synerdiff.fidelity.sampling import OnProgress, gate_of, subjects_of
from synerdiff.fidelity.study import Study, StudySettings
from synerdiff.figures.adapters import bound_curves
from synerdiff.figures.fidelity import contact_sheet, latency_against_fidelity
from synerdiff.figures.style import save
from synerdiff.files import atomic
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.tables import Profile

if TYPE_CHECKING:
    from synerdiff.diffusion.model import DiffusionModel

ADAPTER_STEPS = 25
"""Steps of the adapters' studies unless given: nothing is searched for them."""


@dataclass(frozen=True, slots=True)
class LeverStudy:
    """Which levers to judge on which model. ``dtype``, ``resolution``, ``scheduler``: None is the model's own.

    ``steps``, ``prompts``, ``rules``: as for ``StudySettings``. ``profile``: name or folder, to simulate what skips and
    fewer steps buy there. ``loras``: the folder, None for those that ship; ``lora_names``: files in it, empty for all.
    """

    model: str
    levers: tuple[str, ...] = ("skips",)
    steps: tuple[int, ...] = ()
    guidance_scales: tuple[float, ...] = (7.5,)
    samples: int = 256
    batch: int = 32
    first_seed: int = 1000
    prompts: tuple[str, ...] = ()
    rules: str = "all"
    device: str = "cpu"
    dtype: str | None = None
    resolution: tuple[int, int] | None = None
    scheduler: str | None = None
    profile: str | None = None
    random_weights: bool = False
    loras: Path | None = None
    lora_names: tuple[str, ...] = ()
    lora_scale: float = 1.0
    bounds: tuple[int, ...] = ()

    @property
    def settings(self) -> StudySettings:
        """What the study of skips judges; searches and calibrations take 64 images at most."""
        few = min(self.samples, 64)
        return StudySettings(
            steps=self.steps,
            guidance_scales=self.guidance_scales,
            samples=self.samples,
            search_samples=few,
            calibration_samples=few,
            batch=self.batch,
            first_seed=self.first_seed,
            prompts=self.prompts,
            part=self.rules,
        )


def study_levers(wanted: LeverStudy, out: Path, on_progress: OnProgress) -> list[str]:
    """Run the studies and write their tables and pictures to ``out``; returns the results as lines of text.

    Everything that can be known to be wrong is refused before images are made. Raises InputError.
    """
    if has_random_weights(wanted.model) and not wanted.random_weights:
        raise InputError(
            f"model '{wanted.model}' is an architecture with random weights, whose images mean nothing; name a "
            "checkpoint, or give --random-weights to try the command."
        )
    profile = None if wanted.profile is None else load_profile(find_profile(wanted.profile))
    files = _lora_files(wanted) if "lora-bound" in wanted.levers else []
    if "controlnet" in wanted.levers and wanted.model != "digits":
        raise InputError(f"lever 'controlnet' judges the outlines of digits; the model is '{wanted.model}'.")
    model = load_model(wanted.model, wanted.device, wanted.dtype, wanted.resolution, wanted.scheduler)
    if profile is not None:
        _require_profile_of(profile, model)
    text = [f"{model.name}: weights {model.weights}"]
    if "skips" in wanted.levers:
        study = Study(model, wanted.settings, out, on_progress)
        result = study.run(_head(model, wanted.device))
        text += lines(result)
        pictures = draw(result, out)
        if profile is not None:
            pictures += _trade_offs(result, profile, out, on_progress)
        text += [str(path) for path in pictures]
    settings = [
        SettingResult(model.solver.scheduler_name, steps, scale)
        for steps in wanted.steps or (ADAPTER_STEPS,)
        for scale in wanted.guidance_scales
    ]
    if files:
        text += _bounds(model, files, settings, wanted, out, on_progress)
    if "controlnet" in wanted.levers:
        text += [line for setting in settings for line in _outlines(model, setting, wanted, out, on_progress)]
    return text


def _head(model: DiffusionModel, device: str) -> dict[str, Any]:
    """Which model, on what and when; the study adds the weights' hash, resolution and measure."""
    libraries = ("torch", "diffusers", "torchmetrics")
    return {
        "model": model.name,
        "weights": model.weights,
        "solver": model.own_scheduler,
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"synerdiff": __version__, **{name: version(name) for name in libraries}},
    }


def _require_profile_of(profile: Profile, model: DiffusionModel) -> None:
    """InputError for a profile of another model or resolution: what this study finds says nothing about its images."""
    head = profile.head
    if head.model != model.name:
        raise InputError(f"--profile: '{profile.name}' is of model '{head.model}'; the study is of '{model.name}'.")
    if head.size != (model.height, model.width):
        raise InputError(
            f"--profile: '{profile.name}' is for {head.pixels} pixels; the study is of {model.height}x{model.width}."
        )


def _trade_offs(result: StudyResult, profile: Profile, out: Path, on_progress: OnProgress) -> list[Path]:
    """Per setting a table and a picture of simulated latency against fidelity; the paths of the pictures."""
    written = []
    for setting in result.settings:
        table = replace(result.table, head={**result.table.head, "solver": setting.solver})
        frame = trade_off(profile, table, setting.steps, setting.guidance_scale, on_progress=on_progress)
        name = f"fidelity-latency-{setting.short}"
        with atomic(out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
        caption = (
            f"{setting.label} on {profile.label}. Poisson arrivals, means over 3 seeds of 600 requests; load 1: full "
            "guidance in all steps with serial decodes. All variants run load-skip's placement at its default batch."
        )
        written += save(latency_against_fidelity(frame, caption=caption), out, name)
    return written


def _lora_files(wanted: LeverStudy) -> list[LoraFile]:
    if wanted.loras is None and wanted.model != "digits":
        raise InputError(f"no LoRAs ship for {wanted.model}; name their folder with --loras.")
    folder = SHIPPED_LORAS if wanted.loras is None else wanted.loras
    names: Sequence[str] = wanted.lora_names or sorted(path.stem for path in folder.glob("*.safetensors"))
    if not names:
        raise InputError(f"{folder}: this folder holds no LoRAs (.safetensors files).")
    return [read_lora(f"{name.removesuffix('.safetensors')}.safetensors", folder) for name in dict.fromkeys(names)]


def _bounds(
    model: DiffusionModel,
    files: Sequence[LoraFile],
    settings: Sequence[SettingResult],
    wanted: LeverStudy,
    out: Path,
    on_progress: OnProgress,
) -> list[str]:
    """``lora-bound.csv``, its curves, and a sheet of images per LoRA and setting."""
    rows, pictures = list[BoundRow](), list[Path]()
    curves: dict[str, list[dict[str, Any]]] = {}
    subjects = subjects_of(model, wanted.prompts, wanted.first_seed, wanted.samples)
    weights = ", RANDOM WEIGHTS" if model.weights == "random" else ""
    for setting in settings:
        caption = (
            f"{model.name}{weights}, {setting.label}, {len(subjects)} images, LoRA at scale {wanted.lora_scale:g}."
        )
        for file in files:
            result = bound_study(
                model,
                file,
                subjects,
                scale=wanted.lora_scale,
                steps=setting.steps,
                guidance_scale=setting.guidance_scale,
                bounds=wanted.bounds or BOUNDS,
                batch=wanted.batch,
                gate=gate_of(model, styled=True),
                on_progress=on_progress,
            )
            rows += result.rows
            curves[file.name if len(settings) == 1 else f"{file.name}: {setting.label}"] = [
                asdict(row) for row in result.rows
            ]
            sheet = [
                ("without LoRA" if bound == setting.steps else f"K = {bound}", images)
                for bound, images in result.sheet.items()
            ]
            figure = contact_sheet(sheet, title=f"LoRA {file.name}, merged after K steps", caption=caption)
            pictures += save(figure, out, f"lora-bound-sheet-{file.name}-{setting.short}")
    write_bounds(out / "lora-bound.csv", rows)
    pictures += save(bound_curves(curves, caption=caption), out, "lora-bound")
    return [*bound_lines(rows), *(str(path) for path in (out / "lora-bound.csv", *pictures))]


def _outlines(
    model: DiffusionModel, setting: SettingResult, wanted: LeverStudy, out: Path, on_progress: OnProgress
) -> list[str]:
    """The picture and the numbers of the shipped ControlNet."""
    gate = gate_of(model, styled=True)
    assert gate is not None
    result = outline_study(
        model,
        load_controlnet("outline", model),
        gate,
        samples=wanted.samples,
        steps=setting.steps,
        guidance_scale=setting.guidance_scale,
        batch=wanted.batch,
        first_seed=wanted.first_seed,
        on_progress=on_progress,
    )
    caption = (
        f"{setting.label}. The same column has the same seed and class. Outlines: held-out digits, moved, turned and "
        "scaled."
    )
    figure = contact_sheet(result.sheet, title="ControlNet outline", caption=caption)
    return [*result.lines(), *(str(path) for path in save(figure, out, f"controlnet-outline-{setting.short}"))]
