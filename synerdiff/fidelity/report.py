"""What a fidelity study found, as lines and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from synerdiff.fidelity.calibration import choose_skips
from synerdiff.fidelity.results import SettingResult
from synerdiff.fidelity.rules import skips_to_calibrate, spread
from synerdiff.fidelity.study import StudyResult
from synerdiff.fidelity.table import Score

_SHEET_RULES = 9


def lines(result: StudyResult) -> list[str]:
    """Per setting: every rule with its cost and fidelity, then what calibration gained."""
    found = []
    for entry in result.converged:
        tried = ", ".join(f"{steps}: {ssim:.4f}" for steps, ssim in entry["ssim_against_4_times_as_many"].items())
        found.append(
            f"{entry['solver']}, guidance {entry['guidance_scale']:g}: {entry['steps']} steps are enough "
            f"(SSIM against 4 times as many, n = {entry['n']}: {tried})"
        )
    for setting in result.settings:
        found += _setting_lines(setting)
    return found


def _setting_lines(setting: SettingResult) -> list[str]:
    table = [("rule", "rows", "n", "SSIM", "95%", "PSNR dB", "recognised", "minus equal-cost rival")]
    rivals = {line.rule: line for line in setting.comparisons if line.against.startswith("full-")}
    for row in sorted(setting.scores, key=lambda row: -row.rows):
        rival = ""
        if row.rule in rivals:
            line = rivals[row.rule]
            rival = f"{line.difference:+.4f} ({line.low:+.4f} to {line.high:+.4f}) {line.against}"
        recognised = "" if row.recognised is None else f"{row.recognised:.3f}"
        interval = f"{row.ssim_low:.4f}-{row.ssim_high:.4f}"
        numbers = (f"{row.rows_share:.0%}", str(row.n), f"{row.ssim:.4f}", interval, f"{row.psnr_db:.1f}")
        table.append((row.rule, *numbers, recognised, rival))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    head = f"{setting.solver}, {setting.steps} steps, guidance {setting.guidance_scale:g}: against full guidance"
    found = [head]
    found += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    for line in setting.comparisons:
        if line.rule.startswith("reuse-calibrated") and not line.against.startswith("full-"):
            found.append(
                f"  {line.rule} minus {line.against}, {line.images} (n = {line.n}): {line.difference:+.4f} "
                f"({line.low:+.4f} to {line.high:+.4f})"
            )
    return [text.rstrip() for text in found]


def draw(result: StudyResult, folder: Path) -> list[Path]:
    """One picture of fidelity against rows for the whole table; per setting just judged a contact sheet, and how much
    guidance matters by step."""
    from synerdiff.figures import fidelity as pictures
    from synerdiff.figures.style import save

    head = result.table.head
    device = f"{result.table.model} on {head['device']}, {head['dtype']}, {head['date']}."
    panels: dict[str, list[Score]] = {}
    for row in result.table.rows:
        label = SettingResult(row.solver, row.steps, row.guidance_scale).label
        panels.setdefault(label, []).append(row)
    written = save(pictures.fidelity_against_rows(panels, caption=device), folder, "fidelity-rows")
    for setting in result.settings:
        suffix = setting.short
        sheet = [(f"{row}\n{note}", setting.judged[row].thumbnails) for row, note in _sheet(setting)]
        caption = f"{setting.label}; SSIM is the rule's mean over its images. {device}"
        written += save(pictures.contact_sheet(sheet, caption=caption), folder, f"fidelity-sheet-{suffix}")
        calibration = setting.calibration
        if calibration is not None:
            chosen = {}
            for skips in skips_to_calibrate(setting.rules):
                chosen[f"{skips} spread"] = sorted(spread(setting.steps, skips).skipped)
                chosen[f"{skips} calibrated"] = list(choose_skips(calibration.run_cost, skips))
            figure = pictures.sensitivity_by_step(
                calibration.x0_similarity,
                calibration.drop_error,
                calibration.reuse_error,
                chosen,
                caption=f"{setting.label}; means over the calibration's images. {device}",
            )
            written += save(figure, folder, f"fidelity-steps-{suffix}")
    return written


def _sheet(setting: SettingResult) -> Sequence[tuple[str, str]]:
    """Full guidance, then rules spread from the best to the worst."""
    ordered = sorted(setting.scores, key=lambda row: -row.ssim)
    last = len(ordered) - 1
    picked = dict.fromkeys(round(i * last / (_SHEET_RULES - 1)) for i in range(_SHEET_RULES))
    return [(ordered[i].rule, f"{ordered[i].rows_share:.0%} of rows, SSIM {ordered[i].ssim:.3f}") for i in picked]
