"""One setting of a study, judged: rows of the fidelity table, and paired comparisons between its rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from synerdiff.fidelity.calibration import Calibration
from synerdiff.fidelity.comparisons import Comparison, comparison
from synerdiff.fidelity.rules import Rule, spread
from synerdiff.fidelity.scores import Judged, interval_of, paired_difference
from synerdiff.fidelity.table import Score


def solver_name(scheduler: str) -> str:
    """A scheduler's usual name from its class name."""
    known = {"DPMSolverMultistepScheduler": "DPM++2M", "EulerDiscreteScheduler": "Euler"}
    return known.get(scheduler, scheduler.removesuffix("Scheduler"))


@dataclass(slots=True)
class SettingResult:
    """One solver, step count and guidance scale."""

    solver: str
    steps: int
    guidance_scale: float
    rules: list[Rule] = field(default_factory=list)
    judged: dict[str, Judged] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    calibration: Calibration | None = None

    @property
    def setting(self) -> tuple[str, int, float]:
        return (self.solver, self.steps, self.guidance_scale)

    @property
    def label(self) -> str:
        return f"{solver_name(self.solver)}, {self.steps} steps, guidance {self.guidance_scale:g}"

    @property
    def short(self) -> str:
        """For file names."""
        return f"{solver_name(self.solver)}-{self.steps}-{self.guidance_scale:g}"

    def add(self, rule: Rule, judged: Judged, held_out: Sequence[int]) -> None:
        """Keep a judged rule. A calibrated one counts only the images (``held_out``) that did not choose it."""
        self.rules.append(rule)
        self.judged[rule.name] = judged
        only = rule.schedule == "calibrated"
        chosen = list(held_out) if only else list(range(len(judged.ssim)))
        ssim, psnr_db = interval_of(judged.ssim[chosen]), interval_of(judged.psnr_db[chosen])
        score = Score(
            solver=self.solver,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            rule=rule.name,
            run_steps=rule.run_steps,
            mode=rule.mode,
            schedule=rule.schedule,
            warmup_steps=rule.warmup_steps,
            skipped_steps=None if rule.varies else tuple(sorted(rule.skipped)),
            rows=float(judged.rows.mean()),
            n=len(chosen),
            ssim=ssim.value,
            ssim_low=max(-1.0, ssim.low),
            ssim_high=min(1.0, ssim.high),
            psnr_db=psnr_db.value,
            psnr_low_db=max(0.0, psnr_db.low),
            psnr_high_db=psnr_db.high,
            recognised=float(judged.recognised[chosen].mean()) if judged.recognised.size else None,
            held_out=only,
        )
        self.scores.append(score)

    def compare(self, held_out: Sequence[int]) -> list[Comparison]:
        """Every rule against full guidance in fewer steps at its cost, and every calibrated one against the spread one.

        The rival has half of the rule's rows as steps, rounded down, so it never costs more.
        """
        found = []
        tuned = sorted(set(range(len(self.judged[self.rules[0].name].ssim))) - set(held_out))
        for rule in self.rules:
            judged = self.judged[rule.name]
            rival = f"full-{int(judged.rows.mean()) // 2}"
            pairs: list[tuple[str, str, Sequence[int] | None]] = []
            if rule.schedule == "calibrated":
                plain = spread(self.steps, len(rule.skipped)).name
                pairs = [(plain, "held out", held_out), (plain, "tuned prompts", tuned), (rival, "held out", held_out)]
            elif rule.schedule != "full":
                pairs = [(rival, "all", None)]
            for against, images, chosen in pairs:
                if against in self.judged:
                    difference = paired_difference(judged, self.judged[against], chosen)
                    found.append(comparison(self.setting, rule.name, against, images, difference))
        return found
