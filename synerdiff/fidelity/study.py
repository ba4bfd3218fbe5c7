"""What skipping guidance costs in images: rules and equal-cost baselines on the same seeds and prompts, resumable.

A study works through settings (one solver; step counts x guidance scales). Each finished piece is a file in
``OUT/parts`` named by a hash of everything that it depends on, so a rerun computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch

from synerdiff.core import InputError
from synerdiff.fidelity.calibration import Calibration, calibrate, can_calibrate, choose_skips
from synerdiff.fidelity.report import SettingResult, StudyResult
from synerdiff.fidelity.rules import (
    ALL_PARTS,
    SkipRule,
    calibrated,
    equal_cost_baselines,
    full,
    rules_to_judge,
    skips_to_calibrate,
)
from synerdiff.fidelity.sampling import (
    MEASURE,
    Judged,
    OnProgress,
    RowProgress,
    Sampler,
    Subject,
    fingerprint,
    interval_of,
    subjects_of,
)
from synerdiff.fidelity.table import (
    HEAD,
    Score,
    read_comparisons,
    read_fidelity,
    write_comparisons,
    write_fidelity,
)
from synerdiff.files import atomic, sha256_of_files

if TYPE_CHECKING:
    from synerdiff.diffusion.model import DiffusionModel

_T = TypeVar("_T")

_HERE = Path(__file__).parent
IMAGE_SOURCES = tuple(
    [_HERE / "sampling.py"]
    + [
        _HERE.parent / "diffusion" / f"{name}.py"
        for name in ("model", "rows", "solvers", "schedulers", "conditioning", "decoder", "denoisers/unet")
    ]
)
"""What turns seeds into images and scores: a part made by other source is not reused."""
LADDER = (4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 25, 30, 35, 40, 50, 60, 80, 100)
"""Step counts among which the fewest sufficient one is searched."""
CONVERGED_SSIM = 0.99
CONVERGED_FACTOR = 4
CALIBRATION_SEEDS_FROM = 1_000_000
"""Calibration images take seeds this far beyond the judged ones, and prompts that no held-out image has."""
EXTRA_BASELINES = (0.64, 0.48, 0.4)


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What to judge, and on what. ``steps`` empty: the fewest whose SSIM against 4 times as many is 0.99."""

    steps: tuple[int, ...] = ()
    guidance_scales: tuple[float, ...] = (7.5,)
    samples: int = 256
    search_samples: int = 64
    calibration_samples: int = 64
    batch: int = 32
    first_seed: int = 1000
    prompts: tuple[str, ...] = ()
    """Used in turn; empty: the model's own default prompt of each seed."""
    part: str = ALL_PARTS


class Study:
    """A study of one model in one folder. ``on_progress`` hears (what runs, share of it done)."""

    def __init__(self, model: DiffusionModel, settings: StudySettings, folder: Path, on_progress: OnProgress) -> None:
        self.model = model
        self.settings = settings
        self.folder = folder
        self._rows = RowProgress(on_progress)
        self._hash_of_images = sha256_of_files(list(IMAGE_SOURCES))
        self._hash_of_calibration = sha256_of_files([_HERE / "calibration.py"])
        self._samplers: dict[float, Sampler] = {}
        self.subjects = subjects_of(model, settings.prompts, settings.first_seed, settings.samples)
        prompts = list(dict.fromkeys(subject.prompt for subject in self.subjects))
        self.tuned_prompts = frozenset(prompts[: len(prompts) // 2])
        seeds = settings.first_seed + CALIBRATION_SEEDS_FROM
        candidates = subjects_of(model, settings.prompts, seeds, 64 * settings.calibration_samples)
        tuned = [subject for subject in candidates if subject.prompt in self.tuned_prompts]
        # With a prompt of its own per seed no prompt repeats, and the seeds alone keep the two sets apart.
        self.tuning = (tuned or candidates)[: settings.calibration_samples]
        self.held_out = [i for i, subject in enumerate(self.subjects) if subject.prompt not in self.tuned_prompts]
        self.identity: dict[str, Any] = {
            "weights_sha256": fingerprint(model, self.subjects[0].prompt),
            "resolution": model.height if model.height == model.width else [model.height, model.width],
            "dtype": str(model.dtype).removeprefix("torch."),
            "measure": MEASURE,
        }

    def run(self, head: dict[str, Any]) -> StudyResult:
        """Judge every setting, adding it to the table in the folder as soon as it is finished.

        ``head``: what else the table says about its making. Raises InputError when the folder holds the table of
        another model or measure.
        """
        earlier = self._existing()
        head = {**head, **self.identity, "first_seed": self.settings.first_seed}
        known = {(entry["solver"], entry["guidance_scale"]): entry for entry in earlier[1]}
        rows = {_row_key(row): row for row in earlier[0]}
        settings, comparisons = [], read_comparisons(self.folder)
        for scale in self.settings.guidance_scales:
            counts = self.settings.steps
            if not counts:
                entry = self._fewest_steps(scale)
                known[entry["solver"], scale] = entry
                counts = (entry["steps"],)
            for steps in counts:
                result = self._setting(steps, scale)
                settings.append(result)
                rows = {key: row for key, row in rows.items() if key[:3] != result.setting}
                rows |= {_row_key(row): row for row in result.scores}
                comparisons = [line for line in comparisons if line.setting != result.setting] + result.comparisons
                write_comparisons(self.folder, comparisons)
                write_fidelity(self.folder, {**head, "converged": list(known.values())}, rows.values())
        return StudyResult(settings, list(known.values()), read_fidelity(self.folder))

    def _existing(self) -> tuple[tuple[Score, ...], list[dict[str, Any]]]:
        if not (self.folder / HEAD).is_file():
            return (), []
        table = read_fidelity(self.folder)
        for name, value in self.identity.items():
            if table.head.get(name) != value:
                raise InputError(
                    f"{self.folder / HEAD}: this is the table of another study ({name} differs); give another folder."
                )
        return table.rows, list(table.head.get("converged", []))

    def _fewest_steps(self, scale: float) -> dict[str, Any]:
        """Bisect the ladder for the fewest steps whose images are those of 4 times as many (SSIM 0.99 or more)."""
        subjects = self.subjects[: self.settings.search_samples]
        tried: dict[int, float] = {}

        def enough(steps: int) -> bool:
            judged = self._judged(full(steps), full(CONVERGED_FACTOR * steps), scale, subjects)
            tried[steps] = round(interval_of(judged.ssim).value, 5)
            return tried[steps] >= CONVERGED_SSIM

        low, high = -1, len(LADDER)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(LADDER[middle]) else (middle, high)
        if high == len(LADDER):
            raise InputError(
                f"even {LADDER[-1]} steps reach an SSIM of only {tried[LADDER[-1]]:.3f} against "
                f"{CONVERGED_FACTOR} times as many at guidance scale {scale:g}; give --steps."
            )
        return {
            "solver": self.model.solver.scheduler_name,
            "guidance_scale": scale,
            "steps": LADDER[high],
            "n": len(subjects),
            "ssim_against_4_times_as_many": dict(sorted(tried.items())),
        }

    def _setting(self, steps: int, scale: float) -> SettingResult:
        result = SettingResult(self.model.solver.scheduler_name, steps, scale)
        reference = full(steps)
        rules = [reference, *rules_to_judge(steps, self.settings.part)]
        if can_calibrate(self.model):
            result.calibration = self._calibration(steps, scale)
            for skips in skips_to_calibrate(rules):
                rules.append(calibrated(steps, choose_skips(result.calibration.run_cost, skips)))
        else:
            # Nor can the x0 predictions be told from what such a scheduler keeps.
            rules = [rule for rule in rules if rule.threshold is None]
        rules += equal_cost_baselines(steps, rules[1:], EXTRA_BASELINES)
        for rule in rules:
            result.add(rule, self._judged(rule, reference, scale, self.subjects), self.held_out)
        result.comparisons = result.compare(self.held_out)
        return result

    def _calibration(self, steps: int, scale: float) -> Calibration:
        what, key = f"calibration of {steps} steps", self._key("calibration", steps, scale, self.tuning)
        rows = 2 * steps * len(self.tuning)
        return self._part(what, key, Calibration, rows, lambda sampler: calibrate(sampler, steps, self.tuning), scale)

    def _judged(self, rule: SkipRule, reference: SkipRule, scale: float, subjects: Sequence[Subject]) -> Judged:
        latents = self._reference(reference, scale, subjects)
        key = self._key("judged", rule.run_steps, scale, subjects, rule, reference)

        def judge(sampler: Sampler) -> Judged:
            return sampler.judge(rule, subjects, latents, is_reference=rule == reference)

        return self._part(f"{rule.name} against {reference.name}", key, Judged, rule.rows * len(subjects), judge, scale)

    def _reference(self, rule: SkipRule, scale: float, subjects: Sequence[Subject]) -> Path:
        key = self._key("reference", rule.run_steps, scale, subjects)
        path = self.folder / "parts" / f"{key}.npy"
        self._rows.begin(f"{rule.name}, guidance {scale:g}", rule.rows * len(subjects))
        self._sampler(scale).reference(rule, subjects, path)
        return path

    def _part(
        self, what: str, key: str, kind: type[_T], rows: int, compute: Callable[[Sampler], _T], scale: float
    ) -> _T:
        path = self.folder / "parts" / f"{key}.npz"
        part = _load_arrays(path, kind)
        if part is None:
            self._rows.begin(f"{what}, guidance {scale:g}", rows)
            self._rows(0)
            part = compute(self._sampler(scale))
            _save_arrays(path, part)
        return part

    def _sampler(self, scale: float) -> Sampler:
        """The one sampler of this guidance scale."""
        if scale not in self._samplers:
            self._samplers[scale] = Sampler(self.model, scale, self.settings.batch, self._rows)
        return self._samplers[scale]

    def _key(
        self,
        kind: str,
        steps: int,
        scale: float,
        subjects: Sequence[Subject],
        rule: SkipRule | None = None,
        reference: SkipRule | None = None,
    ) -> str:
        own = {**self.identity, "resolution": [self.model.height, self.model.width]}
        what: list[Any] = [kind, steps, scale, own, self.model.solver.scheduler_name, torch.__version__]
        what.append([self._hash_of_images, self._hash_of_calibration if kind == "calibration" else ""])
        what += [[list(subject) for subject in subjects], reference.run_steps if reference else None]
        if rule is not None:
            what += [rule.mode, sorted(rule.skipped), rule.threshold, rule.warmup_steps, rule.drawn]
        return f"{kind}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]}"


def _row_key(row: Score) -> tuple[Any, ...]:
    return (row.solver, row.steps, row.guidance_scale, row.rule)


def _save_arrays(path: Path, arrays: Any) -> None:
    """Write a dataclass of arrays in one step."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        numpy.savez_compressed(file, **{field.name: getattr(arrays, field.name) for field in fields(arrays)})


def _load_arrays(path: Path, kind: type[_T]) -> _T | None:
    """What ``_save_arrays`` kept; None when it is missing or not whole, so that it is computed again."""
    try:
        with numpy.load(path, allow_pickle=False) as stored:
            return kind(**{name: stored[name] for name in stored.files})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
