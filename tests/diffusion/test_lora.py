"""LoRAs: what may be read, and weights that hold exactly the sum of the products and come back to the last bit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from synerdiff.core import InputError
from synerdiff.diffusion.architectures import empty_modules, read_architecture
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.lora import LoraFile, LoraLayer, _from_kohya, random_lora, read_lora, save_lora
from synerdiff.diffusion.merging import MergedWeights

torch.set_num_threads(1)

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
POINTWISE = "mid_block.attentions.0.proj_in"


def drawn(*shape: Any, seed: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora_of(
    unet: Any,
    name: str,
    seed: int,
    modules: Any = (LINEAR, CONV, POINTWISE),
    rank: int = 3,
    alpha: float = 2.0,
    dtype: Any = torch.float32,
) -> Any:
    """Random halves for a linear layer, a 3x3 convolution and a 1x1 convolution."""
    layers = {}
    for i, module in enumerate(sorted(modules)):
        weight = unet.get_submodule(module).weight
        down = 0.3 * drawn(rank, *weight.shape[1:], seed=seed + i)
        up = 0.3 * drawn(weight.shape[0], rank, *[1] * (weight.dim() - 2), seed=seed + 50 + i)
        layers[module] = LoraLayer(down.to(dtype), up.to(dtype), alpha / rank)
    return LoraFile(name, 0, layers)


def weights_of(unet: Any) -> dict[Any, Any]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def equal(one: Any, other: Any) -> Any:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restored_weights_are_the_originals_to_the_last_bit(dtype: Any) -> None:
    unet = load_model("tiny-sd", dtype=dtype).unet
    before, merged = weights_of(unet), MergedWeights(unet)
    places = {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()}
    one, other = lora_of(unet, "one", 1), lora_of(unet, "other", 2, (LINEAR, CONV))
    merged.merge(one, 0.7)
    merged.merge(other, -1.3)
    assert merged.held == {"one": 0.7, "other": -1.3}
    changed = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{module}.weight" for module in (LINEAR, CONV, POINTWISE)}
    merged.restore()
    assert merged.held == {}
    assert equal(before, unet.state_dict())
    # Written in place: a CUDA graph that reads these addresses sees every change.
    assert places == {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()}


def test_two_loras_equal_the_sum_of_each_ones_own_product() -> None:
    unet = load_model("tiny-sd").unet
    before = weights_of(unet)
    one, other = lora_of(unet, "one", 1), lora_of(unet, "other", 2)
    merged = MergedWeights(unet)
    merged.merge(one, 0.7)
    merged.merge(other, 1.4)
    for module in (LINEAR, CONV, POINTWISE):
        (a_down, a_up, _), (b_down, b_up, _) = one.layers[module], other.layers[module]
        alpha_over_rank = 2.0 / 3.0
        a = a_up.double().flatten(1) @ a_down.double().flatten(1)
        b = b_up.double().flatten(1) @ b_down.double().flatten(1)
        shape = before[f"{module}.weight"].shape
        expected = before[f"{module}.weight"].double() + alpha_over_rank * (0.7 * a + 1.4 * b).view(shape)
        weight = unet.get_submodule(module).weight
        assert torch.allclose(weight.double(), expected, atol=1e-6)
        # Summing the halves first would add cross terms, which are far from small.
        crossed = (a_up + b_up).flatten(1) @ (a_down + b_down).flatten(1)
        assert float((crossed - (a + b)).abs().max()) > 0.1


def test_the_order_of_merges_and_what_was_held_before_do_not_matter() -> None:
    unets = [load_model("tiny-sd").unet for _ in range(4)]
    one, other, third = (lora_of(unets[0], name, seed) for name, seed in (("one", 1), ("other", 2), ("third", 3)))
    plans = (
        [(one, 0.5), (other, 1.5)],
        [(other, 1.5), (one, 0.5)],
        [(third, 1.0), (one, 2.0), (other, 1.5), (one, 0.5)],
    )
    for unet, plan in zip(unets, plans, strict=False):
        merged = MergedWeights(unet)
        for lora, scale in plan:
            merged.merge(lora, scale)
        merged.restore(keep=("one", "other"))
        assert merged.held == {"one": 0.5, "other": 1.5}
        assert equal(weights_of(unets[0]), unet.state_dict())
    merged.restore(keep=("other",))
    alone = MergedWeights(unets[3])
    alone.merge(other, 1.5)
    assert equal(weights_of(unets[3]), unets[2].state_dict())


def test_merging_again_at_the_same_scale_changes_nothing_and_needs_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = load_model("tiny-sd").unet
    merged, one = MergedWeights(unet), lora_of(unet, "one", 1)
    merged.merge(one, 0.5)
    monkeypatch.setattr(LoraLayer, "product", lambda self: pytest.fail("computed again"))
    merged.merge(one, 0.5)
    assert merged.held == {"one": 0.5}


def test_half_precision_weights_are_rounded_once() -> None:
    unet = load_model("tiny-sd", dtype=torch.bfloat16).unet
    before = unet.get_submodule(LINEAR).weight.clone()
    one, other = (lora_of(unet, name, seed, (LINEAR,)) for name, seed in (("one", 1), ("other", 2)))
    merged = MergedWeights(unet)
    merged.merge(one, 0.7)
    merged.merge(other, 1.4)
    total = before.float() + 0.7 * one.layers[LINEAR].product() + 1.4 * other.layers[LINEAR].product()
    assert torch.equal(unet.get_submodule(LINEAR).weight, total.to(torch.bfloat16))


def test_a_merge_that_fails_leaves_the_weights_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = load_model("tiny-sd").unet
    before, merged = weights_of(unet), MergedWeights(unet)
    merged.merge(lora_of(unet, "one", 1), 1.0)
    calls = []

    def product(self: Any) -> Any:
        calls.append(self)
        if len(calls) > 2:
            raise torch.cuda.OutOfMemoryError("no memory left")
        return torch.zeros(self.up.shape[0], *self.down.shape[1:])

    monkeypatch.setattr(LoraLayer, "product", product)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        merged.merge(lora_of(unet, "other", 2), 1.0)
    assert merged.held == {}
    assert equal(before, unet.state_dict())


def peft_file(unet: Any, folder: Path, name: str, seed: int, alpha: int = 6) -> None:
    """A LoRA that diffusers and peft made and saved, its halves random."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v", "conv1", "proj_in"]), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if "lora_" in key and f".{name}." in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    unet.save_lora_adapter(folder, adapter_name=name, weight_name=f"{name}.safetensors")
    unet.delete_adapters(name)


def test_merges_equal_diffusers_own_fuse(tmp_path: Path) -> None:
    model, theirs = load_model("tiny-sd"), load_model("tiny-sd").unet
    for name, seed in (("one", 5), ("other", 6)):
        peft_file(load_model("tiny-sd").unet, tmp_path, name, seed)
        theirs.load_lora_adapter(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name, prefix=None)
    merged = MergedWeights(model.unet)
    for name, scale in (("one", 0.8), ("other", -0.5)):
        lora = read_lora(f"{name}.safetensors", tmp_path)
        assert lora.name == name
        assert lora.size_bytes == (tmp_path / f"{name}.safetensors").stat().st_size
        assert {layer.scaling for layer in lora.layers.values()} == {6 / 4}
        merged.merge(lora, scale)
    theirs.set_adapters(["one", "other"], [0.8, -0.5])
    theirs.fuse_lora()
    fused = {name.replace(".base_layer", ""): tensor for name, tensor in theirs.state_dict().items()}
    ours = model.unet.state_dict()
    changed = [name for name in ours if name.endswith(("to_q.weight", "to_v.weight", "conv1.weight", "proj_in.weight"))]
    assert len(changed) == len(lora.layers)
    for name in ours:
        assert torch.allclose(ours[name], fused[name], atol=2e-6), name
    assert float((ours[changed[0]] - load_model("tiny-sd").unet.state_dict()[changed[0]]).abs().max()) > 0.01


def test_what_is_saved_is_read_again_here_and_by_diffusers(tmp_path: Path) -> None:
    model, theirs = load_model("tiny-sdxl"), load_model("tiny-sdxl").unet
    saved = save_lora(random_lora(model.unet, "random", 4), tmp_path / "style.safetensors")
    lora = read_lora("style.safetensors", tmp_path)
    assert (lora.name, lora.size_bytes) == (saved.name, saved.size_bytes) == ("style", saved.size_bytes)
    attentions = [name for name, _ in model.unet.named_modules() if name.endswith((".to_q", ".to_out.0"))]
    assert len(lora.layers) == 2 * len(attentions)
    MergedWeights(model.unet).merge(lora, 1.0)
    theirs.load_lora_adapter(str(tmp_path), weight_name="style.safetensors", adapter_name="style", prefix="unet")
    theirs.fuse_lora()
    module = next(iter(lora.layers))
    assert torch.allclose(
        model.unet.get_submodule(module).weight, theirs.get_submodule(module).base_layer.weight, atol=1e-6
    )
    assert all(float(layer.product().abs().max()) > 1e-4 for layer in lora.layers.values())


def test_older_names_of_diffusers_are_read(tmp_path: Path) -> None:
    unet = load_model("tiny-sd").unet
    layer = lora_of(unet, "x", 1, (LINEAR,)).layers[LINEAR]
    names = {f"unet.{LINEAR}.lora.down.weight": layer.down, f"unet.{LINEAR}.lora.up.weight": layer.up}
    save_file(names, tmp_path / "old.safetensors")
    read = read_lora(tmp_path / "old.safetensors", tmp_path).layers[LINEAR]
    assert torch.equal(read.down, layer.down)
    assert torch.equal(read.up, layer.up)
    assert read.scaling == 1.0  # no alpha anywhere: the rank


def kohya_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


@pytest.mark.parametrize("style", ["kohya", "peft", "peft adapter", "metadata", "adapter_config"])
def test_foreign_names_and_alphas_merge_as_by_hand(tmp_path: Path, style: str) -> None:
    """Layers of ranks 2 and 4 and alphas 3 and 8, which the file, its metadata or the file beside it says."""
    unet, tensors, alphas = load_model("tiny-sd").unet, {}, {LINEAR: 3, CONV: 8, POINTWISE: 8}
    before, ranks = weights_of(unet), {LINEAR: 2, CONV: 4, POINTWISE: 4}
    expected = {}
    for i, (module, rank) in enumerate(ranks.items()):
        weight = unet.get_submodule(module).weight
        down = 0.3 * drawn(rank, *weight.shape[1:], seed=i)
        up = 0.3 * drawn(weight.shape[0], rank, *[1] * (weight.dim() - 2), seed=i + 50)
        change = (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape) * alphas[module] / rank
        expected[f"{module}.weight"] = before[f"{module}.weight"].double() + 0.5 * change
        if style == "kohya":
            name, halves = kohya_name(module), ("lora_down", "lora_up")
            tensors[f"{name}.alpha"] = torch.tensor(alphas[module])
        else:
            name = f"unet.{module}" if style == "metadata" else f"base_model.model.{module}"
            halves = ("lora_A.default", "lora_B.default") if style == "peft adapter" else ("lora_A", "lora_B")
        if style.startswith("peft"):
            tensors[f"{name}.alpha"] = torch.tensor(float(alphas[module]))
        tensors |= {f"{name}.{halves[0]}.weight": down, f"{name}.{halves[1]}.weight": up}
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {LINEAR: 2}, "alpha_pattern": {"attn1.to_q": 3, "q": 99}}
    metadata = None
    if style == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    if style == "adapter_config":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata=metadata)
    MergedWeights(unet).merge(read_lora("adapter_model.safetensors", tmp_path), 0.5)
    for name, weight in unet.state_dict().items():
        assert torch.allclose(weight.double(), expected.get(name, before[name].double()), atol=1e-6), name
    assert not torch.equal(unet.get_submodule(LINEAR).weight, before[f"{LINEAR}.weight"])


def test_every_layer_of_sdxl_is_found_by_its_kohya_name() -> None:
    unet, _ = empty_modules(read_architecture("sdxl"))
    modules = [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(modules) > 700
    assert [name for name in modules if _from_kohya(name.replace(".", "_")) != name] == []


@pytest.mark.parametrize(
    ("original", "module"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        (
            "input_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
            "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_out.0",
        ),
        ("input_blocks_8_1_proj_in", "down_blocks.2.attentions.1.proj_in"),
        ("middle_block_0_out_layers_3", "mid_block.resnets.0.conv2"),
        (
            "middle_block_1_transformer_blocks_9_ff_net_0_proj",
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        ),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        (
            "output_blocks_0_1_transformer_blocks_0_attn1_to_k",
            "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
        ),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
        ("out_2", "conv_out"),
    ],
)
def test_names_of_the_original_sdxl_code_are_diffusers_layers(original: str, module: str) -> None:
    """As kohya's SDXL files have them."""
    assert _from_kohya(original) == module
    empty_modules(read_architecture("sdxl"))[0].get_submodule(module)


def test_images_change_with_a_lora_and_come_back(tmp_path: Path) -> None:
    model = load_model("digits")
    lora, merged, latents = lora_of(model.unet, "one", 1), MergedWeights(model.unet), []
    for scale in (0.0, 0.5, 0.0):
        merged.restore()
        if scale:
            merged.merge(lora, scale)
        state = model.start(3, 4, 4.0)
        while not state.done:
            model.step([state])
        latents.append(state.latent)
    assert torch.equal(latents[0], latents[2])
    assert float((latents[0] - latents[1]).abs().max()) > 0.05


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """A folder of LoRAs with a good one in it, and a good one outside."""
    unet = load_model("tiny-sd").unet
    (tmp_path / "loras").mkdir()
    for place in (tmp_path / "loras" / "good.safetensors", tmp_path / "outside.safetensors"):
        save_lora(lora_of(unet, "good", 1), place)
    return tmp_path / "loras"


def test_only_safetensors_inside_the_folder_are_read(folder: Path) -> None:
    assert read_lora("good.safetensors", folder).name == "good"
    os.symlink(folder.parent / "outside.safetensors", folder / "link.safetensors")
    for path in ("../outside.safetensors", folder.parent / "outside.safetensors", "link.safetensors"):
        with pytest.raises(InputError, match=r"lies outside the folder of LoRAs, .*loras\.$"):
            read_lora(path, folder)
    torch.save({}, folder / "pickled.bin")
    with pytest.raises(InputError, match=r"pickled\.bin: a LoRA must be a \.safetensors file"):
        read_lora("pickled.bin", folder)
    with pytest.raises(InputError, match=r"missing\.safetensors: there is no such LoRA"):
        read_lora("missing.safetensors", folder)
    (folder / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match=r"folder\.safetensors: there is no such LoRA"):
        read_lora("folder.safetensors", folder)


def test_broken_files_are_refused(folder: Path) -> None:
    good = (folder / "good.safetensors").read_bytes()
    for name, content in (("cut", good[:-10]), ("empty", b""), ("text", b"no tensors here at all")):
        (folder / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.safetensors: this is not a whole safetensors file \(.*\)\.$"):
            read_lora(f"{name}.safetensors", folder)
    save_file({}, folder / "none.safetensors")
    with pytest.raises(InputError, match=r"none\.safetensors: this file holds no LoRA layers"):
        read_lora("none.safetensors", folder)


def written(folder: Path, change: Any, metadata: Any = None) -> Any:
    tensors = load_file(folder / "good.safetensors")
    change(tensors)
    save_file(tensors, folder / "bad.safetensors", metadata=metadata)
    return folder / "bad.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}), r"the tensor lora_unet_x\.hada_w1_a is none"),
        (
            lambda t: t.update({"text_encoder.q_proj.lora_A.weight": torch.ones(2, 2)}),
            r"text_encoder\.q_proj is one of a text encoder",
        ),
        (
            lambda t: t.update({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)}),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1 is one of a text encoder",
        ),
        (lambda t: t.update({"lora_unet_x.dora_scale": torch.ones(2)}), r"lora_unet_x\.dora_scale is one of a DoRA"),
        (
            lambda t: t.update({f"unet.{LINEAR}.lora_magnitude_vector": torch.ones(2)}),
            r"lora_magnitude_vector is one of a DoRA",
        ),
        (
            lambda t: t.update({f"lora_unet_{LINEAR.replace('.', '_')}.lora_up.weight": torch.ones(32, 3)}),
            rf"the layer {LINEAR} has two up",
        ),
        (lambda t: t.pop(f"unet.{LINEAR}.lora_B.weight"), rf"the layer {LINEAR} has no up matrix"),
        (lambda t: t.pop(f"unet.{LINEAR}.lora_A.weight"), rf"the layer {LINEAR} has no down matrix"),
        (lambda t: t.update({f"{LINEAR}.lora_A.weight": torch.ones(2, 2)}), rf"the layer {LINEAR} has two down"),
        (
            lambda t: t.update({f"unet.{LINEAR}.lora_B.weight": torch.ones(32, 5)}),
            rf"in layer {LINEAR} a down matrix of \(3, 32\) and an up matrix of \(32, 5\) make no product",
        ),
        (
            lambda t: t[f"unet.{LINEAR}.lora_A.weight"].fill_(float("nan")),
            rf"the down tensor of layer {LINEAR} holds values that are not finite",
        ),
        (
            lambda t: t.update({f"unet.{LINEAR}.alpha": torch.tensor(1 + 2j)}),
            rf"the alpha tensor of layer {LINEAR} holds values that are not finite numbers",
        ),
        (
            lambda t: t.update({f"unet.{LINEAR}.alpha": torch.ones(2)}),
            rf"the alpha of layer {LINEAR} must be one number, not 2",
        ),
    ],
)
def test_wrong_layers_are_named(folder: Path, change: Any, message: str) -> None:
    path = written(folder, change)
    with pytest.raises(InputError, match=r"bad\.safetensors: .*" + message):
        read_lora(path, folder)


def test_loras_in_eight_bits_are_read(folder: Path) -> None:
    layer = f"unet.{LINEAR}.lora_A.weight"
    path = written(folder, lambda t: t.update({layer: t[layer].to(torch.float8_e4m3fn)}))
    assert read_lora(path, folder).layers[LINEAR].product().isfinite().all()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        (json.dumps({"use_dora": True}), "made with use_dora"),
        (
            json.dumps({"unet.alpha_pattern": {"(a+)+$": 2}}),
            "alpha_pattern of its lora_adapter_metadata must map names",
        ),
        (json.dumps({"unet.alpha_pattern": [1]}), "alpha_pattern of its lora_adapter_metadata must map names"),
        (json.dumps({"unet.alpha_pattern": {"to_q": True}}), "alpha of layer .*to_q in its settings must be a number"),
        (json.dumps({"lora_alpha": "much"}), "in its settings must be a number, not 'much'"),
        ('{"lora_alpha": NaN}', "in its settings must be a number, not nan"),
        (f'{{"lora_alpha": 1{"0" * 400}}}', "in its settings must be a number, not 10000"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused(folder: Path, metadata: Any, message: str) -> None:
    def without_alphas(tensors: Any) -> None:
        for name in [name for name in tensors if name.endswith(".alpha")]:
            del tensors[name]

    path = written(folder, without_alphas, {"lora_adapter_metadata": metadata})
    with pytest.raises(InputError, match=message):
        read_lora(path, folder)


def test_a_lora_of_another_model_is_refused_before_any_change(folder: Path) -> None:
    unet = load_model("digits").unet
    before, merged = weights_of(unet), MergedWeights(unet)
    with pytest.raises(InputError, match=rf"LoRA good: its layer {POINTWISE} changes a weight of .*; the model's is"):
        merged.merge(read_lora("good.safetensors", folder))
    foreign = LoraFile("foreign", 0, {"down_blocks.7.conv1": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    with pytest.raises(InputError, match=r"LoRA foreign: this model has no layer down_blocks\.7\.conv1 that a LoRA"):
        merged.merge(foreign)
    assert merged.held == {}
    assert equal(before, unet.state_dict())


def test_random_loras_are_repeatable_and_have_the_size_of_their_rank() -> None:
    unet = load_model("tiny-sd").unet
    small, again, large = (random_lora(unet, "x", rank, seed=3) for rank in (2, 2, 4))
    module = next(iter(small.layers))
    assert torch.equal(small.layers[module].up, again.layers[module].up)
    assert large.size_bytes == 2 * small.size_bytes
