"""Sentences with numbers in README.md and docs/ say what the data beside them say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/validation.md"])
def test_what_the_cpu_validation_is_said_to_show_is_in_its_data(page: str) -> None:
    data = json.loads((ROOT / "docs/validation-digits-cpu/validation.json").read_text(encoding="utf-8"))
    medians = [
        case["metrics"][name]
        for case in data["cases"]
        for name in ("step_time_s", "decode_time_s", "request_throughput")
    ]
    within = sum(abs(metric["error"]) <= 0.15 for metric in medians)
    wholly = sum(metric["error_low"] >= -0.15 and metric["error_high"] <= 0.15 for metric in medians)
    ranges = [check for check in data["checks"] if check["allowed"].startswith("in the simulated range")]
    ends = [
        (1 + case["metrics"]["request_latency_mean_s"]["error"]) / ratio - 1
        for case in data["cases"]
        for ratio in case["of_simulated_range"]
    ]
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert f"{within} of {len(medians)} medians of step time, decode time and throughput lie within 15%" in text
    assert f"{wholly} with their whole 95% interval" in text
    assert f"{sum(check['passed'] for check in ranges)} of {len(ranges)} mean latencies" in text
    assert f"up to {min(ends):.0%} to {max(ends):+.0%}".replace("% to", " to") in text
