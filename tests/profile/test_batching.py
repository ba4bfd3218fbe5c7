"""Whether batching pays: points by hand, the choice, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from synerdiff.cli import main
from synerdiff.profile.batching import BatchPoint, band_meaning, batch_points, best_point, sentence
from synerdiff.profile.folder import find_profile, load_profile, write_profile
from synerdiff.profile.tables import Band, Head, Profile
from tests.builders import make_profile

MS = 1_000_000


def profile(provenance: str = "measured") -> Profile:
    """Steps of 1, 2, 4 and 8 rows take 10, 10, 15 and 30 ms (p90 twice that), a decode 50 ms."""
    plain = make_profile({1: 10 * MS, 2: 10 * MS, 4: 15 * MS, 8: 30 * MS}, {"whole": [50 * MS]})
    steps = {rows: spread._replace(p90=2 * spread.median) for rows, spread in plain.steps.items()}
    return replace(plain, steps=steps, provenance=provenance, head=Head(resolutions=((512, 512),)))


def test_points_are_the_closed_form_at_full_batches() -> None:
    points = batch_points(profile(), 10)
    # 10 steps of 10, 15, 30 ms over 1, 2, 4 images, and a decode of 50 ms each.
    assert [point.batch for point in points] == [1, 2, 4]
    assert [point.images_per_s for point in points] == pytest.approx([1 / 0.150, 1 / 0.125, 1 / 0.125])
    assert [point.low for point in points] == pytest.approx([1 / 0.250, 1 / 0.200, 1 / 0.200])
    assert [point.high for point in points] == pytest.approx([point.images_per_s for point in points])
    assert [point.latency_s for point in points] == pytest.approx([0.150, 0.250, 0.500])
    assert [point.batch for point in batch_points(profile(), 10, guided=False)] == [1, 2, 4, 8]


def test_an_estimates_band_is_its_own() -> None:
    guess = replace(profile("estimated"), head=Head(band=Band(low=0.8, high=1.25)))
    one = batch_points(guess, 10)[0]
    assert (one.low, one.high) == pytest.approx((0.8 / 0.150, 1.25 / 0.150))
    assert band_meaning(guess).startswith("8 of 10 published times lie at 0.8 to 1.25")
    assert batch_points(replace(guess, head=Head()), 10)[0].low == pytest.approx(1 / 0.250)


def test_the_band_of_an_estimate_that_ships_reaches_the_table() -> None:
    shipped = load_profile(find_profile("h200-sdxl-estimated"))
    one = batch_points(shipped, 30)[0]
    assert one.low < 0.9 * one.images_per_s < one.images_per_s < one.high


def point(batch: int, images_per_s: float) -> BatchPoint:
    return BatchPoint("512x512", batch, images_per_s, 0, 0, batch / images_per_s)


def test_the_smallest_batch_with_95_percent_of_what_the_limit_permits_is_chosen() -> None:
    points = [point(1, 1.0), point(2, 1.90), point(4, 1.99), point(8, 2.01)]
    # 95% of 2.01 is 1.9095: batch 4. Within 2 s batches 1 (1 s) and 2 (1.05 s) are left.
    assert best_point(points, None) == points[2]
    assert best_point(points, 2.0) == points[1]
    assert best_point(points, 0.5) is None
    assert "batching pays: batch 4 gives 1.99 images/s, 1.99x those of batch 1, at 2.01 s an image (at most 2.01x" in (
        sentence(points, None)
    )
    assert sentence(points, 0.5) == "512x512: no batch is served within 0.5 s; one image takes 1 s."
    flat = [point(1, 1.0), point(2, 1.02)]
    assert sentence(flat, None).startswith("512x512: batching does not pay: at most 1.02x at batch 2, so batch 1")


def test_the_command_answers_in_a_sentence_a_table_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_profile(tmp_path / "p", profile())
    command = [
        "profile",
        "batching",
        str(tmp_path / "p"),
        "--steps",
        "10",
        "--slo",
        "0.3",
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("512x512: batching pays within 0.3 s: batch 2 gives 8 images/s, 1.20x those of batch 1")
    assert "  512x512          2  8 (5 to 8)                 1.20  0.25  *" in said
    assert (tmp_path / "b" / "batching.png").is_file()
    odd = make_profile({1: 100}, {"whole": [50]})
    write_profile(tmp_path / "q", odd)
    assert main(["profile", "batching", str(tmp_path / "q"), "--out", str(tmp_path / "c")]) == 2
    assert "knows no step of two rows" in capsys.readouterr().err
