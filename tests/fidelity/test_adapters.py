"""The bound study, on a tiny model: what it compares, what it writes, and that it leaves the model as it found it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from synerdiff.cli import main
from synerdiff.core import InputError
from synerdiff.diffusion import SHIPPED_LORAS
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.controlnet import load_controlnet
from synerdiff.diffusion.digits import digits_split
from synerdiff.diffusion.lora import LoraFile, LoraLayer, random_lora, read_lora, save_lora
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.fidelity.adapters import bound_study, outline_study, overlap_of
from synerdiff.fidelity.sampling import Subject, psnr_db_of, ssim_of
from tools.training.digits_images import slanted

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = [Subject(seed, str(seed)) for seed in range(3)]


def strong_lora(unet: Any, name: str = "style", seed: int = 0) -> Any:
    made = random_lora(unet, name, 4, seed)
    layers = {module: layer._replace(up=layer.up * 20) for module, layer in made.layers.items()}
    return LoraFile(name, made.size_bytes, layers)


def images_of(model: Any, lora: Any, merged_at: Any, steps: int = 6) -> Any:
    """The subjects' images one by one, merged by hand before step ``merged_at``."""
    found = []
    for subject in SUBJECTS:
        weights = MergedWeights(model.unet)
        state = model.start(subject.seed, steps, 4.0, subject.prompt)
        for step in range(steps):
            if step == merged_at:
                weights.merge(lora, 0.5)
            model.step([state])
        weights.restore()
        found.append((model.decode(state.latent).float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(found)


def test_every_bound_is_compared_with_merging_at_once() -> None:
    model = load_model("digits")
    lora = strong_lora(model.unet)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    heard = []
    result = bound_study(
        model,
        lora,
        SUBJECTS,
        scale=0.5,
        steps=6,
        bounds=(3, 1, 9),
        batch=2,
        gate=lambda images, prompts: torch.tensor([prompt != "0" for prompt in prompts]).float(),
        on_progress=lambda what, share: heard.append((what, share)),
    )
    assert [row.bound_steps for row in result.rows] == [0, 1, 3, 6]
    first, *_, last = result.rows
    assert (first.ssim, first.effect, first.psnr_db) == (pytest.approx(1.0), 1.0, 100.0)  # type: ignore[comparison-overlap]
    assert last.effect == 0.0
    by_hand = {bound: images_of(model, lora, bound) for bound in (0, 3, None)}
    third = result.rows[2]
    assert third.ssim == pytest.approx(float(ssim_of(by_hand[3], by_hand[0]).mean()), abs=1e-3)
    assert third.psnr_db == pytest.approx(float(psnr_db_of(by_hand[3], by_hand[0]).mean()), abs=0.05)
    change = (by_hand[0] - by_hand[None]).flatten(1)
    left = ((by_hand[3] - by_hand[None]).flatten(1) * change).sum(1) / change.square().sum(1)
    assert third.effect == pytest.approx(float(left.mean()), abs=2e-3)
    assert third.ssim_low < third.ssim < third.ssim_high
    assert [row.recognised for row in result.rows] == [0.6667] * 4
    assert result.sheet[3].shape == (3, 32, 32, 1)
    assert heard[-1] == ("style after at most 6 steps", 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.unet.state_dict().items())


def test_a_lora_that_changes_nothing_is_refused() -> None:
    model = load_model("digits")
    module = "mid_block.resnets.0.conv1"
    shape = model.unet.get_submodule(module).weight.shape
    layer = LoraLayer(torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, 1, 1), 1.0)
    with pytest.raises(InputError, match="LoRA nothing at scale 1 does not change the images"):
        bound_study(model, LoraFile("nothing", 0, {module: layer}), SUBJECTS[:2], steps=2)


def lean_of(images: Any) -> Any:
    """Columns per line by which bright pixels lean to the right, from their second moments; mean over images."""
    weights = (images[:, 0] + 1).clamp(min=0)
    lines, columns = (torch.arange(32.0) - 15.5).view(1, 32, 1), (torch.arange(32.0) - 15.5).view(1, 1, 32)
    total = weights.sum((1, 2))
    y = lines - ((weights * lines).sum((1, 2)) / total).view(-1, 1, 1)
    x = columns - ((weights * columns).sum((1, 2)) / total).view(-1, 1, 1)
    return float(-((weights * x * y).sum((1, 2)) / (weights * y * y).sum((1, 2))).mean())


def test_the_shipped_lora_makes_digits_lean() -> None:
    model = load_model("digits")
    weights, leans = MergedWeights(model.unet), []
    for scale in (0.0, 0.5, 1.0):
        weights.merge(read_lora("slanted.safetensors", SHIPPED_LORAS), scale)
        states = [model.start(seed, 10, 4.0, str(seed)) for seed in range(10)]
        while not states[0].done:
            model.step(states)
        leans.append(lean_of(torch.cat([model.decode(state.latent) for state in states])))
    held_out = digits_split().held_out.images
    real = [lean_of(images) for images in (held_out, slanted(held_out))]
    assert real[1] - real[0] > 0.3
    assert leans[0] < leans[1] < leans[2]
    assert leans[2] - leans[0] > 0.5 * (real[1] - real[0])


def test_the_shipped_controlnet_lays_digits_out() -> None:
    model = load_model("digits")
    result = outline_study(
        model, load_controlnet("outline", model), lambda images, prompts: torch.ones(len(prompts)), samples=10, steps=10
    )
    assert result.overlap[0.0].value < 0.5 < 0.65 < result.overlap[1.0].value
    assert [label for label, _ in result.sheet][-1] == "ControlNet at 1"
    assert model.controlnets == {}


def test_the_page_says_what_was_measured() -> None:
    page = (ROOT / "docs" / "swiftdiffusion.md").read_text(encoding="utf-8")
    with (SHIPPED_LORAS.parent / "lora-bound.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bound_steps"]) for row in rows] == [0, 1, 2, 3, 5, 8, 12, 16, 20, 25]
    for row in rows:
        ssim, low, high = (float(row[name]) for name in ("ssim", "ssim_low", "ssim_high"))
        assert f"| {ssim:.3f} ({low:.3f}-{high:.3f}) |" in page
        effect, low, high = (float(row[name]) for name in ("effect", "effect_low", "effect_high"))
        assert f"| {effect:.2f} ({low:.2f}-{high:.2f}) | {float(row['recognised']):.0%} |" in page


def test_overlap_is_intersection_over_union() -> None:
    ours, theirs = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    ours[0, 0, 0, :3], theirs[0, 0, 0, 1:] = 1, 1
    assert overlap_of(ours, theirs).tolist() == [0.5, 0.0]


def test_the_command_writes_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(strong_lora(load_model("tiny-sd").unet), tmp_path / "loras" / "style.safetensors")
    out = tmp_path / "out"
    common = ["fidelity", "--levers", "lora-bound", "--random-weights", "--model", "tiny-sd", "--out", str(out)]
    few = ["--samples", "4", "--steps", "3", "--bound", "1"]
    loras = ["--loras", str(tmp_path / "loras")]
    assert main([*common, *few, *loras]) == 0
    printed = capsys.readouterr().out
    with (out / "lora-bound.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["lora"], row["bound_steps"], row["recognised"]) for row in rows] == [
        ("style", "0", ""),
        ("style", "1", ""),
        ("style", "3", ""),
    ]
    assert 0 < float(rows[1]["ssim"]) < 1
    assert f"{float(rows[1]['ssim']):.3f}" in printed
    for name in ("lora-bound.png", "lora-bound.pdf", "lora-bound-sheet-style-DDIM-3-7.5.png"):
        assert (out / name).stat().st_size > 1000
    for options, message in (
        (["--lora", "other"], "other.safetensors: there is no such LoRA"),
        (["--samples", "1"], "--samples is 1; 4 to 1000000 is allowed"),
        (["--lora-scale", "nan"], "--lora-scale is nan; numbers from -100 to 100 are allowed"),
        (["--bound", "-1"], "--bound is -1; 0 to 1000 is allowed"),
        (["--loras", str(tmp_path)], "this folder holds no LoRAs"),
        (["--levers", "lora"], "--levers names 'lora'; allowed are skips, lora-bound, controlnet"),
        (["--levers", "controlnet"], "lever 'controlnet' judges the outlines of digits; the model is 'tiny-sd'"),
    ):
        assert main([*common, *few, *loras, *options]) == 2
        assert message in capsys.readouterr().err
    assert main(common) == 2
    assert "no LoRAs ship for tiny-sd; name their folder with --loras" in capsys.readouterr().err
    assert main([argument for argument in common if argument != "--random-weights"]) == 2
    assert (
        "model 'tiny-sd' is an architecture with random weights, whose images mean nothing" in capsys.readouterr().err
    )


def test_levers_of_digits_share_a_folder_and_their_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--samples", "4", "--steps", "2", "--guidance-scale", "3", "--guidance-scale", "4", "--bound", "1"]
    assert (
        main(["fidelity", "--levers", "controlnet,lora-bound", "--model", "digits", "--out", str(tmp_path), *few]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("digits: weights trained\n")
    assert printed.count("ControlNet outline at 1: overlap") == 2
    with (tmp_path / "lora-bound.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["guidance_scale"], row["bound_steps"]) for row in rows] == [
        (scale, bound) for scale in ("3.0", "4.0") for bound in "012"
    ]
    assert (tmp_path / "controlnet-outline-DDIM-2-4.png").stat().st_size > 1000
