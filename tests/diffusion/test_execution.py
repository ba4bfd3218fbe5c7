"""Levers against the model as it came, each alone: latents and images in single precision; and what is refused."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from synerdiff.core import InputError
from synerdiff.device import open_device
from synerdiff.diffusion import checkpoint, execution, group_norm, stages
from synerdiff.diffusion.architectures import read_architecture
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.execution import (
    LEVERS,
    ModelExecution,
    choose_execution,
    execution_of,
    measured_execution,
    other_execution,
)
from synerdiff.diffusion.group_norm import launch_group_norm
from synerdiff.diffusion.kernels import Float8Linear, apply_execution
from synerdiff.diffusion.lora import random_lora
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.model import DiffusionModel
from synerdiff.diffusion.stages import prepare_steps
from tests.builders import affine_profile
from tests.hardware import digits_profile

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
ALLOWED = 2e-4
"""Largest difference of a latent or an image from the model's own, in single precision."""
EXACT = tuple(lever for lever in LEVERS if lever not in ("compile", "float8"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


def with_levers(name: str, *levers: str) -> DiffusionModel:
    model = load_model(name)
    apply_execution(model, ModelExecution("compiled", levers))
    return model


def made(model: DiffusionModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of a guided and an unguided sample after three steps, and an image."""
    states = [model.start(1, 3, 4.0), model.start(2, 3, 1.0)]
    while not states[0].done:
        model.step(states)
    return torch.cat([state.latent for state in states]), model.decode(states[0].latent)


def apart(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def cudnn_as_before() -> Any:
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


def is_on(model: DiffusionModel, lever: str) -> bool:
    """Whether the lever has changed what it is to change."""
    parts = (*model.unet.modules(), *model.vae.decoder.modules())
    if lever == "channels-last":
        weights = [one.weight for one in parts if isinstance(one, torch.nn.Conv2d)]
        return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    if lever == "group-norm":
        return not any(isinstance(one, torch.nn.GroupNorm) for one in parts)
    if lever == "attention":
        return type(model.vae.decoder.mid_block.attentions[0].processor).__name__ == "AttnProcessor"
    if lever == "qkv":
        return all("Fused" in type(one).__name__ for one in model.unet.attn_processors.values())
    return bool(torch.backends.cudnn.benchmark)


@pytest.mark.parametrize("name", ["digits", "tiny-sdxl"])
def test_each_lever_alone_and_all_together_make_the_same_images(name: str) -> None:
    expected = made(load_model(name))
    for levers in (*((lever,) for lever in EXACT), EXACT):
        torch.backends.cudnn.benchmark = False
        assert not any(is_on(load_model("tiny-sd"), lever) for lever in levers)
        model = with_levers(name, *levers)
        assert all(is_on(model, lever) for lever in levers)
        assert apart(made(model), expected) <= ALLOWED, levers


def test_levers_leave_the_split_forward_as_it_is() -> None:
    plain, model = load_model("tiny-sd"), with_levers("tiny-sd", *EXACT)
    for one in (plain, model):
        inputs = one.example_rows(2, one.encode_prompt("anything"))
        with torch.inference_mode():
            whole, split = one.denoise(inputs), one.split(inputs, lambda: None)
        assert torch.equal(whole, split)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_blocks_compiled_for_a_cpu_make_the_same_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One block, in the middle, and one number of rows: compiling takes seconds."""
    config = read_architecture("tiny-sd")
    config["unet"] |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    monkeypatch.setattr(checkpoint, "read_architecture", lambda name: config)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    expected = made(load_model("tiny-sd"))
    model = with_levers("tiny-sd", *EXACT, "compile")
    compiled = []
    with open_device("cpu") as lanes:
        prepare_steps(model, (3,), lanes.lane("denoise"))
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert apart(made(model), expected) <= ALLOWED
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] >= 1
    assert compiled[0] == compiled[1], "what was prepared is not compiled again"


def test_a_compiler_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("tiny-sd")
    apply_execution(model, ModelExecution("compiled", ("compile",)))

    def broken(inputs: Any) -> Any:
        raise RuntimeError("CppCompileError: C++ compile error. Command: g++ ...")

    monkeypatch.setattr(model, "denoise", broken)
    with open_device("cpu") as lanes, pytest.raises(InputError, match=r"torch cannot compile tiny-sd here: CppCompile"):
        stages.prepare_steps(model, (1,), lanes.lane("denoise"))


@pytest.mark.parametrize("levers", [("qkv",), EXACT])
def test_a_lora_merged_into_fused_projections_is_in_their_product(levers: tuple[str, ...]) -> None:
    plain, fused = load_model("tiny-sd"), with_levers("tiny-sd", *levers)
    lora, before = random_lora(plain.unet, "one", 4), made(fused)
    names = {name.rpartition(".")[2] for name in lora.layers}
    assert {"to_q", "to_k", "to_v"} <= names
    weights = [MergedWeights(model.unet) for model in (plain, fused)]
    for one in weights:
        one.merge(lora, 3.0)
    changed = made(fused)
    assert apart(changed, before) > 0.01
    assert apart(changed, made(plain)) <= ALLOWED
    for one in weights:
        one.restore()
    assert apart(made(fused), before) == 0.0


def test_8_bit_products_are_about_right_and_follow_their_weight() -> None:
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 48)
    coarse, rows = Float8Linear(linear), torch.randn(2, 5, 64) * torch.logspace(-2, 2, 5)[:, None]
    with torch.no_grad():
        error = coarse(rows) - linear(rows)
        size = linear.weight.abs() @ rows.abs().reshape(-1, 64).t()
        # Each factor is off by 1/16 of itself at most (3 bits of mantissa, rounded), their products by 1/8 or so.
        assert float((error.reshape(-1, 48).abs() / (size.t() + 1e-9)).max()) < 0.13
        assert float(error.abs().max()) > 0
        buffers = coarse.quantised, coarse.scale
        linear.weight.mul_(-2)
        coarse.refresh()
        assert coarse.quantised is buffers[0], "graphs that were captured read it"
        assert coarse.scale is buffers[1]
        assert torch.equal(coarse(rows), Float8Linear(linear)(rows))


def test_a_lora_reaches_8_bit_weights() -> None:
    model = with_levers("tiny-sd", "qkv", "float8")
    before, weights = made(model), MergedWeights(model.unet)
    weights.merge(random_lora(load_model("tiny-sd").unet, "one", 4), 3.0)
    assert apart(made(model), before) > 0.01
    weights.restore()
    assert apart(made(model), before) == 0.0


# --- the GroupNorm kernels ------------------------------------------------------------------------------------------

SHAPES = (((2, 40, 8, 8), 8), ((1, 320, 16, 16), 32), ((3, 24, 5, 7), 3), ((1, 16, 90, 50), 4), ((2, 72, 33), 8))
"""Group sizes that are no power of two, few and many positions, maps and rows."""


def normed_and_expected(shape: tuple[int, ...], groups: int, silu: bool, device: str) -> tuple[Any, Any]:
    torch.manual_seed(2)
    norm = torch.nn.GroupNorm(groups, shape[1])
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(shape) * 3 + 50  # a mean far from 0: sums of squares would cancel
    with torch.no_grad():
        expected = norm.double()(hidden.double())
        rows = hidden.flatten(2).transpose(1, 2).contiguous().to(device)
        weight, bias = (one.data.float().to(device) for one in (norm.weight, norm.bias))
        normed = launch_group_norm(rows, weight, bias, groups, norm.eps, silu).cpu()
    return normed.transpose(1, 2).reshape(shape), functional.silu(expected) if silu else expected


@needs_triton
def test_the_group_norm_kernels_compile_for_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without one: triton's compiler brings its own assembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    group_norm._kernels.cache_clear()
    pointers = {"x": "*bf16", "out": "*bf16", "weight": "*bf16", "bias": "*bf16", "parts": "*fp32", "affine": "*fp32"}
    sizes = {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_S": 16, "BLOCK_G": 16, "SILU": True}
    for kernel in group_norm._kernels():
        names = kernel.arg_names
        kinds = pointers | dict.fromkeys(sizes, "constexpr") | {"eps": "fp32"}
        source = ASTSource(
            kernel,
            {name: kinds.get(name, "i32") for name in names},
            {(place,): sizes[name] for place, name in enumerate(names) if name in sizes},
        )
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    group_norm._kernels.cache_clear()


def check_interpreted() -> None:
    """Where TRITON_INTERPRET=1 was set before triton was first imported."""
    for silu in (True, False):
        for shape, groups in SHAPES:
            normed, expected = normed_and_expected(shape, groups, silu, "cpu")
            assert float((normed - expected).abs().max()) < 1e-4, (shape, groups)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")
def test_the_group_norm_kernels_interpreted_equal_torchs() -> None:
    code = "from tests.diffusion.test_execution import check_interpreted; check_interpreted()"
    interpreting = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=interpreting, cwd=ROOT, timeout=600).returncode == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("silu", [True, False])
def test_the_group_norm_kernels_equal_torchs_on_a_gpu(silu: bool) -> None:
    for shape, groups in (*SHAPES, ((2, 512, 128, 128), 32), ((1, 128, 512, 512), 32)):
        normed, expected = normed_and_expected(shape, groups, silu, "cuda")
        assert float((normed - expected).abs().max()) < 1e-4, (shape, groups)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("levers", [*((lever,) for lever in LEVERS if lever != "float8"), LEVERS[:-1]])
def test_each_lever_makes_the_same_images_on_a_gpu(levers: tuple[str, ...]) -> None:
    plain, model = (load_model("digits", "cuda", torch.float32) for _ in range(2))
    apply_execution(model, ModelExecution("compiled", levers))
    assert apart(made(model), made(plain)) < 1e-2


# --- what is asked for, and what a machine refuses ------------------------------------------------------------------


def test_what_is_asked_for_is_what_is_on() -> None:
    everything = tuple(lever for lever in LEVERS if lever != "float8")
    on_cpu = tuple(lever for lever in everything if lever != "cudnn-benchmark")
    assert choose_execution(None, None, on_gpu=False) == ModelExecution("eager")
    assert choose_execution(None, None, on_gpu=True) == ModelExecution("graphs")
    assert choose_execution("eager", "qkv, channels-last", on_gpu=True).levers == ("channels-last", "qkv")
    assert choose_execution("eager", "+float8", on_gpu=False) == ModelExecution("eager", ("float8",))
    assert choose_execution("compiled", ",", on_gpu=False) == ModelExecution("compiled")
    if shutil.which("g++"):
        assert choose_execution("compiled", None, on_gpu=False).levers == on_cpu
        assert choose_execution("compiled", "+float8", on_gpu=False).levers == (*on_cpu, "float8")


@pytest.mark.parametrize(
    ("kind", "levers", "on_gpu", "sentence"),
    [
        ("fast", None, False, "--execution is 'fast'; allowed are eager, graphs, compiled."),
        ("graphs", None, False, "--execution graphs needs a GPU: CUDA graphs record its launches; a CPU has eager"),
        ("eager", "qkv,nonsense", False, "--levers: there is no lever 'nonsense'; there are channels-last, group-norm"),
        ("eager", "cudnn-benchmark", False, "--levers: cudnn-benchmark needs a GPU."),
    ],
)
def test_wrong_combinations_are_one_sentence(kind: str, levers: str | None, on_gpu: bool, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        choose_execution(kind, levers, on_gpu)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "shutil", SimpleNamespace(which=lambda name: None))
    monkeypatch.setattr(execution, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(InputError, match=r"^the lever compile needs a C\+\+ compiler on a CPU"):
        choose_execution("compiled", None, on_gpu=False)
    with pytest.raises(InputError, match=r"^the lever group-norm compiles with triton, which is not installed here"):
        choose_execution("compiled", None, on_gpu=True)
    choose_execution("eager", "group-norm", on_gpu=False)
    choose_execution("graphs", "channels-last", on_gpu=True)


def test_levers_are_put_on_once() -> None:
    model = with_levers("tiny-sd", "qkv")
    with pytest.raises(ValueError, match="already has the levers qkv"):
        apply_execution(model, ModelExecution("eager"))


def test_a_run_takes_its_profiles_execution_where_that_was_measured_on_such_a_device() -> None:
    profile = digits_profile()
    profile = replace(profile, provenance="measured")
    assert measured_execution(profile, on_gpu=False) is None, "it does not say"

    def head(execution: str, levers: tuple[str, ...] = (), driver: str = "") -> Any:
        fields = {"execution": execution, "levers": levers, "driver": driver}
        return replace(profile, head=profile.head.model_copy(update=fields))

    assert execution_of(head("eager, rows padded to a bucket"), None, on_gpu=False) == ModelExecution("eager")
    assert execution_of(head("CUDA graphs", driver="600"), None, on_gpu=True) == ModelExecution("graphs")
    fused = head("compiled", ("qkv", "group-norm"))
    assert execution_of(fused, None, on_gpu=False) == ModelExecution("compiled", ("group-norm", "qkv"))
    assert execution_of(fused, "compiled", on_gpu=False) == ModelExecution("compiled", ("group-norm", "qkv"))
    assert execution_of(fused, "eager", on_gpu=False) == ModelExecution("eager")
    assert execution_of(fused, None, on_gpu=True) == ModelExecution("graphs"), "measured on a CPU"
    assert other_execution(fused, ModelExecution("compiled", ("group-norm", "qkv")), on_gpu=False) is None
    assert other_execution(fused, ModelExecution("eager"), on_gpu=False) == (
        f"profile '{profile.name}' was measured compiled (group-norm, qkv), this runs eager: "
        "its times are not what runs here"
    )
    with pytest.raises(InputError, match=r"levers has nonsense; there are channels-last, group-norm"):
        execution_of(head("eager", ("qkv", "nonsense")), None, on_gpu=False)
    estimated = replace(fused, provenance="estimated")
    assert execution_of(estimated, None, on_gpu=False) == ModelExecution("eager")
    assert other_execution(estimated, ModelExecution("eager"), on_gpu=False) is None
    assert measured_execution(affine_profile(), on_gpu=False) is None
