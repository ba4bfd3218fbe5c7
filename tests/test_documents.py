"""Sentences with numbers in README.md and docs/ say what the data beside them say."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median, stdev

import pytest

from synerdiff.validation.errors import JUDGED, METRICS, judged

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/validation.md"])
def test_what_the_cpu_validation_is_said_to_show_is_in_its_data(page: str) -> None:
    data = json.loads((ROOT / "docs/validation-digits-cpu/validation.json").read_text(encoding="utf-8"))
    counts = Counter((check["what"], check["verdict"]) for check in data["checks"])
    for case in data["cases"]:
        for name in JUDGED:
            metric = case["metrics"][name]
            verdict = judged(metric["error_low"], metric["error_high"], 0.15)
            label = f"{case['policy']} at load {case['load']}"
            checks = {(one["case"], one["what"]): one["verdict"] for one in data["checks"]}
            assert checks[label, METRICS[name][0]] == verdict, "the data says what follows from its intervals"
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    verdicts = Counter(check["verdict"] for check in data["checks"])
    assert len(data["cases"]) == 22 == 2 * len(data["policies"])
    assert verdicts["failed"] == 0
    kinds = [METRICS[name][0] for name in JUDGED]
    passed = [counts[kind, "passed"] for kind in kinds]
    if page == "README.md":
        assert (
            "{} of 22 step times, {} of 22 decode times, {} of 22 throughputs and {} of 22 mean".format(*passed) in text
        )
        assert f"the other {verdicts['unclear']} are unclear, none fails" in text
        return
    assert f"{verdicts['passed']} checks pass, {verdicts['unclear']} are unclear, none fails" in text
    for kind in kinds:
        assert f"| {kind} | {counts[kind, 'passed']} | {counts[kind, 'unclear']} | 0 |" in text


def test_what_the_rule_for_pairs_of_resolutions_is_said_to_be_worth_is_in_its_data() -> None:
    with (ROOT / "docs/data/across-digits-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        pairs.setdefault(tuple(list(row.values())[1:6]), []).append(row)
    assert [len(of_pair) for of_pair in pairs.values()] == [2] * 40

    def logs(side: str) -> list[list[float]]:
        return [[math.log(int(row[f"{side}_slowdown_ppm"]) / 1e6) for row in of_pair] for of_pair in pairs.values()]

    def off(side: str) -> list[float]:
        rule = [[math.log(int(row[f"{side}_by_rule_ppm"]) / 1e6) for row in of_pair] for of_pair in pairs.values()]
        return [fmean(r) - fmean(m) for r, m in zip(rule, logs(side), strict=True)]

    def mean(values: list[float]) -> tuple[str, str, str]:
        half = 2.0227 * stdev(values) / math.sqrt(len(values))  # t, 39 degrees of freedom
        middle, low, high = (f"{100 * math.expm1(fmean(values) + h):+.1f}" for h in (0, -half, half))
        return middle, low, high

    def typical(values: Iterable[float]) -> float:
        return 100 * median(abs(math.expm1(value)) for value in values)

    text = " ".join((ROOT / "docs/profiling.md").read_text(encoding="utf-8").split())
    for side, said in (("step", "{}% off for steps (95%: {} to {}%,"), ("chunk", "{}% off for chunks ({} to {}%;")):
        assert said.format(*mean(off(side))) in text
    nothing = [mean([-fmean(m) for m in logs(side)])[0] for side in ("step", "chunk")]
    assert f"no contention at all would be {nothing[0]}%" in text
    assert f"no contention: {nothing[1]}%" in text
    single = [typical(off(side)) for side in ("step", "chunk")]
    assert "off by {:.1f}% in the median for steps and by {:.1f}% for chunks".format(*single) in text
    again = [typical(m[0] - m[1] for m in logs(side)) for side in ("step", "chunk")]
    assert "the same pair differ by {:.1f} and {:.1f}%".format(*again) in text
