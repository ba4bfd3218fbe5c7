"""The fidelity table that ships: made with the weights that ship, usable as a floor, and quoted right in the docs."""

from __future__ import annotations

import csv
import re
from functools import lru_cache
from pathlib import Path

import pytest

from synerdiff import cli
from synerdiff.core import GUIDED, InputError
from synerdiff.diffusion import MODELS
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.fidelity.floor import UnreachedFloor, budget_from_floor
from synerdiff.fidelity.sampling import MEASURE, fingerprint
from synerdiff.fidelity.table import read_fidelity

ROOT = Path(__file__).resolve().parents[2]
TABLE = read_fidelity(MODELS / "digits")
SCORES = {(row.solver, row.steps, row.guidance_scale, row.rule): row for row in TABLE.rows}
SETTINGS = sorted({key[:3] for key in SCORES})
SOLVERS = {"DDIM": "DDIMScheduler", "DPM++ 2M": "DPMSolverMultistepScheduler"}


@lru_cache(maxsize=1)
def comparisons() -> dict[tuple[str, int, float, str, str, str], tuple[float, float, float]]:
    with (MODELS / "digits" / "fidelity-comparisons.csv").open() as file:
        return {
            (
                line["solver"],
                int(line["steps"]),
                float(line["guidance_scale"]),
                line["rule"],
                line["against"],
                line["images"],
            ): (
                float(line["difference"]),
                float(line["low"]),
                float(line["high"]),
            )
            for line in csv.DictReader(file)
        }


def section(title: str) -> str:
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    return text.split(f"\n### {title}\n")[1].split("\n##")[0]


def cells(text: str) -> list[list[str]]:
    """The cells of every line of a table, headings left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(cell: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?\d+\.\d+", cell)]


def test_the_table_is_of_the_weights_that_ship() -> None:
    model = load_model("digits")
    assert TABLE.head["weights_sha256"] == fingerprint(model, model.prompts.default_prompt(TABLE.head["first_seed"]))
    assert TABLE.head["measure"] == MEASURE
    assert (TABLE.model, TABLE.resolution, TABLE.solver) == ("digits", 32, model.solver.scheduler_name)


@pytest.mark.parametrize(("title", "steps"), [("From the fewest sufficient steps", 10), ("From 25 steps", 25)])
def test_the_tables_of_the_documentation(title: str, steps: int) -> None:
    shown = [line for line in cells(section(title)) if line[0].startswith("`")]
    found = {key[3] for key in SCORES if key[:3] == ("DDIMScheduler", steps, 4.0)}
    assert [line[0].strip("`") for line in shown] == [
        row.rule for row in TABLE.rows if (row.solver, row.steps, row.guidance_scale) == ("DDIMScheduler", steps, 4.0)
    ]
    assert len(shown) == len(found) > 20
    for rule, rows, n, ssim, psnr_db, recognised in shown:
        row = SCORES["DDIMScheduler", steps, 4.0, rule.strip("`")]
        assert rows == f"{row.rows_share:.0%}"
        assert int(n) == row.n
        assert numbers(ssim) == [round(value, 4) for value in (row.ssim, row.ssim_low, row.ssim_high)]
        assert numbers(psnr_db) == [pytest.approx(row.psnr_db, abs=0.051)]
        assert numbers(recognised) == [pytest.approx(row.recognised, abs=0.00051)]


def test_the_fewest_sufficient_steps_of_the_documentation() -> None:
    entry = next(e for e in TABLE.head["converged"] if (e["solver"], e["guidance_scale"]) == ("DDIMScheduler", 4.0))
    text = " ".join(section("From the fewest sufficient steps").split())
    assert f"are **{entry['steps']}** ({entry['n']} images; " in text
    for steps, ssim in entry["ssim_against_4_times_as_many"].items():
        assert re.search(rf"\b{steps}( steps)?: {ssim:.4f}", text)


def test_wins_and_losses_of_the_documentation() -> None:
    """Every setting is there, with the closest rule of its cost and its comparison on the same images."""
    shown = cells(section("The best rule at a given cost, against fewer steps"))[1:]
    settings = set()
    for setting, rows, rule, ssim, baseline, baseline_ssim, difference, verdict in shown:
        solver, steps, scale = setting.split(", ")
        key = (SOLVERS[solver], int(steps.removesuffix(" steps")), float(scale))
        settings.add(key)
        row, against = SCORES[(*key, rule.strip("`"))], baseline.strip("`")
        same = [r for r in TABLE.rows if (*r[:3],) == key and r.skipped_steps and r.rows == row.rows]
        assert row == max(same, key=lambda r: r.ssim)
        assert rows == f"{row.rows_share:.0%}"
        assert 2 * SCORES[(*key, against)].run_steps <= row.rows
        assert numbers(ssim) + numbers(baseline_ssim) == [round(row.ssim, 4), round(SCORES[(*key, against)].ssim, 4)]
        found = comparisons()[(*key, row.rule, against, "held out" if row.held_out else "all")]
        assert numbers(difference) == [round(value, 4) for value in found]
        assert verdict == ("wins" if found[1] > 0 else "loses" if found[2] < 0 else "level")
    assert sorted(settings) == SETTINGS


def test_dropping_guidance_loses_everywhere() -> None:
    found = [line for key, line in comparisons().items() if key[3].startswith("conditional-")]
    assert len(found) > 3 * len(SETTINGS) - 10
    assert all(high < 0 for _, _, high in found)


def test_the_conventions_of_the_documentation() -> None:
    with (ROOT / "docs" / "data" / "ssim-conventions.csv").open() as file:
        measured = {line["rule"]: line for line in csv.DictReader(file)}
    shown = cells(section("Other conventions of SSIM"))[1:]
    assert len(shown) == len(measured) == 17
    for rule, *values in shown:
        columns = ("gaussian_0_1", "gaussian_range_2", "uniform_range_2")
        for cell, column in zip(values, columns, strict=True):
            assert float(cell) == pytest.approx(float(measured[rule.strip("`")][column]), abs=0.00051)


def test_the_second_training_seed_of_the_documentation() -> None:
    """The ranking of the rules, and calibrated reuse against fewer steps, on a model trained from another seed."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    folder = ROOT / "docs" / "data"
    with (folder / "fidelity-second-seed.csv").open() as file:
        again = {line["rule"]: line for line in csv.DictReader(file)}
    with (folder / "fidelity-second-seed-comparisons.csv").open() as file:
        compared = {(x["rule"], x["against"], x["images"]): x for x in csv.DictReader(file)}
    setting = ("DDIMScheduler", 25, 4.0)
    rules = [key[3] for key in SCORES if key[:3] == setting and key[3] != "full-25"]
    text = " ".join(section("A second training seed").split())
    assert f"ranking of the {len(rules)} rules" in text
    by_ssim = spearmanr([SCORES[(*setting, r)].ssim for r in rules], [float(again[r]["ssim"]) for r in rules]).statistic
    by_psnr = spearmanr([SCORES[(*setting, r)].psnr_db for r in rules], [float(again[r]["psnr_db"]) for r in rules])
    assert f"rank correlation {by_ssim:.2f} in SSIM and {by_psnr.statistic:.3f} in PSNR" in text
    assert max(abs(SCORES[(*setting, r)].ssim - float(again[r]["ssim"])) for r in rules) < 0.0115
    shown = cells(section("A second training seed"))[1:]
    assert len(shown) == 5
    for rule, ssim, ssim_again, baseline, difference, difference_again in shown:
        pair = (rule.strip("`"), baseline.strip("`"))
        assert numbers(ssim) == [round(SCORES[(*setting, pair[0])].ssim, 4)]
        assert float(ssim_again) == pytest.approx(float(again[pair[0]]["ssim"]), abs=0.000051)
        assert numbers(difference) == [round(value, 4) for value in comparisons()[(*setting, *pair, "held out")]]
        found = compared[(*pair, "held out")]
        assert numbers(difference_again) == [round(float(found[name]), 4) for name in ("difference", "low", "high")]


def test_the_latencies_of_the_documentation() -> None:
    shown = cells(section("Latency, throughput and fidelity"))[1:]
    assert len(shown) == 8
    with (ROOT / "docs" / "data" / "fidelity-latency-digits-cpu.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["load"] == "1.1"]
    for served, ssim, cell in shown:
        policy = "skip always" if served.endswith("always") else "skip while samples wait"
        if served.endswith("full guidance"):
            policy = "fewer steps, full guidance"
        own = [line for line in lines if (line["policy"], line["variant"]) == (policy, served.split(",")[0].strip("`"))]
        assert len(own) == 3
        metrics = ("ssim", "request_latency_p99_s", "request_throughput")
        mean = {name: sum(float(line[name]) for line in own) / 3 for name in metrics}
        p99_s, rate = numbers(cell)
        assert p99_s == pytest.approx(mean["request_latency_p99_s"], abs=0.0051)
        assert rate == pytest.approx(mean["request_throughput"], abs=0.051)
        assert float(ssim) == pytest.approx(mean["ssim"], abs=0.000051)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_floor_works_for_every_setting(setting: tuple[str, int, float]) -> None:
    solver, steps, scale = setting
    choice = budget_from_floor(TABLE, 0.95, [(steps, scale)], "digits", 32, solver)
    rule = choice.rules[steps]
    assert rule.ssim_low >= 0.95
    assert choice.budget.eligible_steps == {steps: frozenset(rule.skipped_steps)}  # type: ignore[arg-type]
    cheaper = [
        r for r in TABLE.rows if (*r[:3],) == setting and r.mode != GUIDED and r.skipped_steps and r.rows < rule.rows
    ]
    assert all(row.ssim_low < 0.95 for row in cheaper)
    with pytest.raises(UnreachedFloor, match=f"no rule for {steps} steps reaches an SSIM of 0.99999"):
        budget_from_floor(TABLE, 0.99999, [(steps, scale)], "digits", 32, solver)


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting[0] == TABLE.solver])
def test_simulated_runs_keep_the_floor(
    setting: tuple[str, int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, steps, scale = setting
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"{i * 0.05:.2f},{steps},{scale}\n" for i in range(20))
    (tmp_path / "t.csv").write_text("arrival_s,steps,guidance_scale\n" + lines)
    arguments = ["simulate", "--profile", "digits-cpu", "--trace", "t.csv", "--policy", "load-skip", "--out", "out"]
    assert cli.main([*arguments, "--min-ssim", "0.95"]) == 0
    assert f"{steps} steps: reuse-" in capsys.readouterr().out
    assert cli.main([*arguments, "--min-ssim", "0.99999"]) == 2
    assert "reaches an SSIM of 0.99999" in capsys.readouterr().err


def test_what_the_shipped_table_does_not_cover() -> None:
    with pytest.raises(InputError, match="does not cover 33 steps at guidance scale 4 with DDIMScheduler; it has"):
        budget_from_floor(TABLE, 0.95, [(33, 4.0)], "digits", 32)
    with pytest.raises(InputError, match="it has nothing with that solver"):
        budget_from_floor(TABLE, 0.95, [(25, 4.0)], "digits", 32, "EulerDiscreteScheduler")
    with pytest.raises(InputError, match="is of model 'digits'; the profile is of 'sdxl'"):
        budget_from_floor(TABLE, 0.95, [(25, 4.0)], "sdxl", 1024)
