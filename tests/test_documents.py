"""Sentences with numbers in README.md and docs/ say what the data beside them say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

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
    assert verdicts["failed"] == 0
    kinds = [METRICS[name][0] for name in JUDGED]
    passed = [counts[kind, "passed"] for kind in kinds]
    if page == "README.md":
        assert "{} of 8 step times, {} of 8 decode times, {} of 8 throughputs and {} of 8 mean".format(*passed) in text
        assert f"the other {verdicts['unclear']} are unclear, none fails" in text
        return
    assert f"{verdicts['passed']} checks pass, {verdicts['unclear']} are unclear, none fails" in text
    for kind in kinds:
        assert f"| {kind} | {counts[kind, 'passed']} | {counts[kind, 'unclear']} | 0 |" in text
