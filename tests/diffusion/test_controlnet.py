"""ControlNets: one forward in two halves, several networks with their own scales, batches where only some use them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from synerdiff.core import REUSE, InputError
from synerdiff.diffusion.architectures import empty_controlnet, empty_modules, read_architecture
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.controlnet import example_call, load_controlnet, random_controlnet, read_control_image
from synerdiff.diffusion.denoisers.controlnet import ControlNet, ControlUse, control_calls
from synerdiff.diffusion.denoisers.unet import sum_residuals
from synerdiff.diffusion.rows import runs_of, select_rows

torch.set_num_threads(1)

MODELS = ("digits", "tiny-sd", "tiny-sdxl")


def steered_model(name: str, dtype: Any = torch.float32, nets: Any = ("a", "b")) -> Any:
    model = load_model(name, dtype=dtype)
    model.controlnets = {net: random_controlnet(net, model, seed=7 + i) for i, net in enumerate(nets)}
    return model


def picture(model: Any, seed: int) -> Any:
    channels = next(iter(model.controlnets.values())).channels
    return torch.rand(1, channels, model.height, model.width, generator=torch.Generator().manual_seed(seed)).to(
        model.dtype
    )


def added(inputs: Any) -> Any:
    return None if inputs.pooled is None else {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}


def calls_of(step: Any) -> Any:
    return control_calls(step.states, step.rows_of_state, step.inputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_halves_equal_the_whole_forward_to_the_last_bit(name: str, dtype: Any) -> None:
    model = steered_model(name, dtype)
    states = [model.start(seed, 5, 4.0) for seed in range(3)]
    inputs = model.prepare(states).inputs
    encoded = model.split.encode(inputs)
    assert torch.equal(model.split.decode(encoded), model.denoise(inputs))
    call = example_call(model.controlnets["a"], model, 6)
    residuals = model.controlnets["a"].residuals(replace(call, inputs=inputs))
    whole = model.unet(
        inputs.latents,
        inputs.timesteps,
        inputs.tokens,
        added_cond_kwargs=added(inputs),
        down_block_additional_residuals=residuals.down,
        mid_block_additional_residual=residuals.mid,
    ).sample
    order = []

    def fetch() -> Any:
        order.append("fetched")
        return residuals

    model.unet.mid_block.register_forward_hook(lambda *_: order.append("mid block"))
    model.unet.up_blocks[0].register_forward_pre_hook(lambda *_: order.append("decoder"))
    assert torch.equal(model.split(inputs, fetch), whole)
    assert order == ["mid block", "fetched", "decoder"]
    assert not torch.equal(whole, model.denoise(inputs))
    shapes = tuple(tuple(tensor.shape[1:]) for tensor in residuals.tensors())
    assert residuals.size_bytes == sum(6 * c * h * w * dtype.itemsize for c, h, w in shapes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_several_with_their_own_scales_equal_diffusers_multi_controlnet(name: str, dtype: Any) -> None:
    from diffusers import MultiControlNetModel

    model = steered_model(name, dtype, ("a", "b", "c"))
    scales, pictures = [0.35, 1.2, 0.7], [picture(model, seed) for seed in range(3)]
    state = model.start(4, 5, 4.0)
    state.controls = tuple(
        ControlUse(net, image, scale) for net, image, scale in zip("abc", pictures, scales, strict=True)
    )
    step = model.prepare([state])
    calls = calls_of(step)
    assert [(call.name, call.rows, call.scales) for call in calls] == [
        (net, (0, 1), (scale, scale)) for net, scale in zip("abc", scales, strict=True)
    ]
    ours = sum_residuals(2, [(call.rows, model.controlnets[call.name].residuals(call)) for call in calls])
    many = MultiControlNetModel([model.controlnets[net].net for net in "abc"])  # type: ignore[no-untyped-call]
    inputs = step.inputs
    down, mid = many(  # type: ignore[operator]
        inputs.latents,
        inputs.timesteps,
        inputs.tokens,
        [image.expand(2, -1, -1, -1) for image in pictures],
        scales,
        added_cond_kwargs=added(inputs),
        return_dict=False,
    )
    for one, other in zip(ours.tensors(), (*down, mid), strict=True):
        assert torch.equal(one, other)
    # Averaged instead of added, or without their scales, they would be far from this.
    assert float((ours.mid - ours.mid / 3).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["digits", "tiny-sdxl"])
def test_a_batch_of_samples_with_and_without_equals_each_alone(name: str) -> None:
    def samples(model: Any) -> Any:
        made = [model.start(seed, 4, scale) for seed, scale in ((1, 4.0), (2, 1.0), (3, 6.0), (4, 4.0), (5, 1.0))]
        made[0].controls = (ControlUse("a", picture(model, 1), 0.8),)
        made[1].controls = (ControlUse("b", picture(model, 2), 0.5), ControlUse("a", picture(model, 3), 1.1))
        made[3].controls = (ControlUse("b", picture(model, 4), 1.0), ControlUse("b", picture(model, 5), 0.4))
        return made

    model = steered_model(name)
    together, alone, without = samples(model), samples(model), samples(model)
    for step in range(4):
        modes = [state.default_mode for state in together]
        if step == 2:
            modes[0] = modes[3] = REUSE
        model.step(together, modes, pad_rows=2)
        for state, mode in zip(alone, modes, strict=True):
            model.step([state], [mode])
        for state, mode in zip(without, modes, strict=True):
            state.controls = ()
            model.step([state], [mode])
    for i, (one, other, plain) in enumerate(zip(together, alone, without, strict=True)):
        largest = float(other.latent.abs().max())
        assert float((one.latent - other.latent).abs().max()) < 1e-4 * largest
        changed = float((other.latent - plain.latent).abs().max())
        assert changed > 0.01 * largest if i in (0, 1, 3) else changed == 0.0


def test_scale_zero_is_no_controlnet_and_scales_are_linear() -> None:
    model = steered_model("digits", nets=("a",))
    call = example_call(model.controlnets["a"], model, 3)
    one = model.controlnets["a"].residuals(replace(call, scales=(1.0, 0.5, 0.0)))
    full = model.controlnets["a"].residuals(call)
    for scaled, plain in zip(one.tensors(), full.tensors(), strict=True):
        assert torch.equal(scaled[0], plain[0])
        assert torch.allclose(scaled[1], plain[1] / 2)
        assert not scaled[2].any()


def test_calls_name_the_rows_that_use_each_controlnet() -> None:
    model = steered_model("digits", nets=("a", "b"))
    states = [model.start(seed, 4, scale) for seed, scale in ((1, 1.0), (2, 4.0), (3, 4.0))]
    states[0].controls = (ControlUse("b", picture(model, 1), 0.1),)
    states[2].controls = (ControlUse("b", picture(model, 2), 0.3), ControlUse("a", picture(model, 3), 0.4))
    step = model.prepare(states, pad_rows=1)
    # Rows: conditional of the two guided samples, then of the unguided one; two unconditional; a pad.
    first, second = calls_of(step)
    assert (first.name, first.rows, first.scales) == ("a", (1, 4), (0.4, 0.4))
    assert (second.name, second.rows, second.scales) == ("b", (1, 2, 4), (0.3, 0.1, 0.3))
    assert torch.equal(second.images[1:2], states[0].controls[0].image)
    assert torch.equal(second.inputs.latents, step.inputs.latents[[1, 2, 4]])
    assert torch.equal(second.inputs.tokens, step.inputs.tokens[[1, 2, 4]])
    summed = sum_residuals(6, [(call.rows, model.controlnets[call.name].residuals(call)) for call in (first, second)])
    assert [bool(summed.mid[row].any()) for row in range(6)] == [False, True, True, False, True, False]


def test_runs_of_rows() -> None:
    assert runs_of([2]) == [slice(2, 3)]
    assert runs_of([0, 1, 3, 4, 6]) == [slice(0, 2), slice(3, 5), slice(6, 7)]
    model = load_model("digits")
    inputs = model.prepare([model.start(seed, 3, 4.0) for seed in range(3)]).inputs
    halves = [select_rows(inputs, range(3)), select_rows(inputs, range(3, 6))]
    with torch.inference_mode():
        outputs = torch.cat([model.denoise(half) for half in halves])
        assert float((outputs - model.denoise(inputs)).abs().max()) < 1e-5


def test_a_controlnet_that_is_not_loaded_is_named() -> None:
    model = steered_model("digits")
    state = model.start(1, 4)
    state.controls = (ControlUse("depth", picture(model, 1)),)
    with pytest.raises(InputError, match="ControlNet depth is not loaded; loaded: a, b"):
        model.step([state])
    assert state.step_index == 0


@pytest.mark.parametrize(("name", "millions"), [("sd15", 361.3), ("sdxl", 1251.0)])
def test_the_true_architectures_have_their_published_sizes(name: str, millions: float) -> None:
    unet, _ = empty_modules(read_architecture(name))
    net = empty_controlnet(unet.config, 8, 3)
    assert round(sum(weight.numel() for weight in net.parameters()) / 1e6, 1) == millions


def test_a_saved_controlnet_is_read_back(tmp_path: Path) -> None:
    model = steered_model("tiny-sd", nets=("a",))
    model.controlnets["a"].net.save_pretrained(tmp_path / "canny")
    again = load_controlnet(tmp_path / "canny", model)
    assert again.name == "canny"
    assert again.size_bytes == model.controlnets["a"].size_bytes > 100_000
    call = example_call(again, model, 2)
    assert torch.equal(again.residuals(call).mid, model.controlnets["a"].residuals(call).mid)
    assert load_controlnet(tmp_path / "canny", model, "edges").name == "edges"


def test_controlnets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny, digits = steered_model("tiny-sd", nets=("a",)), load_model("digits")
    tiny.controlnets["a"].net.save_pretrained(tmp_path / "canny")
    with pytest.raises(InputError, match=r"canny: this ControlNet does not fit digits: its block_out_channels is"):
        load_controlnet(tmp_path / "canny", digits)
    small = empty_controlnet(digits.unet.config, 8, 1).to_empty(device="cpu")
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(
        InputError, match=r"small: this ControlNet does not fit digits: it reduces images 8 times, not 4"
    ):
        load_controlnet(tmp_path / "small", digits)
    with pytest.raises(
        InputError, match="There is no ControlNet nothing; give a folder that diffusers saved, or outline"
    ):
        load_controlnet("nothing", digits)
    digits.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="unet: this is a UNet2DConditionModel; a ControlNetModel is needed"):
        load_controlnet(tmp_path / "unet", digits)
    weights = load_file(tmp_path / "canny" / "diffusion_pytorch_model.safetensors")
    weights.pop("conv_in.weight")
    save_file(weights, tmp_path / "canny" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"canny: its weights lack conv_in\.weight"):
        load_controlnet(tmp_path / "canny", tiny)
    (tmp_path / "canny" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"canny: the ControlNet cannot be loaded \("):
        load_controlnet(tmp_path / "canny", tiny)
    net = tiny.controlnets["a"].net
    net.register_to_config(global_pool_conditions=True)
    with pytest.raises(InputError, match="ControlNet shuffle pools its residuals or reads BGR"):
        ControlNet("shuffle", net)


def test_conditioning_pictures(tmp_path: Path) -> None:
    model = steered_model("digits", nets=("a",))
    net, folder = model.controlnets["a"], tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (32, 32), 51).save(folder / "grey.png")
    Image.new("RGB", (32, 32), (255, 255, 255)).save(folder / "colour.png")
    Image.new("L", (32, 16)).save(folder / "flat.png")
    Image.new("L", (32, 32)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    (folder / "text.png").write_text("no picture")
    grey = read_control_image("grey.png", folder, net, model)
    assert grey.shape == (1, 1, 32, 32)
    assert torch.equal(grey, torch.full_like(grey, 51 / 255))
    assert read_control_image("colour.png", folder, net, model).shape == (1, 1, 32, 32)
    for path in ("../outside.png", "link.png"):
        with pytest.raises(InputError, match="lies outside the folder of conditioning pictures"):
            read_control_image(path, folder, net, model)
    with pytest.raises(
        InputError, match=r"flat\.png: a conditioning picture for digits has 32x32 .*; this one has 16x32"
    ):
        read_control_image("flat.png", folder, net, model)
    with pytest.raises(InputError, match=r"none\.png: there is no such conditioning picture"):
        read_control_image("none.png", folder, net, model)
    with pytest.raises(InputError, match=r"text\.png: this is not a picture that can be read"):
        read_control_image("text.png", folder, net, model)
    Image.new("I;16", (32, 32), 1000).save(folder / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: this picture has values of more than 8 bits"):
        read_control_image("deep.png", folder, net, model)
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png: this is no file"):
        read_control_image("pipe.png", folder, net, model)
    tiny = steered_model("tiny-sd", nets=("a",))
    Image.new("L", (64, 64), 102).save(folder / "large.png")
    assert read_control_image("large.png", folder, tiny.controlnets["a"], tiny).shape == (1, 3, 64, 64)


def test_unets_that_cannot_be_split_are_refused() -> None:
    model = load_model("tiny-sd")
    model.unet.register_to_config(center_input_sample=True)
    split = type(model.split)(model.unet)
    with pytest.raises(InputError, match="Only UNets with a mid block that are conditioned on text alone can be split"):
        split(model.example_rows(1, model.encode_prompt("")), lambda: None)
