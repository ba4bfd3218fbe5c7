"""Loading: names, folders, the hub, sizes, and errors as one sentence."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from synerdiff.core import InputError
from synerdiff.diffusion import SHIPPED
from synerdiff.diffusion.architectures import empty_modules, fill_randomly, read_architecture
from synerdiff.diffusion.checkpoint import load_model

torch.set_num_threads(1)


def millions(*modules):
    return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 1)


@pytest.mark.parametrize(("name", "unet_millions"), [("sd15", 859.5), ("sdxl", 2567.5)])
def test_the_true_architectures_have_their_published_sizes(name, unet_millions):
    unet, vae = empty_modules(read_architecture(name))
    assert millions(unet) == unet_millions
    assert millions(vae.decoder, vae.post_quant_conv) == 49.5


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_repeatable_and_stay_finite(name, dtype):
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
    assert float(state.last_difference.abs().max()) > 0


def test_random_weights_refuse_modules_with_buffers():
    with pytest.raises(InputError, match="has buffers"):
        fill_randomly(torch.nn.BatchNorm2d(3, device="meta"), torch.device("cpu"), torch.float32)


def test_resolutions():
    model = load_model("tiny-sdxl", resolution=(96, 64))
    state = model.start(1, 2, 4.0)
    assert state.latent.shape == (1, 4, 12, 8)
    assert model._time_ids.tolist() == [[96, 64, 0, 0, 96, 64]]
    model.step([state])
    assert model.decode(state.latent).shape == (1, 3, 96, 64)
    with pytest.raises(InputError, match="sides are multiples of 16 pixels, not 72x64"):
        load_model("tiny-sd", resolution=(72, 64))


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 400
    return text


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError) as error:
        load_model("stable-fusion")
    text = one_sentence(error)
    for name in ("stable-fusion", "digits", "sd15", "sdxl"):
        assert name in text


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hub model nobody/nothing") as error:
        load_model("nobody/nothing")
    one_sentence(error)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "has a UNet2DModel and a AutoencoderKL"),
        ("scheduler/scheduler_config.json", {"_class_name": "MagicScheduler"}, "no scheduler MagicScheduler"),
        ("unet/config.json", None, "Cannot load the folder"),
        ("vae/diffusion_pytorch_model.safetensors", None, "Cannot load the folder"),
        ("class_tokens.safetensors", None, None),
    ],
)
def test_broken_folders_are_one_sentence(tmp_path, part, change, message):
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


def test_devices_that_are_not_there():
    with pytest.raises(InputError, match="no device nonsense"):
        load_model("digits", device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no usable CUDA GPU"):
            load_model("digits", device="cuda")


def test_prompts_of_digits():
    model = load_model("digits")
    assert model.start(27, 2).prompt == "7"
    assert torch.equal(model.encode_prompt("7").tokens, model.start(27, 2).condition.tokens)
    for prompt in ("10", "cat", "-1", ""):
        with pytest.raises(InputError, match="class from 0 to 9"):
            model.encode_prompt(prompt)


def test_another_folder_with_class_tokens_loads_like_digits(tmp_path):
    shutil.copytree(SHIPPED["digits"], tmp_path / "other")
    model = load_model(tmp_path / "other")
    assert model.start(3, 2).prompt == "3"
    assert torch.equal(model.start(3, 2).condition.tokens, load_model("digits").start(3, 2).condition.tokens)


def test_the_package_and_the_chunkings_import_without_torch():
    code = "import synerdiff.diffusion, synerdiff.diffusion.decoder, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
