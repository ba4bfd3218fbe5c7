"""The study on the embedded model: scores, batches, calibration, resuming. Few images and steps: seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synerdiff.core import CONDITIONAL, GUIDED, REUSE, InputError
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.fidelity.calibration import calibrate, end_gains
from synerdiff.fidelity.rules import adaptive, full, last, random_half, spread
from synerdiff.fidelity.sampling import LARGEST_PSNR_DB, Sampler, Subject, fingerprint, psnr_db_of, ssim_of
from synerdiff.fidelity.study import Study, StudySettings
from synerdiff.fidelity.table import read_comparisons, read_fidelity

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly so on a busy machine

HEAD = {"model": "digits", "solver": "DDIMScheduler", "device": "cpu"}
SUBJECTS = [Subject(500 + i, str(i % 10)) for i in range(5)]
SMALL = StudySettings(
    steps=(5,), guidance_scales=(4.0,), samples=6, search_samples=4, calibration_samples=3, batch=4, part="core"
)


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_model("digits")


class Rows:
    """Counts what was computed."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, rows: int) -> None:
        self.total += rows


def by_hand_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The formula of Wang et al. 2004 with its 11x11 Gaussian window around every pixel, borders mirrored."""
    a, b = np.pad(a, 5, mode="reflect"), np.pad(b, 5, mode="reflect")
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    found = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x * x).sum() - mx * mx, (window * y * y).sum() - my * my
            covariance = (window * x * y).sum() - mx * my
            c1, c2 = 0.01**2, 0.03**2
            found.append((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_scores_follow_their_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(3, 1, 20, 24, generator=generator)
    b = (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    expected = [by_hand_ssim(x[0].double().numpy(), y[0].double().numpy()) for x, y in zip(a, b, strict=True)]
    assert ssim_of(a, b).tolist() == pytest.approx(expected, abs=2e-5)
    errors = (a - b).square().mean(dim=(1, 2, 3))
    assert psnr_db_of(a, b).tolist() == pytest.approx([10 * np.log10(1 / float(e)) for e in errors], rel=1e-5)
    assert ssim_of(a, a).tolist() == pytest.approx([1, 1, 1])
    assert psnr_db_of(a, a).tolist() == [LARGEST_PSNR_DB] * 3


def test_images_do_not_depend_on_the_batch_and_rules_run_their_modes(
    digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = spread(6, 3)
    whole = torch.cat([latents for latents, _ in Sampler(digits, 4.0, 5, Rows()).latents(rule, SUBJECTS)])
    parts = [latents for latents, _ in Sampler(digits, 4.0, 2, Rows()).latents(rule, SUBJECTS)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)

    state = digits.start(SUBJECTS[1].seed, 6, 4.0, SUBJECTS[1].prompt)
    for step in range(6):
        digits.step([state], [REUSE if step in rule.skipped else GUIDED])
    assert torch.allclose(state.latent, whole[1:2], atol=1e-4)


def test_rows_are_counted_by_image(digits: Any) -> None:
    rows = Rows()
    sampler = Sampler(digits, 4.0, 5, rows)
    ((_, taken),) = sampler.latents(spread(6, 3), SUBJECTS)
    assert taken == [9] * 5
    assert rows.total == 45
    ((_, taken),) = sampler.latents(random_half(spread(6, 4)), SUBJECTS)
    assert all(8 <= count <= 12 for count in taken)
    # Any similarity will do: sticky from the third step on.
    ((_, taken),) = sampler.latents(adaptive(6, -1.0), SUBJECTS)
    assert taken == [9] * 5
    ((_, taken),) = sampler.latents(adaptive(6, 1.1), SUBJECTS)
    assert taken == [12] * 5


def test_a_scheduler_of_more_calls_than_steps_is_refused() -> None:
    sampler = Sampler(load_model("digits", scheduler="HeunDiscreteScheduler"), 4.0, 2, Rows())
    with pytest.raises(InputError, match="HeunDiscreteScheduler makes 9 denoiser calls of 5 steps"):
        list(sampler.latents(full(5), SUBJECTS))


def test_calibration_measures_what_reusing_the_difference_does(digits: Any) -> None:
    """Against two full forwards per step: the error of a difference of two steps ago, in x0 and at the end."""
    steps, scale = 5, 3.0
    sampler = Sampler(digits, scale, 2, Rows())
    found = calibrate(sampler, steps, SUBJECTS[:3])
    table = digits.start(1, steps).progress.table.rows
    gains = end_gains(table)
    similarity, reuse, run = [], [], []
    for subject in SUBJECTS[:3]:
        state = digits.start(subject.seed, steps, scale, subject.prompt)
        differences = []
        for step in range(steps):
            digits.step([state])
            differences.append(state.last_difference.flatten())
            if step == 3:
                similarity.append(digits.x0_similarity(state))
        reuse.append(2.0 * abs(table[3].x0_output) * (differences[1] - differences[3]).square().mean().sqrt())
        error = gains[2] * (differences[1] - differences[2]) + gains[3] * (differences[1] - differences[3])
        run.append((2.0 * error).square().mean())
    assert found.x0_similarity[3] == pytest.approx(np.mean(similarity), abs=1e-4)
    assert found.reuse_error[3, 1] == pytest.approx(float(torch.stack(reuse).mean()), rel=1e-3)
    assert found.run_cost[1, 2] == pytest.approx(float(torch.stack(run).mean()), rel=1e-3)
    assert np.isnan(found.reuse_error[1, 1])
    assert (found.run_cost[:, 0] == 0).all()


def test_a_study_is_complete_and_a_second_run_computes_nothing(digits: Any, tmp_path: Path) -> None:
    heard: list[str] = []
    first = Study(digits, SMALL, tmp_path, lambda what, share: heard.append(what)).run(HEAD)
    assert "full-5, guidance 4" in heard
    table = read_fidelity(tmp_path)
    rows = {row.rule: row for row in table.rows}
    assert {"full-5", "full-4", "reuse-spread-2of5", "reuse-calibrated-2of5", "conditional-last-2of5"} <= set(rows)
    assert (rows["full-5"].ssim, rows["full-5"].psnr_db) == (1.0, LARGEST_PSNR_DB)
    assert rows["full-5"].rows == 10
    assert rows["reuse-spread-2of5"].skipped_steps == (1, 3)
    assert rows["reuse-spread-2of5"].n == 6
    # Prompts 0 to 2 of 6 chose the calibrated steps; prompts 3 to 5 judge them.
    assert (rows["reuse-calibrated-2of5"].n, rows["reuse-calibrated-2of5"].held_out) == (3, True)
    assert all(row.recognised is not None and row.ssim_low <= row.ssim <= row.ssim_high for row in table.rows)
    assert table.head["weights_sha256"] == fingerprint(digits, "0")
    assert table.resolution == 32

    compared = {(line.rule, line.against, line.images): line for line in read_comparisons(tmp_path)}
    line = compared["reuse-spread-2of5", "full-4", "all"]
    judged = first.settings[0].judged
    difference = judged["reuse-spread-2of5"].ssim - judged["full-4"].ssim
    assert line.difference == pytest.approx(float(difference.mean()), abs=1e-5)
    assert line.low < line.difference < line.high
    assert compared["reuse-calibrated-2of5", "reuse-spread-2of5", "held out"].n == 3

    heard.clear()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    Study(digits, SMALL, tmp_path, lambda what, share: heard.append(what)).run(HEAD)
    assert heard == []
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_an_interrupted_study_goes_on_and_a_torn_part_is_made_again(digits: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    heard: list[str] = []

    def until_the_third_rule(what: str, share: float) -> None:
        heard.append(what)
        if what.startswith("reuse-spread-4of5 against") and share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        Study(digits, SMALL, tmp_path / "a", until_the_third_rule).run(HEAD)
    assert not (tmp_path / "a" / "fidelity.csv").exists()
    kept = sorted(path.name for path in (tmp_path / "a" / "parts").iterdir())
    assert kept
    assert not [name for name in kept if name.endswith(".part")]
    torn = next((tmp_path / "a" / "parts").glob("judged-*.npz"))
    torn.write_bytes(torn.read_bytes()[:100])
    heard.clear()
    Study(digits, SMALL, tmp_path / "a", lambda what, share: heard.append(what)).run(HEAD)
    assert len([what for what in dict.fromkeys(heard) if what.startswith("reuse-spread-2of5 against")]) in (0, 1)
    Study(digits, SMALL, tmp_path / "b", lambda what, share: None).run(HEAD)
    assert (tmp_path / "a" / "fidelity.csv").read_text() == (tmp_path / "b" / "fidelity.csv").read_text()


def test_other_settings_join_the_table_and_other_models_do_not(digits: Any, tmp_path: Path) -> None:
    quiet = lambda what, share: None  # noqa: E731
    Study(digits, SMALL, tmp_path, quiet).run(HEAD)
    wide = StudySettings(**{name: getattr(SMALL, name) for name in SMALL.__slots__} | {"guidance_scales": (7.5,)})
    result = Study(digits, wide, tmp_path, quiet).run(HEAD)
    assert {row.guidance_scale for row in result.table.rows} == {4.0, 7.5}
    assert {line.guidance_scale for line in read_comparisons(tmp_path)} == {4.0, 7.5}
    other = load_model("tiny-sd")
    with pytest.raises(InputError, match=r"this is the table of another study \(weights_sha256 differs\)"):
        Study(other, SMALL, tmp_path, quiet).run(HEAD)


def test_without_known_coefficients_calibrated_and_adaptive_rules_are_left_out(tmp_path: Path) -> None:
    model = load_model("digits", scheduler="UniPCMultistepScheduler")
    settings = StudySettings(steps=(5,), guidance_scales=(4.0,), samples=4, batch=4, part="all")
    result = Study(model, settings, tmp_path, lambda what, share: None).run(HEAD)
    schedules = {row.schedule for row in result.table.rows}
    assert "calibrated" not in schedules
    assert "adaptive" not in schedules
    assert "spread" in schedules
    assert {row.solver for row in result.table.rows} == {"UniPCMultistepScheduler"}


def test_the_fewest_sufficient_steps_are_found_on_the_ladder(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synerdiff.fidelity.study.LADDER", (2, 4, 6, 8))
    settings = StudySettings(
        guidance_scales=(4.0,), samples=4, search_samples=4, calibration_samples=2, batch=4, part="core"
    )
    result = Study(digits, settings, tmp_path, lambda what, share: None).run(HEAD)
    entry = result.converged[0]
    tried = entry["ssim_against_4_times_as_many"]
    assert tried[entry["steps"]] >= 0.99
    assert all(value < 0.99 for steps, value in tried.items() if steps < entry["steps"])
    assert {row.steps for row in result.table.rows} == {entry["steps"]}
    monkeypatch.setattr("synerdiff.fidelity.study.LADDER", (2,))
    with pytest.raises(InputError, match=r"even 2 steps reach an SSIM of only 0\.\d+ against 4 times as many"):
        Study(digits, settings, tmp_path / "none", lambda what, share: None).run(HEAD)


def test_the_ranking_of_rules_on_the_shipped_model(digits: Any, tmp_path: Path) -> None:
    """Reusing the difference is closer than dropping it, late steps matter less than early ones, at equal rows."""
    sampler = Sampler(digits, 4.0, 8, Rows())
    subjects = [Subject(i, str(i)) for i in range(8)]
    sampler.reference(full(20), subjects, tmp_path / "reference.npy")

    def ssim(rule: Any) -> float:
        return float(sampler.judge(rule, subjects, tmp_path / "reference.npy").ssim.mean())

    dropped, reused = ssim(spread(20, 9, mode=CONDITIONAL)), ssim(spread(20, 9))
    assert reused > 0.99 > dropped
    assert ssim(last(20, 8, CONDITIONAL)) > ssim(last(20, 16, CONDITIONAL)) > ssim(last(20, 20, CONDITIONAL))
    with pytest.raises(InputError, match="the latents of the reference are not whole"):
        sampler.judge(spread(20, 9), subjects[:3], tmp_path / "reference.npy")
