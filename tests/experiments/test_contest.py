"""Contests: scaled profiles, the file's messages, paired tables, and that nothing is computed twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from synerdiff.config.contest import load_contest
from synerdiff.core import InputError
from synerdiff.experiments import contest as contest_module
from synerdiff.experiments.contest import compute, contest_tasks, run_contest
from synerdiff.experiments.contest_report import write_report
from synerdiff.experiments.contest_tables import CellKey, cell_text, collect, headline_lines, shortfalls, winners
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.scaling import scaled_profile

TINY = """
name: tiny
report: winners
machines:
  - profiles: [h200-sdxl-estimated]
    contention: [0.5, 2]
    decode_gpus: [[0], [1]]
workloads:
  - {name: few, generator: poisson, parameters: {mix: unguided-4}}
policies:
  - {policy: continuous-serial}
  - {policy: auto}
  - {policy: auto, label: fewer, skip: false, steps_scale: 0.5}
baselines: [continuous-serial]
focus: auto
seeds: [1, 2]
requests: 60
search_requests: 30
saturation_images: 60
batches: [4, 8]
"""


class Here:
    """A backend without processes."""

    def run_unordered(self, function, items):
        return map(function, items)


def written(tmp_path: Path, text: str = TINY) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_scaling_a_profile_by_hand() -> None:
    base = load_profile(find_profile("h200-sdxl-estimated"))
    scaled = scaled_profile(base, 2.0, 3.0)
    assert scaled.name == "h200-sdxl-estimated+contention2+decode3"
    assert scaled.step_ns(8) == base.step_ns(8)
    assert scaled.chunk_ns("c4", 1) == 3 * base.chunk_ns("c4", 1)
    for new, old in zip(scaled.slowdown_ppm(8, "c4", 1), base.slowdown_ppm(8, "c4", 1), strict=True):
        assert new - 1_000_000 == 2 * (old - 1_000_000)
    assert scaled.content_hash != base.content_hash
    assert scaled_profile(base) is base
    measured = load_profile(find_profile("digits-cpu"))
    assert (measured.estimated, scaled_profile(measured, 2.0).estimated) == (False, True)
    with pytest.raises(InputError, match="contention must be at least 0 and decode above 0"):
        scaled_profile(base, -1.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("focus: auto", "focus: nobody", "focus is 'nobody', none of the policies: continuous-serial, auto, fewer"),
        ("baselines: [continuous-serial]", "baselines: [static]", "the baseline 'static' is none of the policies"),
        ("label: fewer", "label: auto", "two policies .give labels. are both 'auto'"),
        ("{policy: continuous-serial}", "{policy: continuous-serial, batch: 4}", "a contest searches the batch size"),
        (
            "steps_scale: 0.5",
            "steps_scale: 1.5",
            r"policies\[2\].steps_scale is 1.5; it must be less than or equal to 1",
        ),
        ("report: winners", "report: prose", "report is 'prose'"),
        (
            "report: winners",
            "skip_budget: {min_ssim: 0.97}\nreport: winners",
            "skip_budget: min_ssim belongs to a sweep; a contest takes fraction",
        ),
    ],
)
def test_messages_of_the_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    with pytest.raises(InputError, match=message):
        load_contest(written(tmp_path, TINY.replace(old, new)))


def test_a_policy_that_cannot_be_built_is_named_before_anything_runs(tmp_path: Path) -> None:
    for policy, message in (
        ("{policy: autp}", "autp"),
        ("{policy: auto, parameters: {size_weight: -1}}", "'auto': size_weight is -1; allowed is a number from 0"),
    ):
        contest = load_contest(written(tmp_path, TINY.replace("{policy: auto}", policy).replace("focus: auto\n", "")))
        with pytest.raises(InputError, match=message):
            contest_tasks(contest, tmp_path, tmp_path / "out")


def test_a_contest_from_file_to_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_contest(written(tmp_path))
    tasks = contest_tasks(found, tmp_path, tmp_path / "out")
    # Two levels of contention beside the steps, and one cell on a second GPU, where contention changes nothing.
    assert len(tasks) == 3 * 3
    rows = run_contest(tasks, Here())
    assert len(rows) == 9 * (2 + 2)
    assert {row["batch"] for row in rows} <= {4, 8}
    monkeypatch.setattr(contest_module, "compute", lambda task: pytest.fail("computed twice"))
    assert run_contest(tasks, Here()) == rows
    lines = write_report(found, rows, tmp_path / "out")
    assert any("auto is within 2% of the best of the others" in line for line in lines)
    for name in ("rows.csv", "figures/best-policy.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    tasks[0].path.write_text("{ torn", encoding="utf-8")
    monkeypatch.setattr(contest_module, "compute", compute)
    assert run_contest(tasks, Here()) == rows


def row(policy: str, seed: int, throughput: float | None, mean: float | None, skip: float = 0.0) -> dict[str, object]:
    cell = CellKey("p", 1.0, 1.0, "0", "w")._asdict()
    measure = {"load": None, "image_throughput": throughput} if mean is None else {"load": 0.8}
    latencies = {"request_latency_mean_s": mean, "request_latency_p99_s": mean}
    return {**cell, "estimated": False, "policy": policy, "seed": seed, "skip_fraction": skip, **measure, **latencies}


def test_tables_by_hand() -> None:
    rows = [row("base", s, 2.0 * s, None) for s in (1, 2)] + [row("good", s, 3.0 * s, None, 0.25) for s in (1, 2)]
    rows += [row("base", s, None, 4.0) for s in (1, 2)] + [row("good", s, None, 1.0) for s in (1, 2)]
    rows += [row("slow", s, 1.9 * s, None) for s in (1, 2)] + [row("slow", s, None, 4.1) for s in (1, 2)]
    results = collect(rows)
    cell = CellKey("p", 1.0, 1.0, "0", "w")
    assert results.gain(cell, "saturation", None, "good", "base").ratio == pytest.approx(1.5)
    assert results.gain(cell, "mean", 0.8, "good", "base").ratio == pytest.approx(4.0)
    found = {winner.measure: winner for winner in winners(results, ["base", "good", "slow"], ["base"], "slow")}
    assert (found["saturation"].policy, found["saturation"].gain) == ("good", pytest.approx(1.5))
    assert found["saturation"].focus_gain == pytest.approx(1.9 / 3)
    assert {winner.measure for winner in shortfalls(list(found.values()))} == {"saturation", "mean", "p99"}
    text = "\n".join(headline_lines(results, ["base", "good"], ["base"]))
    assert "| good | 1.50x [1.50, 1.50] | 25% |" in text
    assert "| good | -75% [-75%, -75%] | 0% |" in text
    assert "*up to -78.7%*" in text
    assert "*1.6x*" in text


def test_a_cell_in_words() -> None:
    assert cell_text(CellKey("p", 2.0, 4.0, "0", "w")) == "w on p, contention x2, decode x4"
    assert cell_text(CellKey("p", 2.0, 1.0, "1", "w")) == "w on p, decode on a second GPU"
