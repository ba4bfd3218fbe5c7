"""What a fidelity study found: rows and paired comparisons per setting, as lines and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synerdiff.fidelity.calibration import Calibration, choose_skips
from synerdiff.fidelity.rules import SkipRule, skips_to_calibrate, spread
from synerdiff.fidelity.sampling import Judged, interval_of, paired_difference
from synerdiff.fidelity.table import FidelityTable, PairedScore, Score, significant
from synerdiff.figures import fidelity as pictures
from synerdiff.figures.style import save

_SHEET_RULES = 9


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
    rules: list[SkipRule] = field(default_factory=list)
    judged: dict[str, Judged] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    comparisons: list[PairedScore] = field(default_factory=list)
    calibration: Calibration | None = None

    @property
    def setting(self) -> tuple[str, int, float]:
        """Solver, steps and guidance scale: what rows are found by."""
        return (self.solver, self.steps, self.guidance_scale)

    @property
    def label(self) -> str:
        """For people."""
        return f"{solver_name(self.solver)}, {self.steps} steps, guidance {self.guidance_scale:g}"

    @property
    def short(self) -> str:
        """For file names."""
        return f"{solver_name(self.solver)}-{self.steps}-{self.guidance_scale:g}"

    def add(self, rule: SkipRule, judged: Judged, held_out: Sequence[int]) -> None:
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
            rows=significant(judged.rows.mean()),
            n=len(chosen),
            ssim=significant(ssim.value),
            ssim_low=significant(max(-1.0, ssim.low)),
            ssim_high=significant(min(1.0, ssim.high)),
            psnr_db=significant(psnr_db.value),
            psnr_low_db=significant(max(0.0, psnr_db.low)),
            psnr_high_db=significant(psnr_db.high),
            recognised=significant(judged.recognised[chosen].mean()) if judged.recognised.size else None,
            held_out=only,
        )
        self.scores.append(score)

    def compare(self, held_out: Sequence[int]) -> list[PairedScore]:
        """Every rule against full guidance in fewer steps at its cost, and every calibrated one against the spread one.

        The equal-cost baseline has half of the rule's rows as steps, rounded down, so it never costs more.
        """
        pairs_compared = []
        tuned = sorted(set(range(len(self.judged[self.rules[0].name].ssim))) - set(held_out))
        for rule in self.rules:
            judged = self.judged[rule.name]
            baseline = f"full-{int(judged.rows.mean()) // 2}"
            pairs: list[tuple[str, str, Sequence[int] | None]] = []
            if rule.schedule == "calibrated":
                plain = spread(self.steps, len(rule.skipped)).name
                pairs = [(plain, "held out", held_out), (plain, "tuned prompts", tuned)]
                pairs.append((baseline, "held out", held_out))
            elif rule.schedule != "full":
                pairs = [(baseline, "all", None)]
            for against, images, chosen in pairs:
                if against in self.judged:
                    difference = paired_difference(judged, self.judged[against], chosen)
                    pairs_compared.append(PairedScore.of(self.setting, rule.name, against, images, difference))
        return pairs_compared


@dataclass(slots=True)
class StudyResult:
    """What a study judged now, and the whole table of its folder."""

    settings: list[SettingResult]
    converged: list[dict[str, Any]]
    """Per guidance scale searched: the fewest sufficient steps and the SSIM of every count that was tried."""
    table: FidelityTable


def lines(result: StudyResult) -> list[str]:
    """Per setting: every rule with its cost and fidelity, then what calibration gained."""
    texts = []
    for entry in result.converged:
        tried = ", ".join(f"{steps}: {ssim:.4f}" for steps, ssim in entry["ssim_against_4_times_as_many"].items())
        texts.append(
            f"{entry['solver']}, guidance {entry['guidance_scale']:g}: {entry['steps']} steps are enough "
            f"(SSIM against 4 times as many, n = {entry['n']}: {tried})"
        )
    for setting in result.settings:
        texts += _setting_lines(setting)
    return texts


def _setting_lines(setting: SettingResult) -> list[str]:
    table = [("rule", "rows", "n", "SSIM", "95%", "PSNR dB", "recognised", "minus equal-cost baseline")]
    baselines = {line.rule: line for line in setting.comparisons if line.against.startswith("full-")}
    for row in sorted(setting.scores, key=lambda row: -row.rows):
        against = ""
        if row.rule in baselines:
            line = baselines[row.rule]
            against = f"{line.difference:+.4f} ({line.low:+.4f} to {line.high:+.4f}) {line.against}"
        recognised = "" if row.recognised is None else f"{row.recognised:.3f}"
        interval = f"{row.ssim_low:.4f}-{row.ssim_high:.4f}"
        numbers = (f"{row.rows_share:.0%}", str(row.n), f"{row.ssim:.4f}", interval, f"{row.psnr_db:.1f}")
        table.append((row.rule, *numbers, recognised, against))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    texts = [f"{setting.solver}, {setting.steps} steps, guidance {setting.guidance_scale:g}: against full guidance"]
    texts += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    for line in setting.comparisons:
        if line.rule.startswith("reuse-calibrated") and not line.against.startswith("full-"):
            texts.append(
                f"  {line.rule} minus {line.against}, {line.images} (n = {line.n}): {line.difference:+.4f} "
                f"({line.low:+.4f} to {line.high:+.4f})"
            )
    return [text.rstrip() for text in texts]


def draw(result: StudyResult, folder: Path) -> list[Path]:
    """One picture of fidelity against rows for the whole table; per setting just judged a contact sheet, and how much
    guidance matters by step."""
    head = result.table.head
    random = ", RANDOM WEIGHTS" if head.get("weights") == "random" else ""
    device = f"{result.table.model}{random} on {head['device']}, {head['dtype']}, {head['date']}."
    panels: dict[str, list[Score]] = {}
    for row in result.table.rows:
        panels.setdefault(SettingResult(*row[:3]).label, []).append(row)
    written = save(pictures.fidelity_against_rows(panels, caption=device), folder, "fidelity-rows")
    for setting in result.settings:
        sheet = [(f"{row}\n{note}", setting.judged[row].thumbnails) for row, note in _sheet(setting)]
        caption = f"{setting.label}; SSIM is the rule's mean over its images. {device}"
        written += save(pictures.contact_sheet(sheet, caption=caption), folder, f"fidelity-sheet-{setting.short}")
        if (found := setting.calibration) is not None:
            chosen = {}
            for skips in skips_to_calibrate(setting.rules):
                chosen[f"{skips} spread"] = sorted(spread(setting.steps, skips).skipped)
                chosen[f"{skips} calibrated"] = list(choose_skips(found.run_cost, skips))
            curves = (found.x0_similarity, found.drop_error, found.reuse_error)
            caption = f"{setting.label}; means over the calibration's images. {device}"
            figure = pictures.sensitivity_by_step(*curves, chosen, caption=caption)
            written += save(figure, folder, f"fidelity-steps-{setting.short}")
    return written


def _sheet(setting: SettingResult) -> Sequence[tuple[str, str]]:
    """Full guidance, then rules spread from the best to the worst."""
    ordered = sorted(setting.scores, key=lambda row: -row.ssim)
    last = len(ordered) - 1
    picked = dict.fromkeys(round(i * last / (_SHEET_RULES - 1)) for i in range(_SHEET_RULES))
    return [(ordered[i].rule, f"{ordered[i].rows_share:.0%} of rows, SSIM {ordered[i].ssim:.3f}") for i in picked]
