"""A small classifier of 32x32 digits: the gate against gross failure of `digits`. It saturates: no quality measure."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import nn

from synerdiff.diffusion.digits_data import LabelledImages, augment

SHIPPED_WEIGHTS = Path(__file__).parent / "models" / "digits" / "classifier.safetensors"
STYLES_WEIGHTS = SHIPPED_WEIGHTS.with_name("classifier-styles.safetensors")
"""The same classifier, trained on plain and styled digits alike."""


class DigitsClassifier(nn.Module):
    """(n, 1, 32, 32) images in [-1, 1] -> (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * 16, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(images)
        return logits


def train_classifier(data: LabelledImages, seed: int = 0, epochs: int = 20) -> DigitsClassifier:
    """Train on real images only (about half a minute on two cores); the same seed gives the same classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitsClassifier().train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
        batch = 64
        batches = len(data.labels) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
        for _ in range(epochs):
            order = torch.randperm(len(data.labels), generator=generator)
            for start in range(0, batches * batch, batch):
                chosen = order[start : start + batch]
                logits = classifier(augment(data.images[chosen], generator))
                loss = functional.cross_entropy(logits, data.labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return classifier.eval()


def save_classifier(classifier: DigitsClassifier, path: Path) -> None:
    """Write the weights in half precision."""
    from safetensors.torch import save_file

    save_file({name: tensor.half().contiguous() for name, tensor in classifier.state_dict().items()}, path)


def load_classifier(path: Path = SHIPPED_WEIGHTS) -> DigitsClassifier:
    """Read the classifier that ships with `digits`, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    classifier = DigitsClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval()


@torch.inference_mode()
def recognised_fraction(classifier: DigitsClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of (n, 1, 32, 32) images in [-1, 1] whose most likely class is the given label."""
    return float((classifier(images.float()).argmax(dim=1) == labels).float().mean())
