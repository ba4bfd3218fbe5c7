"""Train the embedded model `digits` from nothing: `python -m tools.training.train_digits --out DIR`.

About 12 minutes on two quiet cores: a classifier (the gate), the VAE, then the UNet on its latents. Every step
draws from a generator seeded by (seed, stage, step), so a run that was interrupted, or stopped by --max-seconds,
continues from its checkpoint with the same numbers. Weights still differ in their last bits between thread counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn

from profiler.operations import CONFIGS
from synerdiff.diffusion.digits import LabelledImages, digits_split
from tools.training.digits_images import augment, recognised_fraction, save_classifier, train_classifier

CONFIG = json.loads((CONFIGS / "digits.json").read_text(encoding="utf-8"))
CLASSES = 10
UNCONDITIONAL = 10
TOKENS = 2
CONDITION_DROPOUT = 0.1
KL_WEIGHT = 1e-6
VARIANTS_PER_IMAGE = 16
CHECKPOINT_EVERY_S = 30.0
T = TypeVar("T")
Loss = Callable[[nn.Module, torch.Generator, int], torch.Tensor]
"""What a model loses on a batch of so many, drawn by that generator."""


class Stage(NamedTuple):
    """`averaging`: decay of the moving average of the weights; 0 keeps the last ones."""

    steps: int
    batch: int
    peak_rate: float
    averaging: float


STAGES = {
    "vae": Stage(1400, 32, 2e-3, 0.0),
    "unet": Stage(2400, 64, 1.5e-3, 0.999),
    "lora": Stage(800, 48, 3e-3, 0.99),
    "controlnet": Stage(900, 48, 1e-3, 0.99),
}


class OutOfTime(Exception):
    """The time asked for with --max-seconds is used up; the checkpoint is written."""


class TrainedTokens(nn.Module):
    """Class labels (n,) -> (n, 2, cross_attention_dim) tokens; label 10 means unconditional."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(CLASSES + 1, TOKENS, CONFIG["unet"]["cross_attention_dim"]))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.table[labels]


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """One independent stream of random numbers per (seed, stage, step): what makes a run resumable."""
    return torch.Generator().manual_seed(seed * 10_000_019 + list(STAGES).index(stage) * 1_000_003 + step)


def warmed_up_average(decay: float) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]:
    """Exponential moving average whose decay rises to `decay`, so that the random start is soon forgotten.

    A fixed decay of 0.999 would leave a quarter of the untrained weights in after 1,400 steps.
    """

    def average(averaged: torch.Tensor, current: torch.Tensor, updates: torch.Tensor | int) -> torch.Tensor:
        weight = min(decay, (1 + int(updates)) / (10 + int(updates)))
        return averaged + (1.0 - weight) * (current - averaged)

    return average


def train_stage(stage: str, model: nn.Module, loss_of: Loss, folder: Path, seed: int, deadline_s: float) -> nn.Module:
    """Minimise `loss_of` over the stage's steps and return the model with averaged weights; resumes by itself.

    Raises OutOfTime when `deadline_s` (monotonic seconds) passes.
    """
    steps, batch, peak_rate, averaging = STAGES[stage]
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=warmed_up_average(averaging))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.05)
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    checkpoint = folder / f"checkpoint-{stage}.pt"
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state.pop("done")
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def save() -> None:
        temporary = checkpoint.with_suffix(".tmp")
        torch.save({"done": done, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
        temporary.replace(checkpoint)

    saved_at, recent = time.monotonic(), 0.0
    while done < steps:
        loss = loss_of(model, step_generator(seed, stage, done), batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        done += 1
        value = float(loss.detach())
        recent = value if recent == 0.0 else 0.98 * recent + 0.02 * value
        if done % 50 == 0:
            print(f"{stage} {done}/{steps} loss {recent:.5f}", flush=True)
        now = time.monotonic()
        if done == steps or now > deadline_s or now - saved_at > CHECKPOINT_EVERY_S:
            save()
            saved_at = now
        if done < steps and now > deadline_s:
            raise OutOfTime(f"{stage} {done}/{steps}")
    averaged: nn.Module = average.module
    return averaged.eval()


def vae_loss(data: LabelledImages) -> Loss:
    """Squared error of the reconstruction and a small Kullback-Leibler weight on the latents."""

    def loss_of(model: Any, generator: torch.Generator, batch: int) -> torch.Tensor:
        chosen = torch.randint(len(data.labels), (batch,), generator=generator)
        images = augment(data.images[chosen], generator)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        loss: torch.Tensor = functional.mse_loss(decoded, images) + KL_WEIGHT * posterior.kl().mean()
        return loss

    return loss_of


def unet_loss(latents: torch.Tensor, labels: torch.Tensor, scheduler: Any) -> Loss:
    """Predict the noise (epsilon) at a random timestep; the class is dropped in a tenth of the rows."""

    def loss_of(model: Any, generator: torch.Generator, batch: int) -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        # Stratified timesteps: each batch covers the whole range, which steadies the gradient of small batches.
        timesteps = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long()
        dropped = torch.rand(batch, generator=generator) < CONDITION_DROPOUT
        conditions = torch.where(dropped, torch.tensor(UNCONDITIONAL), labels[chosen])
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = model["unet"](noisy, timesteps, model["tokens"](conditions)).sample
        return functional.mse_loss(predicted, noise)

    return loss_of


@torch.inference_mode()
def encode_variants(vae: Any, data: LabelledImages, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (unscaled) of VARIANTS_PER_IMAGE augmented copies of every training image, and their labels."""
    generator = torch.Generator().manual_seed(seed + 77)
    latents = []
    for variant in range(VARIANTS_PER_IMAGE):
        images = data.images if variant == 0 else augment(data.images, generator)
        latents += [vae.encode(part).latent_dist.mean for part in torch.split(images, 128)]
    return torch.cat(latents).clone(), data.labels.repeat(VARIANTS_PER_IMAGE)


@torch.inference_mode()
def vae_psnr_db(vae: Any, data: LabelledImages) -> float:
    """Mean over images of 10 log10(2^2 / MSE): the images span [-1, 1]."""
    values = []
    for images in torch.split(data.images, 120):
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(values).mean())


@torch.inference_mode()
def sample_images(
    unet: Any, tokens: TrainedTokens, vae: Any, labels: torch.Tensor, steps: int = 25, guidance_scale: float = 4.0
) -> torch.Tensor:
    """Plain DDIM with guidance, one generator for all: (n,) labels -> (n, 1, 32, 32) images in [-1, 1]."""
    scheduler = DDIMScheduler.from_config(CONFIG["scheduler"])  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(steps)
    latents = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(4242))
    conditions = tokens(torch.cat([labels, torch.full_like(labels, UNCONDITIONAL)]))
    for timestep in scheduler.timesteps:
        conditional, unconditional = unet(torch.cat([latents, latents]), timestep, conditions).sample.chunk(2)
        noise = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    images: torch.Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return images.clamp(-1, 1)


def train(out: Path, seed: int, deadline_s: float) -> dict[str, float]:
    """Train whatever is missing under `out`, write the model folder there and return the measured quality."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    split = digits_split()
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(**CONFIG["vae"])  # type: ignore[no-untyped-call]
    unet: Any = UNet2DConditionModel(**CONFIG["unet"])  # type: ignore[no-untyped-call]
    denoiser: Any = nn.ModuleDict({"unet": unet, "tokens": TrainedTokens()})
    denoiser.to(memory_format=torch.channels_last)

    vae = train_stage("vae", vae.to(memory_format=torch.channels_last), vae_loss(split.train), out, seed, deadline_s)
    cached = out / "checkpoint-latents.pt"
    if not cached.exists():
        torch.save(encode_variants(vae, split.train, seed), cached.with_suffix(".tmp"))
        cached.with_suffix(".tmp").replace(cached)
    latents, labels = torch.load(cached, weights_only=True)
    scaling_factor = round(1.0 / float(latents.std()), 6)
    vae.register_to_config(scaling_factor=scaling_factor)
    scheduler = DDIMScheduler.from_config(CONFIG["scheduler"])  # type: ignore[no-untyped-call]
    loss_of = unet_loss(latents * scaling_factor, labels, scheduler)
    trained: Any = train_stage("unet", denoiser, loss_of, out, seed, deadline_s)
    classifier = train_classifier(split.train, seed)

    # Quality is measured on the weights that ship: rounded to half precision, computed in single.
    for module in (vae, trained, classifier):
        module.half().float()
    vae.half().save_pretrained(out / "vae")
    trained["unet"].half().save_pretrained(out / "unet")
    vae.float(), trained.float()
    scheduler.save_pretrained(out / "scheduler")
    save_file({"tokens": trained["tokens"].table.detach().half().contiguous()}, out / "class_tokens.safetensors")
    save_classifier(classifier, out / "classifier.safetensors")

    wanted = torch.arange(256) % CLASSES
    made = sample_images(trained["unet"], trained["tokens"], vae, wanted)
    quality = {
        "vae_psnr_db_held_out": round(vae_psnr_db(vae, split.held_out), 2),
        "classifier_accuracy_held_out": round(
            recognised_fraction(classifier, split.held_out.images, split.held_out.labels), 4
        ),
        "recognised_fraction_256": round(recognised_fraction(classifier, made, wanted), 4),
        "scaling_factor": scaling_factor,
        "parameters": sum(p.numel() for module in (vae, trained) for p in module.parameters()),
    }
    (out / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    return quality


def parser_of(description: str, threads: int) -> argparse.ArgumentParser:
    """The options that the training commands share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and what is finished")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="stop after this long; run again")
    return parser


def before_deadline(arguments: argparse.Namespace, train: Callable[[Path, int, float], T]) -> T:
    """What (out, seed, deadline in monotonic seconds) trains; exit code 75 when the time is over before."""
    torch.set_num_threads(arguments.threads)
    try:
        return train(arguments.out, arguments.seed, time.monotonic() + arguments.max_seconds)
    except OutOfTime as progress:
        print(f"stopped at {progress}; run the same command again to continue")
        raise SystemExit(75) from None


if __name__ == "__main__":
    print(json.dumps(before_deadline(parser_of("Train the embedded model digits.", 2).parse_args(), train), indent=2))
