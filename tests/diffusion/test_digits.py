"""The embedded model: its data split, its classifier, its images, and its training script in miniature."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from synerdiff.diffusion import SHIPPED
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.digits import digits_split, load_classifier
from tools.training import train_digits
from tools.training.digits_images import augment, recognised_fraction

torch.set_num_threads(1)


def test_the_split_is_complete_disjoint_and_balanced() -> None:
    split = digits_split()
    assert len(split.train.labels) + len(split.held_out.labels) == 1797
    assert 350 <= len(split.held_out.labels) <= 360
    for part in (split.train, split.held_out):
        assert part.images.shape[1:] == (1, 32, 32)
        assert float(part.images.min()) == -1
        assert float(part.images.max()) <= 1
        assert len(part.labels.unique()) == 10  # type: ignore[no-untyped-call]
    assert torch.bincount(split.held_out.labels).min() >= 34
    train = {image.numpy().tobytes() for image in split.train.images}
    assert not any(image.numpy().tobytes() in train for image in split.held_out.images)


def test_augmentation_is_light_and_repeatable() -> None:
    images = digits_split().train.images[:64]
    moved = augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(moved, images)
    assert float((moved - images).abs().mean()) < 0.3
    assert recognised_fraction(load_classifier(), moved, digits_split().train.labels[:64]) > 0.95


def test_the_classifier_knows_real_digits_and_doubts_noise() -> None:
    held_out, classifier = digits_split().held_out, load_classifier()
    assert recognised_fraction(classifier, held_out.images, held_out.labels) >= 0.98
    assert recognised_fraction(classifier, held_out.images, (held_out.labels + 1) % 10) < 0.02


def test_generated_digits_are_recognised() -> None:
    model, classifier = load_model("digits"), load_classifier()
    states = [model.start(1000 + seed, 25, 4.0, str(seed % 10)) for seed in range(64)]
    while not states[0].done:
        model.step(states)
    images = model.decode(torch.cat([state.latent for state in states])).clamp(-1, 1)
    labels = torch.arange(64) % 10
    assert recognised_fraction(classifier, images, labels) >= 0.95
    # Different seeds of one class differ: nothing collapsed to one image per class.
    assert float((images[0] - images[10]).abs().mean()) > 0.05


def test_reconstruction_of_held_out_images() -> None:
    model = load_model("digits")
    assert train_digits.vae_psnr_db(model.vae, digits_split().held_out) > 36


def test_the_model_card_states_what_was_measured() -> None:
    quality = json.loads((SHIPPED["digits"] / "quality.json").read_text())
    card = (SHIPPED["digits"] / "MODEL_CARD.md").read_text()
    for name in ("vae_psnr_db_held_out", "classifier_accuracy_held_out", "recognised_fraction_256"):
        assert str(quality[name]) in card, name


@pytest.mark.parametrize("stop", [False, True])
def test_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: bool) -> None:
    monkeypatch.setattr(train_digits, "STAGES", {"vae": None, "unet": train_digits.Stage(4, 8, 1e-3, 0.9)})
    torch.manual_seed(3)
    weights = torch.nn.Linear(3, 3)

    def loss_of(model: Any, generator: Any, batch: Any) -> Any:
        if stop and not (tmp_path / "stopped").exists() and loss_of.calls == 2:  # type: ignore[attr-defined]
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        loss_of.calls += 1  # type: ignore[attr-defined]
        return model(torch.randn(batch, 3, generator=generator)).square().mean()

    loss_of.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(train_digits, "CHECKPOINT_EVERY_S", -1.0)
    arguments = ("unet", weights, loss_of, tmp_path, 5, float("inf"))
    if stop:
        with pytest.raises(KeyboardInterrupt):
            train_digits.train_stage(*arguments)
    trained = train_digits.train_stage(*arguments)
    torch.manual_seed(3)
    straight = torch.nn.Linear(3, 3)
    (tmp_path / "straight").mkdir()
    other = train_digits.train_stage("unet", straight, loss_of, tmp_path / "straight", 5, float("inf"))
    assert torch.equal(trained.weight, other.weight)  # type: ignore[arg-type]


def test_the_average_forgets_the_random_start() -> None:
    value = torch.tensor(100.0)
    for updates in range(1, 1400):
        value = train_digits.warmed_up_average(0.999)(value, torch.tensor(1.0), updates)
    assert float(value) == pytest.approx(1.0, abs=0.01)
