"""The estimated profile: calibration, exact cuts, contention bounds, files and messages."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from profiler import estimate as est
from profiler.datasheets import GPUS, MODELS, decoder_atoms
from synerdiff.cli.estimate import estimate
from synerdiff.core import InputError
from synerdiff.profile.folder import SHIPPED, load_profile


@pytest.mark.parametrize(("resolution", "gflop"), [(1024, 10470), (512, 2515)])
def test_decoder_layers_add_up_to_the_counted_flops(resolution: int, gflop: int) -> None:
    atoms = decoder_atoms(resolution)
    assert len(atoms) == 20
    assert sum(atom.flops for atom in atoms) / 1e9 == pytest.approx(gflop, abs=0.6)


def test_decoder_layers_have_the_known_shares_at_1024() -> None:
    atoms = decoder_atoms(1024)
    total = sum(atom.flops for atom in atoms)
    shares = {atom.name: round(100 * atom.flops / total, 1) for atom in atoms}
    expected = {
        "mid.res0": 1.5, "mid.attn": 5.6, "up0.res0": 1.5, "up1.res0": 5.9, "up1.up": 11.8, "up2.res0": 9.5,
        "up2.res1": 5.9, "up2.up": 11.8, "up3.res0": 9.5, "up3.res2": 5.9,
    }  # fmt: skip
    assert {name: shares[name] for name in expected} == expected


@pytest.mark.parametrize(("model", "slowest", "fastest"), [("sdxl", 18.5, 21.6), ("sd15", 66.0, 104.6)])
def test_h100_steps_of_two_rows_lie_between_the_published_speeds(model: str, slowest: float, fastest: float) -> None:
    steps_per_s = 1e9 / est.estimate_profile("h100", model).step_ns(2)
    assert slowest < steps_per_s < fastest


def test_h200_full_batches_reach_400_tflops() -> None:
    tflops = 16 * 6761e9 / (est.estimate_profile("h200", "sdxl").step_ns(16) / 1e9) / 1e12
    assert tflops == pytest.approx(400, rel=0.02)


def test_step_time_by_hand() -> None:
    """H100, SDXL, 2 rows: 2,600 kernels of 7.5 us + 13.522 TFLOP at 44% of 989.4 TFLOP/s; compute-bound."""
    assert est.estimate_profile("h100", "sdxl").step_ns(2) == round(1e9 * (2600 * 7.5e-6 + 13.522 / (989.4 * 0.44)))


def test_memory_bound_step_follows_the_bytes() -> None:
    thin = est.Gpu("thin", 1e18, 1e9, 0.5, "", "")
    piece = est._step(thin, MODELS["sd15"], 1)
    weights = MODELS["sd15"].step_weight_bytes
    activations = MODELS["sd15"].step_traffic_bytes - weights
    expected = 800 * 7.5e-6 + (weights + activations * 0.5) / (1e9 * 0.85)
    assert piece.seconds == pytest.approx(expected)
    assert piece.memory > 0.99 > 0.01 > piece.compute


@pytest.mark.parametrize("gpu", sorted(GPUS))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_profile_is_complete_and_marked(gpu: str, model: str) -> None:
    profile = est.estimate_profile(gpu, model)
    assert profile.estimated
    assert profile.row_buckets == est.ROW_BUCKETS
    times = [profile.step_ns(rows) for rows in est.ROW_BUCKETS]
    assert times == sorted(times)
    assert [profile.chunk_count(c) for c in ("whole", "c4", "c8")] == [1, 4, 8]
    assert profile.decode_ns("c8") == pytest.approx(profile.decode_ns(), abs=8)
    for chunking in profile.chunkings:
        for chunk in range(profile.chunk_count(chunking)):
            for rows in range(1, 33):
                assert min(profile.slowdown_ppm(rows, chunking, chunk)) >= 1_000_000
    spreads = [*profile.steps.values(), *profile.overheads.values()]
    assert all(s.n == 0 and s.p10 == s.median == s.p90 for s in spreads)


def test_cut_minimises_the_largest_chunk() -> None:
    pieces = [est.RooflinePiece(t, 1, 1, 1) for t in (5.0, 1.0, 1.0, 4.0, 3.0, 2.0, 2.0)]
    lengths = [sum(p.seconds for p in part) for part in est._cut(pieces, 3)]
    every = [
        max(sum(p.seconds for p in pieces[a:b]) for a, b in pairwise((0, *cuts, 7)))
        for cuts in combinations(range(1, 7), 2)
    ]
    assert max(lengths) == min(every) == 7.0
    assert lengths == [5.0, 6.0, 7.0], "of the cuts with that maximum, the most even one"


@pytest.mark.parametrize(("u", "v"), [(0.4, 1.0), (0.9, 0.95), (0.5, 0.6), (1.0, 1.0)])
def test_sharing_uses_the_resource_exactly_up(u: float, v: float) -> None:
    s_u, s_v = est.share(u, v)
    assert u / s_u + v / s_v == pytest.approx(1)
    assert (s_u - 1) * u == pytest.approx((s_v - 1) * v)


def test_sharing_by_hand() -> None:
    assert est.share(0.4, 0.6) == (1.0, 1.0)
    assert est.share(1.0, 1.0) == (2.0, 2.0)


def test_contention_orders_the_overlap_gain() -> None:
    gains = []
    for level in ("0", "mild", "moderate", "1", "severe"):
        step, chunk = est.estimate_profile("h200", "sdxl", level).slowdown_ppm(16, "whole", 0)
        gains.append(1e6 / step + 1e6 / chunk)
    assert gains == sorted(gains, reverse=True)
    assert gains[0] == 2.0
    assert gains[3] >= 1.0
    assert gains[4] < 1.0


def test_decode_scale_multiplies_the_decode_only() -> None:
    plain, heavy = est.estimate_profile("a100", "sd15"), est.estimate_profile("a100", "sd15", decode_scale=3)
    assert heavy.decode_ns() == pytest.approx(3 * plain.decode_ns(), rel=1e-6)
    assert heavy.steps == plain.steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("b200", "sdxl"), "known are h100, h200, a100, rtx4090"),
        (("h200", "flux"), "known are sd15, sdxl"),
        (("h200", "sdxl", "awful"), "allowed are mild, moderate, severe or a number from 0 to 3"),
        (("h200", "sdxl", "nan"), "allowed are mild"),
        (("h200", "sdxl", "-1"), "allowed are mild"),
        (("h200", "sdxl", "mild", 0.0), "above 0 and up to 100"),
    ],
)
def test_messages(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        est.estimate_profile(*arguments)


@pytest.mark.parametrize(("gpu", "model"), [("h200", "sdxl"), ("h200", "sd15")])
def test_shipped_profiles_are_what_the_command_writes(gpu: str, model: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(estimate)
    result = CliRunner().invoke(app, ["--gpu", gpu, "--model", model, "--out", str(tmp_path / "p")])
    assert result.exit_code == 0, result.output
    assert "estimated, not measured" in result.output
    shipped = SHIPPED / f"{gpu}-{model}-estimated"
    names = sorted(path.name for path in shipped.iterdir())
    assert names == ["chunks.csv", "corun.csv", "overheads.csv", "profile.yaml", "steps.csv"]
    for name in names:
        assert (tmp_path / "p" / name).read_bytes() == (shipped / name).read_bytes(), name
    loaded = load_profile(shipped)
    assert loaded.label.endswith("(estimated)")
    assert all({"value", "unit", "source"} <= set(entry) for entry in loaded.head.notes["assumptions"].values())


def test_a_measured_profile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text("provenance: measured\n")
    with pytest.raises(InputError, match="holds profile\\.yaml, which 'estimate' did not write"):
        estimate("h200", "sdxl", tmp_path)
    assert (tmp_path / "profile.yaml").read_text() == "provenance: measured\n"
