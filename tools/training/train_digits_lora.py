"""Train a LoRA that gives `digits` a style: `python -m tools.training.train_digits_lora --out DIR`.

About 6 minutes per style on one core. Rank 8 on every attention projection and every 3x3 convolution of the UNet's
residual blocks, trained on the real digits in that style, with everything else frozen; resumes as `train_digits` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from synerdiff.diffusion.digits import LabelledImages, digits_split, load_classifier
from synerdiff.diffusion.lora import LoraFile, LoraLayer, read_lora, save_lora
from synerdiff.diffusion.merging import MergedWeights
from tools.training.digits_images import STYLES, augment, recognised_fraction, save_classifier, train_classifier
from tools.training.shipped_digits import encode, frozen_digits
from tools.training.train_digits import before_deadline, parser_of, train_stage, unet_loss

RANK = 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
VARIANTS_PER_IMAGE = 8
CLASSIFIER = "classifier-styles.safetensors"


def train(style: str, out: Path, seed: int, deadline_s: float) -> dict[str, Any]:
    """Train the LoRA of one style under `out`, write `style.safetensors` there and return what was measured."""
    folder = out / style
    folder.mkdir(parents=True, exist_ok=True)
    model, tokens, scheduler = frozen_digits()
    data = digits_split().train
    generator = torch.Generator().manual_seed(seed + 177)
    images = torch.cat([STYLES[style](augment(data.images, generator)) for _ in range(VARIANTS_PER_IMAGE)])
    latents, labels = encode(model, images).clone(), data.labels.repeat(VARIANTS_PER_IMAGE)
    torch.manual_seed(seed)
    model.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    parts: Any = nn.ModuleDict({"unet": model.unet, "tokens": tokens}).train()
    trained: Any = train_stage("lora", parts, unet_loss(latents, labels, scheduler), folder, seed, deadline_s)
    state = {name: tensor.half() for name, tensor in get_peft_model_state_dict(trained["unet"]).items()}
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = {
        name.removesuffix(ends[0]): LoraLayer(down, state[name.replace("lora_A", "lora_B")], 1.0)
        for name, down in sorted(state.items())
        if name.endswith(ends[0])
    }
    saved = save_lora(LoraFile(style, 0, layers), out / f"{style}.safetensors")
    return {"style": style, "seed": seed, "layers": len(layers), "size_bytes": saved.size_bytes}


def train_style_classifier(out: Path, seed: int) -> dict[str, Any]:
    """One classifier of digits, plain and in every style, from real images only; its accuracy on held-out ones."""
    split = digits_split()
    views = {"plain": lambda images: images, **STYLES}
    images = torch.cat([view(split.train.images) for view in views.values()])
    classifier = train_classifier(LabelledImages(images, split.train.labels.repeat(len(views))), seed)
    classifier.half().float()
    save_classifier(classifier, out / CLASSIFIER)
    held_out = split.held_out
    return {
        f"accuracy_held_out_{name}": round(recognised_fraction(classifier, view(held_out.images), held_out.labels), 4)
        for name, view in views.items()
    }


def measure(style: str, out: Path) -> dict[str, Any]:
    """Of 256 images with the LoRA (DDIM, 25 steps, guidance 4, classes in turn): the share that is recognised."""
    model, _, _ = frozen_digits()
    MergedWeights(model.unet).merge(read_lora(f"{style}.safetensors", out))
    states = [model.start(seed, 25, 4.0, str(seed % 10)) for seed in range(256)]
    for _ in range(25):
        for start in range(0, len(states), 32):
            model.step(states[start : start + 32])
    images = torch.cat([model.decode(state.latent) for state in states]).clamp(-1, 1)
    share = recognised_fraction(load_classifier(out / CLASSIFIER), images, torch.arange(256) % 10)
    return {"recognised_fraction_256": round(share, 4)}


def main() -> None:
    parser = parser_of("Train LoRAs for the embedded model digits.", 1)
    parser.add_argument("--style", choices=list(STYLES), action="append", help="default: each of them")
    arguments = parser.parse_args()
    out, styles = arguments.out, arguments.style or STYLES
    results = before_deadline(
        arguments, lambda out, seed, deadline_s: [train(one, out, seed, deadline_s) for one in styles]
    )
    if not (out / CLASSIFIER).is_file():
        print(json.dumps(train_style_classifier(out, arguments.seed), indent=2))
    for result in results:
        print(json.dumps({**result, **measure(result["style"], out)}, indent=2))


if __name__ == "__main__":
    main()
