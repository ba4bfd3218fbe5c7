"""Loading: names, folders, the hub, sizes, and errors as one sentence."""

import ast
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from synerdiff.core import InputError
from synerdiff.diffusion import SHIPPED, checkpoint
from synerdiff.diffusion.architectures import empty_modules, fill_randomly, read_architecture, whole
from synerdiff.diffusion.checkpoint import has_random_weights, load_model
from synerdiff.diffusion.model import DiffusionModel

ROOT = Path(__file__).resolve().parents[2]

torch.set_num_threads(1)


def millions(*modules: Any) -> int:
    return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "unet_millions"), [("sd15", 859.5), ("sdxl", 2567.5)])
def test_the_true_architectures_have_their_published_sizes(name: str, unet_millions: float) -> None:
    unet, vae = empty_modules(read_architecture(name))
    assert millions(unet) == unet_millions
    assert millions(vae.decoder, vae.post_quant_conv) == 49.5


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_repeatable_and_stay_finite(name: str, dtype: Any) -> None:
    model, again = load_model(name, dtype=dtype), load_model(name, dtype=dtype)
    for one, other in zip(model.unet.parameters(), again.unet.parameters(), strict=True):
        assert one.dtype is dtype
        assert torch.equal(one, other)
    state = model.start(1, 4, 7.5)
    while not state.done:
        model.step([state])
    image = model.decode(state.latent).float()
    assert state.latent.dtype is torch.float32
    assert image.isfinite().all()
    assert 0.001 < float(image.std()) < 100
    assert float(state.last_difference.abs().max()) > 0  # type: ignore[union-attr]


def test_random_weights_refuse_modules_with_buffers() -> None:
    with pytest.raises(InputError, match="has buffers"):
        fill_randomly(torch.nn.BatchNorm2d(3, device="meta"), torch.device("cpu"), torch.float32)


def test_resolutions() -> None:
    model = load_model("tiny-sdxl", resolution=(96, 64))
    state = model.start(1, 2, 4.0)
    assert state.latent.shape == (1, 4, 12, 8)
    assert model._time_ids.tolist() == [[96, 64, 0, 0, 96, 64]]  # type: ignore[union-attr]
    model.step([state])
    assert model.decode(state.latent).shape == (1, 3, 96, 64)
    with pytest.raises(InputError, match="sides are multiples of 16 pixels up to 16384, not 72x64"):
        load_model("tiny-sd", resolution=(72, 64))


def one_sentence(error: Any) -> Any:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 400
    return text


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError) as error:
        load_model("stable-fusion")
    text = one_sentence(error)
    for name in ("stable-fusion", "digits", "sd15", "sdxl"):
        assert name in text


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hub model nobody/nothing") as error:
        load_model("nobody/nothing")
    one_sentence(error)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Away:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Away)
    with pytest.raises(InputError, match="hub model nobody/nothing: it is not whole in the hub's cache") as error:
        load_model("nobody/nothing")
    one_sentence(error)
    assert len(asked) == 1
    assert asked[0][1] <= 10


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "has a UNet2DModel and a AutoencoderKL"),
        ("scheduler/scheduler_config.json", {"_class_name": "MagicScheduler"}, "no scheduler MagicScheduler"),
        ("scheduler/scheduler_config.json", {"thresholding": "false"}, "has thresholding 'false'; true or false is"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "a whole number from 1 to 100,000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1000.5}, "num_train_timesteps 1000.5; a whole"),
        ("unet/config.json", {"norm_eps": float("nan")}, "its UNet has norm_eps nan; a number is needed"),
        ("unet/config.json", {"norm_num_groups": True}, "its UNet has norm_num_groups True; a number is needed"),
        ("vae/config.json", {"force_upcast": "no"}, "its VAE has force_upcast 'no'; true or false is needed"),
        ("vae/config.json", {"scaling_factor": None}, "its VAE has scaling_factor None; a number above 0 is needed"),
        ("vae/config.json", {"sample_size": 10**6}, "sides are multiples of 8 pixels up to 16384, not 1000000x"),
        ("unet/config.json", None, "Cannot load the folder"),
        ("vae/diffusion_pytorch_model.safetensors", None, "Cannot load the folder"),
        ("class_tokens.safetensors", None, None),
    ],
)
def test_broken_folders_are_one_sentence(
    tmp_path: Path, part: str, change: dict[str, Any] | None, message: str | None
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(SHIPPED["digits"], folder)
    if change is None:
        (folder / part).unlink()
    else:
        config = json.loads((folder / part).read_text()) | change
        (folder / part).write_text(json.dumps(config))
    if message is None:  # without class tokens it is a checkpoint without text encoders: prompts are random
        assert load_model(folder).start(1, 2, prompt="anything").condition.tokens.shape == (1, 77, 64)
        return
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    one_sentence(error)


@pytest.mark.parametrize(
    ("part", "option", "value", "message"),
    [
        ("unet", "time_cond_proj_dim", 16, "its UNet has time_cond_proj_dim 16, an input that is not fed"),
        ("unet", "num_class_embeds", 20, "its UNet has num_class_embeds 20"),
        ("unet", "class_embed_type", "projection", "its UNet has class_embed_type projection"),
        ("unet", "addition_embed_type", "image", "its UNet has addition_embed_type image"),
        ("unet", "encoder_hid_dim_type", "text_proj", "its UNet has encoder_hid_dim_type text_proj"),
        ("unet", "attention_type", "gated", "its UNet has attention_type gated"),
        ("unet", "cross_attention_dim", [64, 64], "one number is needed"),
        (
            "unet",
            "in_channels",
            9,
            "its UNet reads 9 channels; a text-to-image model's reads as many as its VAE has, 4",
        ),
        ("unet", "out_channels", 8, "its UNet predicts 8 channels for 4 of its VAE"),
        ("vae", "latent_channels", 8, "its UNet reads 4 channels"),
        ("vae", "latents_mean", [0.0] * 4, "its VAE has latents_mean"),
        ("vae", "shift_factor", 0.3, "its VAE has shift_factor 0.3, an input that is not fed"),
        ("unet", "encoder_hid_dim", 64, "its UNet has encoder_hid_dim 64"),
        ("unet", "motion_modules", 2, "its UNet has the option motion_modules, which diffusers does not know"),
        ("unet", "block_out_channels", "wide", "Cannot load the folder"),
        ("unet", "center_input_sample", True, None),
        ("unet", "motion_modules", None, None),
    ],
)
def test_networks_with_inputs_that_are_not_fed_are_refused(
    tmp_path: Path, part: str, option: str, value: Any, message: str | None
) -> None:
    shutil.copytree(SHIPPED["digits"], tmp_path / "copy")
    file = tmp_path / "copy" / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    if message is None:  # served by the class's own forward, or left out by diffusers too
        assert load_model(tmp_path / "copy").weights == "checkpoint"
        return
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path / "copy")
    one_sentence(error)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", "digits cannot run with the scheduler Flow.*not made for UNets; try ddim"),
        ("ScoreSdeVeScheduler", "digits cannot run with the scheduler ScoreSdeVeScheduler: .*; try ddim"),
        ("KarrasVeScheduler", "digits cannot run with the scheduler KarrasVeScheduler: .*sample_hat"),
        ("RePaintScheduler", "digits cannot run with the scheduler RePaintScheduler: .*original_image"),
        ("VQDiffusionScheduler", "The scheduler VQDiffusionScheduler cannot be made of the model's: .*num_vec_classes"),
        ("UnCLIPScheduler", "The scheduler UnCLIPScheduler cannot be made of the model's: .*beta_schedule"),
        ("StableDiffusionPipeline", "There is no scheduler StableDiffusionPipeline; use ddim, euler, dpm"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused_when_the_model_is_opened(scheduler: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_model("digits", scheduler=scheduler)
    one_sentence(error)


def test_a_scheduler_whose_library_is_missing_names_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(type):
        def __getattribute__(cls, name: str) -> Any:
            raise ImportError("SomeScheduler requires the torchsde library but it was not found. Install it with pip.")

    class Absent(metaclass=Missing):
        pass

    monkeypatch.setattr("diffusers.SomeScheduler", Absent, raising=False)
    with pytest.raises(InputError, match="SomeScheduler needs the library torchsde, which is not installed") as error:
        load_model("digits", scheduler="SomeScheduler")
    one_sentence(error)


def test_every_scheduler_of_diffusers_runs_or_is_refused_in_one_sentence() -> None:
    import diffusers

    running, sentences = [], {}
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            try:
                load_model("digits", scheduler=name)
                running.append(name)
            except InputError as error:
                sentences[name] = str(error)
    assert len(running) >= 20
    assert {"PNDMScheduler", "TCDScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"} <= set(running)
    assert len(sentences) >= 20
    bad = {n: s for n, s in sentences.items() if n not in s or not s.endswith(".") or "\n" in s or len(s) > 400}
    assert bad == {}


def test_networks_that_fail_in_a_first_step_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: Any, latent: Any) -> Any:
        raise TypeError("a layer got an unexpected keyword argument")

    monkeypatch.setattr(DiffusionModel, "decode", raises)
    with pytest.raises(InputError, match="Cannot load the model digits: a layer got an unexpected keyword argument"):
        load_model("digits")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(SHIPPED["digits"], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    load_model(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_not_all_there_are_refused(tmp_path: Path, part: str) -> None:
    shutil.copytree(SHIPPED["digits"], tmp_path / "copy")
    file = tmp_path / "copy" / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[7]
    save_file({name: weight for name, weight in weights.items() if name != gone}, file)
    with pytest.raises(InputError, match=f"{part}: its weights lack {gone}; the file is damaged"):
        load_model(tmp_path / "copy")


def test_a_text_encoder_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills them with random numbers, so that prompts mean something else each time."""
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=9, max_position_embeddings=4, **sizes))
    encoder.save_pretrained(tmp_path)
    read: Any = partial(CLIPTextModel.from_pretrained, tmp_path, use_safetensors=True, output_loading_info=True)
    assert isinstance(whole("clip", read()), CLIPTextModel)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {f"x.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"clip: its weights lack .* and \d+ more; the file is damaged"):
        whole("clip", read())


@pytest.mark.parametrize("tokens", [{}, {"tokens": torch.zeros(11, 64)}, {"tokens": torch.zeros(11, 2, 9)}])
def test_class_tokens_fit_their_model(tmp_path: Path, tokens: dict[str, torch.Tensor]) -> None:
    shutil.copytree(SHIPPED["digits"], tmp_path / "copy")
    save_file(tokens, tmp_path / "copy" / "class_tokens.safetensors")
    with pytest.raises(InputError, match=r"class_tokens.safetensors holds numbers|give 9 numbers a token"):
        load_model(tmp_path / "copy")
    (tmp_path / "copy" / "class_tokens.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="Cannot load the folder"):
        load_model(tmp_path / "copy")


def test_every_network_is_read_from_safetensors() -> None:
    calls = []
    for package in ("synerdiff", "profiler", "real_runner", "simulator", "policies", "traces", "benchmarks", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                    calls.append((path, ast.unparse(node)))
    networks = [(path, call) for path, call in calls if "Tokenizer." not in call and "Scheduler." not in call]
    assert len(networks) >= 3
    assert [(path, call) for path, call in networks if "use_safetensors=True" not in call] == []
    assert [
        call for path, call in networks if "synerdiff" in path.parts[-3:] and "output_loading_info" not in call
    ] == []


def test_paths_that_hold_another_thing_say_which(tmp_path: Path) -> None:
    (tmp_path / "dit" / "transformer").mkdir(parents=True)
    (tmp_path / "dit" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_text("[]")
    for name, message in {
        "dit": r"dit is a FluxPipeline \(its denoiser is a transformer\); only pipelines with a UNet2DConditionModel",
        "one.safetensors": r"one\.safetensors is a file; a model is a folder",
        "bad": "this is no index of a diffusers pipeline",
        "": "is a folder without unet, vae and scheduler",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_model(tmp_path / name)
        one_sentence(error)


def test_where_the_weights_come_from(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED["digits"], tmp_path / "copy")
    assert [load_model(name).weights for name in ("digits", "tiny-sd", tmp_path / "copy")] == [
        "trained",
        "random",
        "checkpoint",
    ]
    assert [has_random_weights(name) for name in ("digits", "tiny-sd", "sdxl", "owner/model")] == [
        False,
        True,
        True,
        False,
    ]


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 10**9)
    with pytest.raises(InputError, match=r"weights of sdxl take 10\.6 GB; cpu has 1\.0 GB of memory free"):
        load_model("sdxl")
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"digits take 0\.0 GB"):
        load_model("digits")


def test_devices_that_are_not_there() -> None:
    with pytest.raises(InputError, match="no device nonsense"):
        load_model("digits", device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no usable CUDA GPU"):
            load_model("digits", device="cuda")


def test_prompts_of_digits() -> None:
    model = load_model("digits")
    assert model.start(27, 2).prompt == "7"
    assert torch.equal(model.encode_prompt("7").tokens, model.start(27, 2).condition.tokens)
    for prompt in ("10", "cat", "-1", ""):
        with pytest.raises(InputError, match="class from 0 to 9"):
            model.encode_prompt(prompt)


def test_another_folder_with_class_tokens_loads_like_digits(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED["digits"], tmp_path / "other")
    model = load_model(tmp_path / "other")
    assert model.start(3, 2).prompt == "3"
    assert torch.equal(model.start(3, 2).condition.tokens, load_model("digits").start(3, 2).condition.tokens)


def test_the_package_and_the_chunkings_import_without_torch() -> None:
    code = "import synerdiff.diffusion, synerdiff.diffusion.decoder, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
