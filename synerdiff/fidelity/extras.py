"""Frechet distance and CLIP score of a study's rules, where the user brings the weights.

Neither tells a good skip from a bad one (the Frechet distance can improve when guidance is dropped): they stand beside
the paired measures for comparison with other work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synerdiff.core import InputError
from synerdiff.fidelity.study import Study, StudyResult


def extra_scores(study: Study, result: StudyResult, inception: Path | None, clip: Path | None) -> list[str]:
    """One line per rule. Makes the images again, so it takes as long as judging them did.

    ``inception``: the weights file of torchmetrics' FID; its distance is that to the images of full guidance.
    ``clip``: a folder with a transformers CLIPModel and its processor. Raises InputError where either cannot be used.
    """
    found = []
    for setting in result.settings:
        metrics = {}
        if inception is not None:
            metrics["Frechet distance"] = _frechet(inception, study.model.device)
        if clip is not None:
            metrics["CLIP score"] = _clip(clip, study.model.device)
        sampler = study.sampler(setting.guidance_scale)
        reference = next(rule for rule in setting.rules if rule.run_steps == setting.steps and rule.schedule == "full")
        for rule in [reference, *(rule for rule in setting.rules if rule != reference)]:
            position = 0
            for metric in metrics.values():
                metric.reset()
            for latents, _ in sampler.latents(rule, study.subjects):
                images = sampler.images(latents)
                images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
                prompts = [subject.prompt for subject in study.subjects[position : position + len(images)]]
                position += len(images)
                for name, metric in metrics.items():
                    if name == "CLIP score":
                        metric.update((images * 255).round().byte(), prompts)
                    else:
                        metric.update(images, real=rule == reference)
            # The reference's features stay: ``reset_real_features`` is off.
            scores = {name: metric for name, metric in metrics.items() if name == "CLIP score" or rule != reference}
            text = ", ".join(f"{name} {float(metric.compute()):.3f}" for name, metric in scores.items())
            if text:
                found.append(f"  {setting.steps} steps, guidance {setting.guidance_scale:g}, {rule.name}: {text}")
    return found


def _frechet(weights: Path, device: Any) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(
            normalize=True, reset_real_features=False, feature_extractor_weights_path=str(weights)
        )
    except ModuleNotFoundError:
        raise InputError(
            "--frechet needs the library torch-fidelity; install it with: pip install torch-fidelity"
        ) from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise InputError(
            f"{weights}: these are no weights of torchmetrics' Inception network ({_short(error)})."
        ) from None
    return metric.to(device)


def _clip(folder: Path, device: Any) -> Any:
    from torchmetrics.multimodal.clip_score import CLIPScore

    try:
        metric = CLIPScore(model_name_or_path=str(folder))  # type: ignore[arg-type]
    except (OSError, RuntimeError, KeyError, ValueError, ImportError) as error:
        raise InputError(f"{folder}: this is no folder of a CLIP model and its processor ({_short(error)}).") from None
    return metric.to(device)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
