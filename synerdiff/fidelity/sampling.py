"""Images by rule: the same seeds and prompts, in batches, so that memory does not grow with the number of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from synerdiff.core import CONDITIONAL, GUIDED, InputError, Mode
from synerdiff.fidelity.rules import Rule
from synerdiff.fidelity.scores import THUMBNAILS, Judged, psnr_db_of, ssim_of
from synerdiff.files import atomic

if TYPE_CHECKING:
    import torch

    from synerdiff.diffusion.model import DiffusionModel, SampleState


class Subject(NamedTuple):
    """One image to make."""

    seed: int
    prompt: str


OnRows = Callable[[int], None]
"""Hears how many denoiser rows were just computed."""


class Sampler:
    """Runs rules on one model at one guidance scale, ``batch`` images at a time."""

    def __init__(self, model: DiffusionModel, guidance_scale: float, batch: int, on_rows: OnRows) -> None:
        self.model = model
        self.guidance_scale = guidance_scale
        self.batch = batch
        self._on_rows = on_rows
        self._gate = _gate_of(model)

    def latents(self, rule: Rule, subjects: Sequence[Subject]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Final latents (b, C, h, w) of each batch in order, and the rows that each of its images took."""
        import torch

        for start in range(0, len(subjects), self.batch):
            states = self.start(rule.run_steps, subjects[start : start + self.batch])
            rows = [0] * len(states)
            dropped = [False] * len(states)
            skips = [rule.own_skips(state.seed) for state in states]
            for step in range(states[0].steps):
                modes = [self._mode(rule, step, own, gone) for own, gone in zip(skips, dropped, strict=True)]
                self.step(states, modes)
                for i, mode in enumerate(modes):
                    rows[i] += 2 if mode is GUIDED else 1
                if rule.threshold is not None and step + 1 >= rule.warmup_steps:
                    for i, state in enumerate(states):
                        dropped[i] = dropped[i] or self.model.x0_similarity(state) >= rule.threshold
            yield torch.cat([state.latent for state in states]), rows

    def start(self, steps: int, subjects: Sequence[Subject]) -> list[SampleState]:
        """Samples before their first step. InputError for schedulers that call the denoiser more than once a step."""
        states = [self.model.start(subject.seed, steps, self.guidance_scale, subject.prompt) for subject in subjects]
        if states[0].steps != steps:
            raise InputError(
                f"{self.model.solver.scheduler_name} makes {states[0].steps} denoiser calls of {steps} steps; a "
                "fidelity study needs one call a step, as DDIM, Euler and DPM-Solver++ 2M make."
            )
        return states

    def step(self, states: Sequence[SampleState], modes: Sequence[Mode] | None = None) -> None:
        self._on_rows(self.model.step(states, modes))

    def reference(self, rule: Rule, subjects: Sequence[Subject], path: Path) -> None:
        """Compute the latents of a reference once and keep them on disk (float32, one image after the other)."""
        import numpy

        shape = (len(subjects), *self.model.latent_shape[1:])
        if path.is_file() and _opened(path, shape) is not None:
            return
        with atomic(path) as temporary:
            kept = numpy.lib.format.open_memmap(temporary, mode="w+", dtype=numpy.float32, shape=shape)
            position = 0
            for latents, _ in self.latents(rule, subjects):
                kept[position : position + len(latents)] = latents.cpu().numpy()
                position += len(latents)
            kept.flush()

    def judge(self, rule: Rule, subjects: Sequence[Subject], reference: Path, is_reference: bool = False) -> Judged:
        """Make the rule's images and compare each with the reference's of the same seed and prompt.

        The reference's own rule need not run again: its kept images are compared with themselves.
        """
        import numpy
        import torch

        kept = _opened(reference, (len(subjects), *self.model.latent_shape[1:]))
        if kept is None:
            raise InputError(f"{reference}: the latents of the reference are not whole; delete the file and run again.")
        parts: dict[str, list[Any]] = {name: [] for name in Judged.__slots__}
        position = 0
        made = None if is_reference else self.latents(rule, subjects)
        while position < len(subjects):
            chosen = slice(position, position + self.batch)
            original = torch.from_numpy(numpy.array(kept[chosen])).to(self.model.device)
            latents, rows = next(made) if made is not None else (original, [rule.rows] * len(original))
            against = self.images(original)
            images = self.images(latents)
            parts["ssim"].append(ssim_of(images, against).cpu().numpy())
            parts["psnr_db"].append(psnr_db_of(images, against).cpu().numpy())
            parts["rows"].append(numpy.array(rows))
            if self._gate is not None:
                parts["recognised"].append(self._gate(images, [subject.prompt for subject in subjects[chosen]]))
            if position < THUMBNAILS:
                pixels = (images[: THUMBNAILS - position] * 255).round().to(torch.uint8)
                parts["thumbnails"].append(pixels.permute(0, 2, 3, 1).cpu().numpy())
            position += len(latents)
        arrays = {name: numpy.concatenate(found) if found else numpy.zeros(0, bool) for name, found in parts.items()}
        return Judged(**arrays)

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Decoded, in [0, 1], float32 (n, channels, height, width)."""
        return (self.model.decode(latents).float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def _mode(rule: Rule, step: int, skips: frozenset[int], dropped: bool) -> Mode:
        if dropped:
            return CONDITIONAL
        return rule.mode if step in skips else GUIDED


def fingerprint(model: DiffusionModel, prompt: str) -> str:
    """A hash over the weights as loaded and over one encoded prompt: what tells two models apart."""
    import torch

    digest = hashlib.sha256()
    for module in (model.unet, model.vae):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    tokens = model.encode_prompt(prompt).tokens.detach().float().cpu().contiguous()
    digest.update(tokens.numpy().data)
    return digest.hexdigest()


def _opened(path: Path, shape: Sequence[int]) -> Any:
    """The kept latents, read from disk as they are asked for; None when they are not whole or of other images."""
    import numpy

    try:
        kept = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == tuple(shape) and kept.dtype == numpy.float32 else None


def _gate_of(model: DiffusionModel) -> Callable[[torch.Tensor, Sequence[str]], Any] | None:
    """Whether images in [0, 1] show the class that their prompt names; None for a model without a classifier."""
    from synerdiff.diffusion import SHIPPED

    weights = SHIPPED.get(model.name, Path(model.name)) / "classifier.safetensors"
    if not weights.is_file():
        return None
    import torch

    from synerdiff.diffusion.digits import load_classifier

    classifier = load_classifier(weights).to(model.device)

    @torch.inference_mode()
    def recognised(images: torch.Tensor, prompts: Sequence[str]) -> Any:
        found = classifier(images * 2 - 1).argmax(dim=1).cpu()
        return (found == torch.tensor([int(prompt) for prompt in prompts])).numpy()

    return recognised
