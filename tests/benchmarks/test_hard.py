"""A tenth of the soak and three of the kills, each time the suite runs."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import kills, soak_policies


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_random_policies_lose_nothing_on_either_engine(first: int) -> None:
    seen: Counter[str] = Counter()
    wrong = {seed: said for seed in range(first, first + 500) if (said := soak_policies.trial(seed, seen))}
    assert wrong == {}
    assert set(seen) >= {"legal: a result", "wild: ContractError", "wild: a result", "interrupted: a result"}


def test_a_trial_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    seeds = [seed for seed in range(40) if soak_policies.trial(seed, seen) == ""]
    assert len(seeds) == 40
    monkeypatch.setattr(soak_policies, "simulate", lambda *_, **__: 1 / 0)
    said = {soak_policies.trial(seed, seen) for seed in seeds}
    assert said == {"", "ZeroDivisionError: division by zero"}
    assert threading.active_count() < 50


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, dict[str, str]]:
    folder = tmp_path_factory.mktemp("kills")
    return folder, *kills.undisturbed("sweep", folder)


@pytest.mark.parametrize("number", range(3))
def test_a_killed_sweep_goes_on_to_the_same_bytes(sweep: tuple[Path, float, dict[str, str]], number: int) -> None:
    folder, took_s, whole = sweep
    after_s = random.Random(number).uniform(0, 0.6 * took_s)
    assert len(whole) >= 20
    assert kills.trouble("sweep", folder, folder / f"sweep{number}", after_s, whole) == ""


def test_kills_are_judged(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.parquet").write_text("a")
    before = kills.contents(tmp_path)
    (tmp_path / "runs" / "b.parquet.part").write_text("half")
    assert kills.contents(tmp_path) == before
    (tmp_path / "runs" / "a.parquet").write_text("b")
    assert kills.contents(tmp_path) != before
