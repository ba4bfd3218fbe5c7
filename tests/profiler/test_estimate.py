"""The estimated profile: operations counted, times by hand, exact cuts, contention bounds, files and messages."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from profiler import estimate as est
from profiler.datasheets import GPUS, MODELS, gpu_key
from profiler.durations import FITTED, ForwardMode, Occupancy, filled, forward, joined, product_flops_per_s, spent
from profiler.operations import EXECUTIONS, Layers, Operation, decoder, text_encoders, total, unet
from synerdiff.cli.estimate import estimate
from synerdiff.core import InputError
from synerdiff.profile.folder import SHIPPED, load_profile, write_profile

SQUARE = ForwardMode("engine", "fp16")


@pytest.mark.parametrize(
    ("model", "resolution", "gflop", "weights_m"), [("sdxl", 1024, 6761, 2567), ("sd15", 512, 803, 860)]
)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_unet_has_the_known_flops_and_weights(
    model: str, resolution: int, gflop: int, weights_m: int, execution: str
) -> None:
    flops, elements, weights, kernels = total(unet(model, resolution, resolution, execution))
    assert flops / 1e9 == pytest.approx(gflop, abs=0.6)
    assert weights / 1e6 == pytest.approx(weights_m, rel=0.002)
    assert elements > 0 < kernels


def test_executions_fuse_more_and_more() -> None:
    counts = [total(unet("sdxl", 1024, 1024, execution)) for execution in EXECUTIONS]
    assert counts[0][3] > counts[1][3] > counts[2][3]
    assert counts[0][1] > counts[1][1] > counts[2][1]


def test_work_grows_with_the_picture() -> None:
    """Products grow with the pixels, attention of every token to all others faster."""
    small, large = (total(unet("sdxl", side, side, "compiled"))[0] for side in (512, 1024))
    assert large / 4.4 < small < large / 4
    assert total(unet("sdxl", 512, 1024, "compiled")) == total(unet("sdxl", 1024, 512, "compiled"))


@pytest.mark.parametrize(("resolution", "gflop"), [(1024, 10470), (512, 2515)])
def test_decoder_layers_add_up_to_the_counted_flops(resolution: int, gflop: int) -> None:
    atoms = decoder("sdxl", resolution, resolution, "eager")
    assert len(atoms) == 20
    assert sum(total(operations)[0] for _, operations in atoms) / 1e9 == pytest.approx(gflop, abs=0.6)


def test_decoder_layers_have_the_known_shares_at_1024() -> None:
    flops = {name: total(operations)[0] for name, operations in decoder("sd15", 1024, 1024, "compiled")}
    shares = {name: round(100 * value / sum(flops.values()), 1) for name, value in flops.items()}
    expected = {
        "mid.res0": 1.5, "mid.attn0": 5.6, "up0.res0": 1.5, "up1.res0": 5.9, "up1.up": 11.8, "up2.res0": 9.5,
        "up2.res1": 5.9, "up2.up": 11.8, "up3.res0": 9.5, "up3.res2": 5.9,
    }  # fmt: skip
    assert {name: shares[name] for name in expected} == expected


def test_a_decoder_has_one_attention_with_head_size_512() -> None:
    operations = dict(decoder("sdxl", 1024, 1024, "eager"))["mid.attn0"]
    wide = [operation for operation, _ in operations if operation.kind == "unfused"]
    assert [(operation.n, operation.flops) for operation in wide] == [(512, 4.0 * 16384**2 * 512)]
    assert not any(operation.kind == "unfused" for operation, _ in unet("sdxl", 1024, 1024, "eager"))


def test_text_encoders_have_the_known_flops() -> None:
    assert total(text_encoders(MODELS["sdxl"].text_encoders, "eager"))[0] / 1e9 == pytest.approx(111, abs=1)


def test_an_eager_convolution_adds_its_bias_and_copies_its_layout() -> None:
    eager, engine = Layers("eager"), Layers("engine")
    for layers in (eager, engine):
        layers.conv(64, 32, 100)
    product = Operation("conv", 2.0 * 9 * 64 * 32 * 100, 9600, 9 * 64 * 32, 1, 100, 32)
    assert engine.counted() == ((product, 1),)
    copies, bias = Operation("layout", 0.0, 19200, 0.0, 2), Operation("stream", 0.0, 6400, 0.0, 1)
    assert dict(eager.counted()) == {product: 1, copies: 1, bias: 1}


def test_waves_by_hand() -> None:
    """2048 x 1280 on 132 multiprocessors: 160 tiles of 128x128 take 2 waves, 640 of 64x64 (at 0.9) 5 of 132."""
    assert filled(2048, 1280, 132) == pytest.approx(0.9 * 640 / 660)
    assert filled(128 * 12, 128 * 11, 132) == 1.0
    assert filled(128, 128, 108) == pytest.approx(0.9 * 0.9 * 64 / 108), "4 tiles of 64x64, their sums split 16 times"


def test_a_product_by_hand() -> None:
    """H100: 4096 FLOPs a clock on the sheet, operands for 9060: 2821 a clock, 132 multiprocessors at 1.83 GHz."""
    gpu = GPUS["h100"]
    assert 1.83e9 * 132 * 4096 > 700 * 1.13e12, "the board's power is the lower ceiling"
    rate = 791e12 / (1 + 4096 / 9060)
    assert product_flops_per_s(gpu, SQUARE, "linear", FITTED) == pytest.approx(rate, rel=1e-6)
    operation = Operation("linear", 2.0 * 1536 * 1408 * 1024, 0.0, 1408 * 1024, 1, 1536, 1408)
    memory = 1408 * 1024 * 2 / (3.35e12 * FITTED.bandwidth)
    piece = spent(operation, 1, gpu, SQUARE)
    assert piece.seconds == pytest.approx(2.0 * 1536 * 1408 * 1024 / rate + memory + FITTED.kernel_s)
    assert (piece.compute_s, piece.memory_s) == pytest.approx((2.0 * 1536 * 1408 * 1024 / rate, memory))


def test_precisions_change_the_rate_of_products() -> None:
    def rate(gpu: str, *mode: Any, kind: str = "conv") -> float:
        return product_flops_per_s(GPUS[gpu], ForwardMode(*mode), kind, FITTED)

    assert rate("h100", "engine", "fp8") == pytest.approx(2 * rate("h100", "engine", "bf16"))
    assert rate("h100", "compiled", "int8") == rate("h100", "compiled", "bf16"), "torchao quantises linear layers"
    assert rate("h100", "compiled", "int8", kind="linear") > 1.9 * rate("h100", "compiled", "bf16", kind="linear")
    sums = rate("rtx4090", "engine", "fp16") / rate("rtx4090", "engine", "bf16")
    assert 1.7 < sums < 2.0, "GeForce cards add in 16 bit twice as fast; operands and power take their part"
    assert rate("a100", "eager", "fp16", True) == 108 * 1.41e9 * FITTED.single
    assert rate("a100", "eager", "fp16", True, kind="linear") == pytest.approx(19.5e12, rel=0.01)


def test_activations_that_fit_the_cache_move_at_its_speed() -> None:
    gpu = GPUS["rtx4090"]
    inside, outside = (
        spent(Operation("stream", 0.0, count, 0.0, 1), 1, gpu, SQUARE).memory_s for count in (18e6, 19e6)
    )
    assert inside == pytest.approx(36e6 / (128 * 2.7e9 * 16))
    assert outside == pytest.approx(38e6 / (1.008e12 * FITTED.bandwidth))


def test_group_norm_reads_with_32_blocks_a_row() -> None:
    operation = Operation("moments", 0.0, 132e6, 0.0, 0)
    few, many = (spent(operation, rows, GPUS["h100"], ForwardMode("eager", "fp16")) for rows in (1, 8))
    assert few.seconds == pytest.approx(few.memory_s * 132 / 32)
    assert many.seconds == pytest.approx(many.memory_s)


def test_a_host_that_launches_is_the_floor() -> None:
    """SD1.5, eager, 1 row: 1,088 kernels of 28.4 us, whatever the card; an engine replays a graph."""
    operations = unet("sd15", 512, 512, "eager")
    eager = forward(operations, 1, GPUS["b200"], ForwardMode("eager", "fp16"))
    assert eager.seconds == pytest.approx(1088 * FITTED.host_s, rel=0.01)
    assert forward(unet("sd15", 512, 512, "engine"), 1, GPUS["b200"], SQUARE).seconds < eager.seconds / 5


@pytest.mark.parametrize("gpu", sorted(GPUS))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_profile_is_complete_and_marked(gpu: str, model: str) -> None:
    profile = est.estimate_profile(gpu, model, precision="fp16")
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
    assert profile.head.band is not None
    assert profile.head.band.card.startswith("checked" if GPUS[gpu].checked else "unchecked")


def test_options_change_what_they_name() -> None:
    plain = est.estimate_profile("h100", "sdxl")
    engine = est.estimate_profile("h100", "sdxl", execution="engine")
    eight = est.estimate_profile("h100", "sdxl", execution="engine", precision="fp8")
    eager = est.estimate_profile("h100", "sdxl", execution="eager")
    single = est.estimate_profile("h100", "sdxl", vae_bits=32)
    small = est.estimate_profile("h100", "sdxl", resolution="512x1024")
    assert eager.step_ns(16) > plain.step_ns(16) > engine.step_ns(16) > 1.2 * eight.step_ns(16)
    assert (eager.row_buckets, plain.row_buckets) == (None, est.ROW_BUCKETS)
    assert (eight.decode_ns(), single.steps) == (engine.decode_ns(), plain.steps)
    assert single.decode_ns() > 2 * plain.decode_ns()
    assert 1.7 < plain.step_ns(16) / small.step_ns(16) < 2.3
    names = [profile.name for profile in (plain, engine, eight, single, small)]
    assert names == [
        "h100-sdxl-estimated",
        "h100-sdxl-estimated-engine",
        "h100-sdxl-estimated-engine-fp8",
        "h100-sdxl-estimated-vae32",
        "h100-sdxl-estimated-512x1024",
    ]


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.glob("*-estimated*")))
def test_a_shipped_profile_is_what_the_command_in_its_source_makes_today(name: str, tmp_path: Path) -> None:
    shipped = load_profile(SHIPPED / name)
    words = shipped.head.source.split()
    assert words[:2] == ["synerdiff", "estimate"]
    app = typer.Typer()
    app.command()(estimate)
    assert CliRunner().invoke(app, [*words[2:], "--out", str(tmp_path / name)]).exit_code == 0
    assert load_profile(tmp_path / name).content_hash == shipped.content_hash


def test_a_profile_names_the_command_that_makes_it() -> None:
    made = est.estimate_profile("h100", "sdxl", "high", 2.0, execution="engine", precision="fp8", vae_bits=32,
                                resolution="512x768")  # fmt: skip
    assert made.head.source == (
        "synerdiff estimate --gpu h100 --model sdxl --resolution 512x768 --execution engine --precision fp8 "
        "--vae-precision 32 --contention 1 --decode-scale 2"
    )
    both = est.estimate_profiles("512x512, 1024x1024", "h100", "sdxl")
    assert both.head.source == "synerdiff estimate --gpu h100 --model sdxl --resolution 512x512,1024x1024"


@pytest.mark.parametrize(
    ("written", "key"),
    [("H100", "h100"), ("NVIDIA H100 SXM5 80GB", "h100"), ("H100 PCIe", "h100-pcie"), ("A100 80GB", "a100"),
     ("RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 3080 Ti", "rtx3080ti"), ("A10", "a10"), ("A10G", "A10G")],
)  # fmt: skip
def test_cards_as_people_write_them(written: str, key: str) -> None:
    assert gpu_key(written) == key


def test_cut_minimises_the_largest_chunk() -> None:
    pieces = [Occupancy(t, 1, 1) for t in (5.0, 1.0, 1.0, 4.0, 3.0, 2.0, 2.0)]
    lengths = [joined(part).seconds for part in est._cut(pieces, 3)]
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
    for level in ("low", "0.3", "mid", "high", "1.5"):
        step, chunk = est.estimate_profile("h200", "sdxl", level).slowdown_ppm(16, "whole", 0)
        gains.append(1e6 / step + 1e6 / chunk)
    assert gains == sorted(gains, reverse=True)
    assert 1.2 < gains[0] < 2.0
    assert gains[3] >= 1.0
    assert gains[4] < 1.0


def test_decode_scale_multiplies_the_decode_only() -> None:
    plain, heavy = est.estimate_profile("a100", "sd15"), est.estimate_profile("a100", "sd15", decode_scale=3)
    assert heavy.decode_ns() == pytest.approx(3 * plain.decode_ns(), rel=1e-6)
    assert heavy.steps == plain.steps


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("b100", "sdxl"), {}, "known are h100, h100-pcie, h200, h800, a100, "),
        (("h200", "flux"), {}, "known are sd15, sdxl"),
        (("h200", "sdxl", "awful"), {}, "allowed are low, mid, high or a number from 0 to 3"),
        (("h200", "sdxl", "nan"), {}, "allowed are low"),
        (("h200", "sdxl", "-1"), {}, "allowed are low"),
        (("h200", "sdxl", "mid", 0.0), {}, "from 0.001 to 100"),
        (("h200", "sdxl"), {"execution": "graphs"}, "execution is 'graphs'; allowed are eager, compiled, engine"),
        (
            ("h200", "sdxl"),
            {"precision": "fp4"},
            "precision is 'fp4'; NVIDIA H200 SXM 141 GB has bf16, fp16, fp8, int8",
        ),
        (("a100", "sdxl"), {"precision": "fp8"}, "NVIDIA A100 SXM 80 GB has bf16, fp16, int8"),
        (("v100", "sdxl"), {}, "precision is 'bf16'; NVIDIA V100 SXM 16 GB has fp16"),
        (
            ("h200", "sdxl"),
            {"precision": "int8", "execution": "eager"},
            "precision int8 needs execution compiled or engine, not eager",
        ),
        (("h200", "sdxl"), {"vae_bits": 8}, "vae-precision is 8; allowed are 16 and 32"),
        (("h200", "sdxl"), {"resolution": "1000x1024"}, "multiples of 64 pixels up to 4096, like 768x512"),
        (("h200", "sdxl"), {"resolution": "0x0"}, "multiples of 64"),
        (("h200", "sdxl"), {"resolution": "1024"}, "allowed is HEIGHTxWIDTH"),
    ],
)
def test_messages(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        est.estimate_profile(*arguments, **options)


def test_the_command_writes_a_profile_and_says_its_band(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(estimate)
    result = CliRunner().invoke(
        app, ["--gpu", "l4", "--model", "sdxl", "--execution", "engine", "--precision", "fp8", "--vae-precision", "32",
              "--resolution", "768x1024", "--contention", "high", "--out", str(tmp_path / "p")]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "estimated, not measured: times 0.86 to 1.25; unchecked" in result.output
    loaded = load_profile(tmp_path / "p")
    expected = est.estimate_profile(
        "l4", "sdxl", "high", execution="engine", precision="fp8", vae_bits=32, resolution="768x1024"
    )
    assert (loaded.name, loaded.steps, loaded.chunks) == (expected.name, expected.steps, expected.chunks)
    assert loaded.label.endswith("(estimated)")
    assert all({"value", "unit", "source"} <= set(entry) for entry in loaded.head.notes["assumptions"].values())


@pytest.mark.parametrize("model", ["sdxl", "sd15"])
def test_shipped_profiles_load_and_say_that_they_are_estimated(model: str) -> None:
    assert load_profile(SHIPPED / f"h200-{model}-estimated").label == f"h200-{model}-estimated (estimated)"


def test_a_measured_profile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text("provenance: measured\n")
    with pytest.raises(InputError, match="holds profile\\.yaml, which 'estimate' did not write"):
        estimate("h200", "sdxl", tmp_path)
    assert (tmp_path / "profile.yaml").read_text() == "provenance: measured\n"


def test_several_resolutions_are_those_of_each_alone() -> None:
    profile = est.estimate_profiles("512x512, 768x1024", "h200", "sdxl", execution="engine")
    alone = est.estimate_profile("h200", "sdxl", execution="engine", resolution="768x1024")
    assert profile.head.resolutions == ((512, 512), (768, 1024))
    small, large = profile.head.resolutions[:2]
    assert set(profile.across) >= {(small, large), (large, small)}
    # A pair across is made of the same two sides: between the slowdowns of steps that take less and more time.
    found = profile.slowdowns_beside(small, 8, "whole", 0, large)
    assert found[2] == 0
    rule = replace(profile, across={}).slowdowns_beside(small, 8, "whole", 0, large)
    assert found[0] == pytest.approx(rule[0], rel=0.25)
    assert profile.at((768, 1024)).steps == alone.steps
    assert profile.at((768, 1024)).corun == alone.corun
    assert profile.at((768, 1024)).overheads == profile.overheads
    assert est.estimate_profiles("", "h200", "sdxl") == est.estimate_profile("h200", "sdxl")
    with pytest.raises(InputError, match="are both of 512x512"):
        est.estimate_profiles("512x512,512x512", "h200", "sdxl")


def test_a_step_of_several_gpus_by_hand() -> None:
    """One self-attention over 4 tokens of 8 channels beside a product, on a link of 1 byte a second."""
    device, mode = GPUS["h100"], ForwardMode("engine", "bf16")
    wait_s = 12 * est.EXCHANGE_S
    product = Operation("linear", 2.0 * 64 * 8 * 8, 64 * 16.0, 64.0, 1, 64, 8)
    attention = Operation("attention", 4.0 * 4 * 4 * 8, 2.0 * 8 * 8, 0.0, 1, 4 * 2, 4)
    across = attention._replace(elements=2.0 * (4 + 77) * 8)
    listed = ((product, 1), (attention, 3), (across, 2))
    halves = tuple((o._replace(flops=o.flops / 2, elements=o.elements / 2, m=o.m // 2), n) for o, n in listed)
    alone = forward(halves, 2, device, mode).seconds
    # 3 layers of 4 tensors of 32 elements, 2 rows, 2 bytes; of each a GPU of two sends a quarter. 12 exchanges.
    assert est.together(listed, 2, device, mode, 2, 1.0) == pytest.approx(alone + 3 * 4 * 32 * 2 * 2 / 4 + wait_s)


def test_degrees_are_estimated_written_and_read_back(tmp_path: Path) -> None:
    profile = est.estimate_profile("h100", "sdxl", degrees=(2, 4))
    at = {degree: profile.on_gpus(degree).step_ns(16) for degree in (1, 2, 4)}
    assert at[1] > at[2] > at[4] > at[1] / 4
    slow = est.estimate_profile("h100", "sdxl", degrees=(4,), link_gb_per_s=25)
    assert slow.on_gpus(4).step_ns(16) > at[4]
    assert slow.head.notes["assumptions"]["link"]["value"] == 25
    assert slow.name == est.estimate_profile("h100", "sdxl").name
    write_profile(tmp_path / "p", profile)
    again = load_profile(tmp_path / "p")
    assert again.degrees == profile.degrees
    assert again.on_gpus(4).decode_ns() == profile.decode_ns()
    with pytest.raises(InputError, match=r"no step times on 8 GPUs at 1024x1024; its degrees.csv has 2, 4"):
        again.on_gpus(8)
    file = tmp_path / "p" / "degrees.csv"
    text = file.read_text()
    for old, new, message in (
        ("1024x1024,2,1,", "1024x1024,1,1,", "degree"),
        ("1024x1024,2,2,", "1024x1024,2,1,", "rows 1 is given twice for degree 2"),
    ):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=rf"degrees.csv.*{message}"):
            load_profile(tmp_path / "p")
    with pytest.raises(InputError, match="degrees holds 16"):
        est.estimate_profile("h100", "sdxl", degrees=(16,))
