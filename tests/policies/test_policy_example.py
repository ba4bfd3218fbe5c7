"""The example of docs/writing-policies.md is complete: it runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from policies.registry import build_policy
from simulator import simulate
from tests.builders import affine_profile, requests_at

DOCUMENT = Path(__file__).parents[2] / "docs" / "writing-policies.md"


def test_the_documented_policy_serves_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(from synerdiff.core.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    code = found.group(1)
    body = [line for line in code.splitlines() if line.strip()]
    assert len(body) <= 22
    (tmp_path / "documented_policy.py").write_text(code)
    monkeypatch.setattr(sys, "path", list(sys.path))
    policy = build_policy("documented_policy:ShortestFirst", {"batch": 2}, tmp_path)
    requests = requests_at(0, 0, 0, 0, steps=9) + requests_at(0, steps=2)
    requests = [
        request.__class__(i, r.arrival_ns, r.steps)
        for i, (request, r) in enumerate(zip(requests, requests, strict=True))
    ]
    result = simulate(requests, policy, affine_profile())
    assert [record.status for record in result.requests] == ["done"] * 5
    assert min(result.requests, key=lambda record: record.finished_ns).request.request_id == 4
