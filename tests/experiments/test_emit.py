"""The rules that engines are given: as SGLang and vllm-omni read them, by their own rules."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml

from synerdiff import __version__, cli
from synerdiff.core import InputError
from synerdiff.experiments.emit import Choice, batches, check_engine, emit
from synerdiff.profile.folder import combined, find_profile, load_profile
from synerdiff.profile.tables import Profile, Spread
from tests.builders import affine_profile

RULE_KEYS = {
    "model",
    "model_contains",
    "resolution",
    "device_memory_gb_min",
    "max_batch_size",
    "max_cost",
    "calibration",
}
"""What a rule of SGLang's ``--batching-config`` may hold; any other key fails there."""


def passes_sglang(text: str) -> list[dict[str, Any]]:
    """The rules, if SGLang takes the file: one of model and model_contains, a max_batch_size, known keys only."""
    document = json.loads(text)
    assert set(document) == {"schema_version", "rules"}
    assert document["schema_version"] == 1
    rules: list[dict[str, Any]] = document["rules"]
    assert rules
    for rule in rules:
        assert set(rule) <= RULE_KEYS
        assert ("model" in rule) + ("model_contains" in rule) == 1
        assert type(rule["max_batch_size"]) is int
        assert rule["max_batch_size"] >= 1
        if "resolution" in rule:
            width, height = map(int, rule["resolution"].split("x"))
            assert min(width, height) > 0
    return rules


def vllm_omni_batch(options: dict[str, Any], height: int, width: int) -> int:
    """The batch that vllm-omni takes at a resolution."""
    budget = options["diffusion_batching_config"]["compute_unit_budget"]
    return int(min(options["max_num_seqs"], ceil(budget / (height / 16 * width / 16))))


def choice(profile: Profile, batch: int | None = 6) -> Choice:
    return Choice(profile, batch, 2, {"policy": "auto", "slo": "p99=10s"})


def emitted(engine: str, own: Choice, folder: Path) -> str:
    (path,) = emit(engine, [own], folder)
    return path.read_text()


@pytest.fixture
def h200() -> Profile:
    return load_profile(find_profile("h200-sdxl-estimated"))


def test_sglang_gets_a_rule_per_resolution_with_what_it_rests_on(h200: Profile, tmp_path: Path) -> None:
    (rule,) = passes_sglang(emitted("sglang", choice(h200), tmp_path))
    assert rule["model_contains"] in "stabilityai/stable-diffusion-xl-base-1.0"
    assert (rule["resolution"], rule["max_batch_size"]) == ("1024x1024", 6)
    known = rule["calibration"]
    assert known["synerdiff"] == __version__
    assert known["profile"] == "h200-sdxl-estimated"
    assert known["slo"] == "p99=10s"
    assert "error_band" in known


def test_a_checkpoint_by_its_hub_name_is_the_model_itself(h200: Profile, tmp_path: Path) -> None:
    h200.head = h200.head.model_copy(update={"model": "Qwen/Qwen-Image", "resolutions": ((512, 768),)})
    (rule,) = passes_sglang(emitted("sglang", choice(h200), tmp_path))
    assert rule["model"] == "Qwen/Qwen-Image"
    assert rule["resolution"] == "768x512", "WIDTHxHEIGHT"


def test_vllm_omni_gets_a_budget_that_gives_the_batch(h200: Profile, tmp_path: Path) -> None:
    text = emitted("vllm-omni", choice(h200), tmp_path)
    options = yaml.safe_load(text)
    assert set(options) == {"max_num_seqs", "diffusion_batching_config"}
    assert options["diffusion_batching_config"] == {"compute_unit_budget": 6 * 64 * 64}
    assert vllm_omni_batch(options, 1024, 1024) == 6
    assert f'# synerdiff: "{__version__}"' in text
    assert "# error_band:" in text


def test_with_several_resolutions_no_batch_is_above_the_one_that_was_simulated(tmp_path: Path) -> None:
    small, large = affine_profile(), affine_profile()
    for one, side in ((small, 512), (large, 1024)):
        one.head = one.head.model_copy(update={"model": "sdxl", "resolutions": ((side, side),)})
    rows = {rows: time for rows, time in large.steps.items() if rows <= 8}
    large = replace(large, steps=rows, row_buckets=tuple(rows))
    profile = combined([small, large], "both")
    assert batches(choice(profile)) == {(512, 512): 6, (1024, 1024): 4}
    rules = passes_sglang(emitted("sglang", choice(profile), tmp_path))
    assert {rule["resolution"]: rule["max_batch_size"] for rule in rules} == {"512x512": 6, "1024x1024": 4}
    options = yaml.safe_load(emitted("vllm-omni", choice(profile), tmp_path))
    assert vllm_omni_batch(options, 512, 512) == 6
    assert vllm_omni_batch(options, 1024, 1024) <= 4


def test_several_cards_get_a_file_each(h200: Profile, tmp_path: Path) -> None:
    other = replace(h200, name="other")
    paths = emit("vllm-omni", [choice(h200), choice(other)], tmp_path)
    assert [path.name for path in paths] == [f"vllm-omni-batching-{own.name}.yaml" for own in (h200, other)]
    assert '# profile: "other"' in paths[1].read_text()


def test_the_band_is_the_profiles_own(h200: Profile, tmp_path: Path) -> None:
    h200.head = h200.head.model_copy(update={"notes": {"band": {"low": 0.9, "high": 1.2}}})
    (rule,) = passes_sglang(emitted("sglang", choice(h200), tmp_path))
    assert rule["calibration"]["error_band"] == {"low": 0.9, "high": 1.2}
    h200.head = h200.head.model_copy(update={"notes": {}})
    h200.provenance, h200.steps = "measured", {2: Spread(100, 90, 104, 9), 4: Spread(200, 198, 210, 9)}
    (rule,) = passes_sglang(emitted("sglang", choice(h200), tmp_path))
    band = rule["calibration"]["error_band"]
    assert (band["low"], band["high"]) == (0.9, 1.1)


def test_what_cannot_be_emitted_is_refused_before_any_work(
    h200: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"^--emit is 'triton'; allowed are sglang and vllm-omni\.$"):
        check_engine("triton", [h200])
    with pytest.raises(InputError, match=r"^--emit sglang: profile 'test' names no model, which its rules need\.$"):
        check_engine("sglang", [affine_profile()])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("arrival_s,steps\n0,4\n1,4\n")
    asked = ["--trace", "t.csv", "--profile", "h200-sdxl-estimated", "--slo", "p99=60s", "--gpus", "1..2"]
    assert cli.main(["capacity", *asked, "--emit", "triton"]) == 2
    assert "allowed are sglang and vllm-omni" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_capacity_emits_the_batch_of_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("arrival_s,steps\n" + "".join(f"{i},4\n" for i in range(12)))
    asked = ["--trace", "t.csv", "--profile", "h200-sdxl-estimated", "--slo", "p99=60s", "--gpus", "1..2"]
    policy = ["--policy", "continuous-serial", "--batch", "4", "--emit", "sglang", "--jobs", "1", "--out", "out"]
    assert cli.main(["capacity", *asked, *policy]) == 0
    (rule,) = passes_sglang((tmp_path / "out" / "sglang-batching.json").read_text())
    assert rule["max_batch_size"] == 4
    assert rule["calibration"]["slo"] == "p99=60s"
    assert rule["calibration"]["answer"].startswith("1 h200-sdxl-estimated with continuous-serial")
    (tmp_path / "out" / "sglang-batching-mine.json").write_text("{}")
    unkept = ["p99=1ms" if word == "p99=60s" else word for word in asked]
    assert cli.main(["capacity", *unkept, *policy]) == 1
    own = sorted(path.name for path in (tmp_path / "out").glob("*batching*"))
    assert own == ["sglang-batching-mine.json"], "no rules of an answer that no longer holds"
