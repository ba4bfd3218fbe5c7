"""Comparisons of policies: paired tables by hand, ties, undone runs, saturation runs, maps and ablations of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synerdiff.config.experiment import load_experiment
from synerdiff.core import InputError
from synerdiff.experiments import sweep
from synerdiff.experiments.compare import GridCell, best_of_cells, compare, shortfalls
from synerdiff.experiments.grid import Grid, best_batch
from synerdiff.experiments.report import KINDS, publish
from synerdiff.experiments.sweep import Results, run_sweep
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.scaling import scaled_profile
from tests.golden.tables import Here

TINY = """
name: tiny
report: map
profiles: h200-sdxl-estimated
contention: [0.5, 2]
decode_gpus: [[0], [1]]
workloads:
  - {name: few, generator: poisson, parameters: {mix: unguided-4}}
policies:
  - {policy: continuous-serial}
  - {policy: auto}
  - {policy: auto, label: fewer, skip: false, steps_scale: 0.5}
baselines: continuous-serial
subject: auto
batch: best
seeds: [1, 2]
loads: 0.8
requests: 60
saturation: 60
batch_search: {batches: [4, 8], loads: 0.8, requests: 30}
"""
CELL = GridCell("p", 1.0, 1.0, "0", "", 1, "w", None)


def written(tmp_path: Path, text: str = TINY) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def grid(tmp_path: Path, *changes: tuple[str, str]) -> Grid:
    text = TINY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return Grid(load_experiment(written(tmp_path, text)), tmp_path, tmp_path / "out")


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
        ("subject: auto", "subject: nobody", "subject: 'nobody' is none of continuous-serial, auto, fewer"),
        ("baselines: continuous-serial", "baselines: [static]", "baselines: 'static' is none of continuous-serial"),
        ("baselines: continuous-serial", "baselines: []", "report is map, which needs baselines: some of continuous-"),
        ("label: fewer", "label: auto", "two policies .give labels. are both 'auto'"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "two seeds are both '1'"),
        ("contention: [0.5, 2]", "contention: [2, 2]", "two contention are both '2.0'"),
        ("contention: [0.5, 2]", "contention: []", "contention is empty; at least one entry is needed"),
        ("[[0], [1]]", "[[0], [0]]", r"two decode_gpus are both '\[0\]'"),
        ("[[0], [1]]", "[[0], []]", "decode_gpus holds an empty list"),
        ("steps_scale: 0.5", "steps_scale: 1.5", r"policies\[2\].steps_scale is 1.5; it must be less than or equal to"),
        ("report: map", "report: prose", "report is 'prose'"),
        ("profiles: h200", "machines: [{profiles: x}]\nprofiles: h200", "machines holds the blocks of contention, dec"),
        ("saturation: 60", "saturation: 0", "saturation is 0; it must be greater than or equal to 1"),
    ],
)
def test_messages_of_the_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    with pytest.raises(InputError, match=message):
        load_experiment(written(tmp_path, TINY.replace(old, new)))


def test_duplicate_workloads_are_refused(tmp_path: Path) -> None:
    line = "  - {name: few, generator: poisson, parameters: {mix: unguided-4}}\n"
    with pytest.raises(InputError, match="two workloads are both 'few'"):
        load_experiment(written(tmp_path, TINY.replace(line, 2 * line)))


def test_a_batch_that_a_policy_states_is_not_searched(tmp_path: Path) -> None:
    made = grid(tmp_path, ("{policy: auto}", "{policy: auto, parameters: {batch: 3}}"))
    assert {place.policy for place in made.searches} == {"continuous-serial", "fewer"}
    runs = made.runs(dict.fromkeys(made.searches, 4))
    assert {run.spec.parameters["batch"] for run in runs if run.label == "auto"} == {3}


def test_blocks_of_machines_are_cells_once(tmp_path: Path) -> None:
    block = "contention: [0.5, 2]\ndecode_gpus: [[0], [1]]\n"
    blocks = (
        "machines:\n  - {profiles: digits-cpu}\n"
        "  - {profiles: [digits-cpu, h200-sdxl-estimated], decode_share: [1, 2], decode_gpus: [0, 1]}\n"
    )
    made = grid(tmp_path, ("profiles: h200-sdxl-estimated\n", blocks), (block, ""))
    cells = [(cell.profile, cell.decode_share, cell.decode_gpus) for _, cell, _ in made.cells]
    assert cells == [
        ("digits-cpu", 1.0, "0"),
        ("digits-cpu", 1.0, "0,1"),
        ("digits-cpu", 2.0, "0,1"),
        ("h200-sdxl-estimated", 1.0, "0,1"),
        ("h200-sdxl-estimated", 2.0, "0,1"),
    ]


def test_a_policy_that_cannot_be_built_is_named_before_anything_runs(tmp_path: Path) -> None:
    for policy, message in (
        ("{policy: autp}", "autp"),
        ("{policy: auto, parameters: {size_weight: -1}}", "'auto': size_weight is -1; allowed is a number from 0"),
    ):
        with pytest.raises(InputError, match=message):
            grid(tmp_path, ("{policy: auto}", policy), ("subject: auto\n", ""))


def test_a_map_from_file_to_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = grid(tmp_path)
    # Two levels of contention beside the steps, and one cell on a second GPU, where contention changes nothing.
    assert made.size == 3 * 3 * 2 * 2
    results = run_sweep(made, Here())
    assert len(results.rows) == 36
    assert {row["batch"] for row in results.rows} <= {4, 8}
    assert {
        row["load"] is None
        for row in results.rows
        if row["saturation_throughput" if "saturation_throughput" in row else "load"]
    } == {True, False}
    for choice in results.batches:
        tried = choice["saturation_throughput" if choice["load"] is None else "request_latency_mean_s"]
        assert choice["best_batch"] == best_batch(tried, larger_is_better=choice["load"] is None)
    monkeypatch.setattr(sweep, "compute", lambda run: pytest.fail("computed twice"))
    assert run_sweep(made, Here()).rows == results.rows
    lines = publish(made.experiment, results)
    assert any("auto is within 2% of the best of the others" in str(line) for line in lines)
    assert str(lines[-2]).endswith("figures: 1 figures, 1 drawn now")
    assert (tmp_path / "out" / "figures" / "best-policy.png").stat().st_size > 0
    assert (
        "| few on h200-sdxl-estimated, contention x0.5 | saturation | - | " in (tmp_path / "out" / "map.md").read_text()
    )
    assert str(publish(made.experiment, results)[-2]).endswith("figures: 1 figures, 0 drawn now")
    results.rows[0]["request_latency_mean_s"] += 1.0
    assert str(publish(made.experiment, results)[-2]).endswith("figures: 1 figures, 1 drawn now")
    (tmp_path / "out" / "figures" / "best-policy.png").unlink()
    assert str(publish(made.experiment, results)[-2]).endswith("figures: 1 figures, 1 drawn now")


@pytest.mark.parametrize("kind", ["comparison", "ablation", "curves"])
def test_the_same_rows_as_another_report(tmp_path: Path, kind: str) -> None:
    changes = (("report: map", f"report: {kind}"), ("subject: auto\n", ""), ("[0.5, 2]", "1"), ("[[0], [1]]", "0"))
    made = grid(tmp_path, *changes[:3], ("[[0], [1]]", "[0]"))
    results = run_sweep(made, Here())
    report = KINDS[kind](made.experiment, results)
    text = "\n".join(map(str, report.parts))
    shown = {
        "comparison": "### Throughput at saturation: few on h200-sdxl-estimated",
        "ablation": "| few on h200-sdxl-estimated | mean | 0.8 | continuous-serial | +0.0% [+0.0%, +0.0%] | 0% |",
        "curves": "few on h200-sdxl-estimated (estimated), means over 2 runs",
    }
    assert shown[kind] in text
    assert ("all wait" in text) is (kind == "curves")
    for name, draw in report.figures.items():
        assert draw().axes, name


def row(policy: str, seed: int, throughput: float | None, mean: float | None, skip: float = 0.0) -> dict[str, Any]:
    measure = {"load": None, "saturation_throughput": throughput} if mean is None else {"load": 0.8}
    latencies = {"request_latency_mean_s": mean, "request_latency_p99_s": mean}
    marks = {"estimated": False, "policy": policy, "seed": seed, "skip_fraction": skip}
    return {**CELL._asdict(), **marks, **measure, **latencies}


def test_tables_by_hand(tmp_path: Path) -> None:
    rows = [row("base", s, 2.0 * s, None) for s in (1, 2)] + [row("good", s, 3.0 * s, None, 0.25) for s in (1, 2)]
    rows += [row("base", s, None, 4.0) for s in (1, 2)] + [row("good", s, None, 1.0) for s in (1, 2)]
    rows += [row("slow", s, 1.9 * s, None) for s in (1, 2)] + [row("slow", s, None, 4.1) for s in (1, 2)]
    paired = compare(rows)
    gains = [paired.gain(CELL, at, "good", "base") for at in (("saturation", None), ("mean", 0.8))]
    assert [gain.ratio for gain in gains if gain] == [pytest.approx(1.5), pytest.approx(4.0)]
    best = {each.measure: each for each in best_of_cells(paired, ["base", "good", "slow"], ["base"], "slow")}
    saturated = best["saturation"]
    assert (saturated.policy, saturated.gain.ratio, saturated.ties) == ("good", pytest.approx(1.5), ())  # type: ignore[comparison-overlap]
    assert saturated.subject_gain is not None
    assert saturated.subject_gain.ratio == pytest.approx(1.9 / 3)
    assert {each.measure for each in shortfalls(best.values(), 0.02)} == {"saturation", "mean", "p99"}
    policies = TINY.replace("auto", "good", 1).replace("continuous-serial", "base")
    text = (
        policies[: policies.index("policies:")] + "policies:\n  - {policy: base}\n  - {policy: good}\nbaselines: base\n"
    )
    experiment = load_experiment(written(tmp_path, text.replace("report: map", "report: comparison")))
    shown = KINDS["comparison"](experiment, Results(tmp_path, [each for each in rows if each["policy"] != "slow"]))
    assert "| good | 1.50x [1.50, 1.50] | 25% |" in shown.parts
    assert "| good | -75% [-75%, -75%] | 0% |" in shown.parts
    assert "| *the paper's claim* | *up to -78.7%* | |" in shown.parts
    assert "| *the paper's claim* | *1.6x* | |" in shown.parts


def test_what_the_interval_does_not_tell_apart_is_tied() -> None:
    rows = [row("base", s, None, x) for s, x in ((1, 1.0), (2, 1.2), (3, 1.1))]
    rows += [row("near", s, None, x) for s, x in ((1, 1.05), (2, 1.1), (3, 1.12))]
    rows += [row("far", s, None, x) for s, x in ((1, 0.5), (2, 0.6), (3, 0.55))]
    (best, *_) = best_of_cells(compare(rows), ["base", "near"], ["base"], "far")
    # log ratios near / base: 0.0488, -0.0870, 0.0180; mean -0.0067, s 0.0712, t(2) 4.303: +-0.1769.
    assert (best.policy, best.ties) == ("near", ("base",))
    assert best.gain.ratio == pytest.approx(1.0067, abs=2e-4)
    assert (best.gain.low, best.gain.high) == (pytest.approx(0.843, abs=2e-3), pytest.approx(1.2016, abs=2e-3))  # type: ignore[comparison-overlap]
    assert best.subject_gain is not None
    assert best.subject_gain.low > 1


def test_a_policy_without_a_finished_request_is_never_best() -> None:
    rows = [row("base", s, None, 4.0) for s in (1, 2)] + [row("rejects", 1, None, 1.0), row("rejects", 2, None, 1.0)]
    rows[-1]["request_latency_mean_s"] = rows[-1]["request_latency_p99_s"] = None
    paired = compare(rows)
    assert paired.gain(CELL, ("mean", 0.8), "rejects", "base") is None
    assert {each.policy for each in best_of_cells(paired, ["base", "rejects"], ["base"])} == {"base"}


def test_the_best_batch_by_hand() -> None:
    assert best_batch({8: 1.5, 4: 1.5, 16: 2.0}) == 4
    assert best_batch({4: None, 8: 3.0, 16: 3.1}) == 8
    assert best_batch({4: 2.0, 8: 2.5, 16: 2.5}, larger_is_better=True) == 8
    assert best_batch({4: None, 8: 0.1}, larger_is_better=True) == 8
    assert best_batch({8: None, 4: None}) == 4


def test_a_cell_in_words() -> None:
    assert CELL._replace(contention=2.0, decode_share=4.0).text == "w on p, contention x2, decode x4"
    assert CELL._replace(contention=2.0, decode_gpus="1").text == "w on p, decode on a second GPU"
    fleet = CELL._replace(fleet="pair", decode_gpus="", gpus=4, lora_share=0.5)
    assert fleet.text == "w, 50% with LoRAs on p, pair on 4 GPUs"
