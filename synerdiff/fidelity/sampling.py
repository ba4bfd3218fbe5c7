"""Images by rule: the same seeds and prompts, in batches, so that memory does not grow with the number of images; and
how close two sets of images are, image by image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from synerdiff.core import CONDITIONAL, GUIDED, InputError, Mode
from synerdiff.diffusion import SHIPPED
from synerdiff.diffusion.digits import SHIPPED_WEIGHTS, STYLES_WEIGHTS, load_classifier
from synerdiff.fidelity.rules import SkipRule
from synerdiff.files import atomic
from synerdiff.results.intervals import Interval, t_interval

if TYPE_CHECKING:
    import torch

    from synerdiff.diffusion.model import DiffusionModel, SampleState

THUMBNAILS = 10
LARGEST_PSNR_DB = 100.0
"""Of equal images, whose PSNR is infinite."""
MEASURE = {
    "ssim": "Wang et al. 2004; Gaussian window of 11x11 pixels, sigma 1.5, K1 0.01, K2 0.03, images mirrored at their "
    "borders, mean over pixels and channels; torchmetrics structural_similarity_index_measure",
    "psnr": f"10 log10(1 / mean squared error) per image, at most {LARGEST_PSNR_DB:g} dB, then the mean over images",
    "data_range": "images clamped to [0, 1]",
    "interval": "95% Student t interval of the mean over images",
}


@dataclass(frozen=True, slots=True)
class Judged:
    """A rule's images against those of full guidance; arrays have one entry per image."""

    ssim: numpy.ndarray[Any, Any]
    psnr_db: numpy.ndarray[Any, Any]
    recognised: numpy.ndarray[Any, Any]
    """Bool, or empty where nothing can recognise them."""
    rows: numpy.ndarray[Any, Any]
    thumbnails: numpy.ndarray[Any, Any]
    """uint8 (at most 10, height, width, channels): the first images."""


class Subject(NamedTuple):
    """One image to make."""

    seed: int
    prompt: str


Gate = Callable[["torch.Tensor", Sequence[str]], Any]
"""Images in [0, 1] and their prompts -> which of them (bool, n) show what their prompt names."""
OnProgress = Callable[[str, float], None]
"""Hears what runs and how much of it is done, 0 to 1."""


class RowProgress:
    """Counts denoiser rows and tells how much of the piece of work that was begun last is done."""

    def __init__(self, report: OnProgress) -> None:
        self._report, self._what, self._total, self._done = report, "", 1, 0

    def begin(self, what: str, rows: int) -> None:
        """A piece that will take so many rows."""
        self._what, self._total, self._done = what, max(1, rows), 0

    def __call__(self, rows: int) -> None:
        """So many rows were just computed."""
        self._done += rows
        self._report(self._what, min(1.0, self._done / self._total))


class Sampler:
    """Runs rules on one model at one guidance scale, ``batch`` images at a time; ``on_rows`` hears the rows made."""

    def __init__(
        self, model: DiffusionModel, guidance_scale: float, batch: int, on_rows: Callable[[int], None]
    ) -> None:
        self.model = model
        self.guidance_scale = guidance_scale
        self.batch = batch
        self._on_rows = on_rows
        self._gate = gate_of(model)

    def latents(self, rule: SkipRule, subjects: Sequence[Subject]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Final latents (b, C, h, w) of each batch in order, and the rows that each of its images took."""
        import torch

        for states in self.batches(rule.run_steps, subjects):
            rows = [0] * len(states)
            dropped = [False] * len(states)
            skips = [rule.own_skips(state.seed) for state in states]
            for step in range(states[0].steps):
                modes = [
                    CONDITIONAL if gone else rule.mode if step in own else GUIDED
                    for own, gone in zip(skips, dropped, strict=True)
                ]
                self.step(states, modes)
                for i, mode in enumerate(modes):
                    rows[i] += 2 if mode is GUIDED else 1
                if rule.threshold is not None and step + 1 >= rule.warmup_steps:
                    for i, state in enumerate(states):
                        dropped[i] = dropped[i] or self.model.x0_similarity(state) >= rule.threshold
            yield torch.cat([state.latent for state in states]), rows

    def batches(self, steps: int, subjects: Sequence[Subject]) -> Iterator[list[SampleState]]:
        """The samples of each batch before their first step."""
        for start in range(0, len(subjects), self.batch):
            yield self.start(steps, subjects[start : start + self.batch])

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
        """One step of every sample, by default with guidance."""
        self._on_rows(self.model.step(states, modes))

    def reference(self, rule: SkipRule, subjects: Sequence[Subject], path: Path) -> None:
        """Compute the latents of a reference once and keep them on disk (float32, one image after the other)."""
        shape = (len(subjects), *self.model.latent_shape[1:])
        if path.is_file() and _opened(path, shape) is not None:
            return
        with atomic(path) as temporary:
            stored = numpy.lib.format.open_memmap(temporary, mode="w+", dtype=numpy.float32, shape=shape)
            position = 0
            for latents, _ in self.latents(rule, subjects):
                stored[position : position + len(latents)] = latents.cpu().numpy()
                position += len(latents)
            stored.flush()

    def judge(self, rule: SkipRule, subjects: Sequence[Subject], reference: Path, is_reference: bool = False) -> Judged:
        """Make the rule's images and compare each with the reference's of the same seed and prompt.

        The reference's own rule need not run again: its kept images are compared with themselves.
        """
        import torch

        stored = _opened(reference, (len(subjects), *self.model.latent_shape[1:]))
        if stored is None:
            raise InputError(f"{reference}: the latents of the reference are not whole; delete the file and run again.")
        parts: dict[str, list[Any]] = {name: [] for name in Judged.__slots__}
        position = 0
        made = None if is_reference else self.latents(rule, subjects)
        while position < len(subjects):
            chosen = slice(position, position + self.batch)
            original = torch.from_numpy(numpy.array(stored[chosen])).to(self.model.device)
            latents, rows = next(made) if made is not None else (original, [rule.rows] * len(original))
            against = self.images(original)
            images = self.images(latents)
            parts["ssim"].append(ssim_of(images, against).cpu().numpy())
            parts["psnr_db"].append(psnr_db_of(images, against).cpu().numpy())
            parts["rows"].append(numpy.array(rows))
            if self._gate is not None:
                parts["recognised"].append(self._gate(images, [subject.prompt for subject in subjects[chosen]]))
            if position < THUMBNAILS:
                parts["thumbnails"].append(thumbnails(images[: THUMBNAILS - position]))
            position += len(latents)
        arrays = {name: numpy.concatenate(part) if part else numpy.zeros(0, bool) for name, part in parts.items()}
        return Judged(**arrays)

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Decoded, in [0, 1], float32 (n, channels, height, width)."""
        return (self.model.decode(latents).float() / 2 + 0.5).clamp(0, 1)


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
    try:
        stored = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return stored if stored.shape == tuple(shape) and stored.dtype == numpy.float32 else None


def subjects_of(model: DiffusionModel, prompts: Sequence[str], first_seed: int, count: int) -> list[Subject]:
    """``count`` images from ``first_seed`` on; prompts in turn, or the model's own default of each seed."""
    return [
        Subject(first_seed + i, prompts[i % len(prompts)] if prompts else model.prompts.default_prompt(first_seed + i))
        for i in range(count)
    ]


def thumbnails(images: torch.Tensor) -> Any:
    """The first images of (n, channels, height, width) in [0, 1] as uint8 (at most 10, height, width, channels)."""
    return (images[:THUMBNAILS] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def gate_of(model: DiffusionModel, styled: bool = False) -> Gate | None:
    """Whether images, ``styled`` ones too, show the class that their prompt names; None without a classifier."""
    folder = SHIPPED.get(model.name, Path(model.name))
    weights = folder / (STYLES_WEIGHTS if styled else SHIPPED_WEIGHTS).name
    if not weights.is_file():
        return None
    import torch

    classifier = load_classifier(weights).to(model.device)

    @torch.inference_mode()
    def recognised(images: torch.Tensor, prompts: Sequence[str]) -> Any:
        most_likely = classifier(images * 2 - 1).argmax(dim=1).cpu()
        return (most_likely == torch.tensor([int(prompt) for prompt in prompts])).numpy()

    return recognised


def ssim_of(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM (n,) of images (n, channels, height, width) in [0, 1], both sets in the same order; see ``MEASURE``."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: Any = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    return values.reshape(len(images))  # type: ignore[no-any-return]


def psnr_db_of(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR (n,) in dB of images (n, channels, height, width) in [0, 1]; see ``MEASURE``."""
    error = (images - reference).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=10 ** (-LARGEST_PSNR_DB / 10)).log10()


def interval_of(values: numpy.ndarray[Any, Any]) -> Interval:
    """Mean over images with its 95% t interval."""
    return t_interval([float(value) for value in values])


def paired_difference(a: Judged, b: Judged, chosen: Sequence[int] | None = None) -> Interval:
    """Mean SSIM of a minus that of b on the same images (all, or the chosen ones), with its 95% t interval."""
    difference = a.ssim - b.ssim
    return interval_of(difference if chosen is None else difference[list(chosen)])
