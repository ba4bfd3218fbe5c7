"""Batched steps: mixed batches against samples alone, modes against hand-written loops, padding and buckets."""

import copy
from typing import Any

import pytest
import torch

from synerdiff.core import CONDITIONAL, GUIDED, REUSE, InputError
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.model import image_seed
from synerdiff.diffusion.rows import bucket_of, rows_of

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly so on a busy machine

PLANS = [  # seed, steps, guidance, prompt, modes by step (g, c, r), the step of the batch at which it joins
    (11, 6, 4.0, "1", "gggggg", 0),
    (12, 9, 7.5, "2", "ggrgrgrgr", 0),
    (13, 5, 1.0, "3", "ccccc", 1),
    (14, 8, 2.0, "4", "ggcgrccg", 2),
    (15, 7, 5.0, "5", "grrrrrr", 3),
]
MODES = {"g": GUIDED, "c": CONDITIONAL, "r": REUSE}
SCHEDULERS = ["ddim", "euler", "dpm++2m", "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
SCHEDULERS += ["EulerAncestralDiscreteScheduler", "DEISMultistepScheduler"]


def start_all(model: Any) -> list[Any]:
    return [model.start(seed, steps, guidance, prompt) for seed, steps, guidance, prompt, _, _ in PLANS]


def mode_at(plan: Any, index: Any) -> Any:
    letters = plan[4]
    return MODES[letters[index % len(letters)] if index else letters[0]]


def run_mixed(model: Any, pad_rows: int = 0) -> Any:
    """All plans in one changing batch: samples join late and leave when done."""
    states = start_all(model)
    tick = 0
    while any(not state.done for state in states):
        batch = [i for i, state in enumerate(states) if PLANS[i][5] <= tick and not state.done]
        batch = batch[tick % len(batch) :] + batch[: tick % len(batch)]  # the order must not matter
        modes = [mode_at(PLANS[i], states[i].step_index) for i in batch]
        model.step([states[i] for i in batch], modes, pad_rows)
        tick += 1
    return states


def run_alone(model: Any) -> Any:
    states = start_all(model)
    for plan, state in zip(PLANS, states, strict=True):
        while not state.done:
            model.step([state], [mode_at(plan, state.step_index)])
    return states


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_mixed_batch_equals_every_sample_alone(scheduler: Any) -> None:
    model = load_model("digits", scheduler=scheduler)
    for mixed, alone in zip(run_mixed(model), run_alone(model), strict=True):
        assert alone.latent.isfinite().all()
        assert float((mixed.latent - alone.latent).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_mixed_batches_of_other_architectures(name: str) -> None:
    model = load_model(name)
    for mixed, alone in zip(run_mixed(model, pad_rows=2), run_alone(model), strict=True):
        assert float((mixed.latent - alone.latent).abs().max()) < 1e-4 * float(alone.latent.abs().max())


def test_padding_and_buckets_change_rows_and_not_results() -> None:
    model = load_model("digits")
    plain, padded = model.start(5, 6, 4.0), model.start(5, 6, 4.0)
    assert model.step([plain]) == 2
    assert model.step([padded], pad_rows=3) == 5
    model.row_buckets = (1, 2, 4, 8)
    assert model.step([plain], [REUSE]) == 1
    assert model.step([padded], [REUSE], pad_rows=2) == 4
    assert float((plain.latent - padded.latent).abs().max()) < 1e-5
    seen = []
    eager = model.denoise
    model.denoise = lambda inputs: (seen.append([len(t) for t in inputs.tensors()]), eager(inputs))[1]  # type: ignore[func-returns-value]
    assert model.step([plain, padded, model.start(6, 6, 1.0)]) == 8
    assert seen == [[8, 8, 8]]


def test_rows_are_counted_by_mode_and_bucketed() -> None:
    assert rows_of([GUIDED, REUSE, CONDITIONAL, GUIDED]) == 6
    assert bucket_of(6, None) == 6
    assert bucket_of(6, (4, 16, 8)) == 8
    with pytest.raises(InputError, match="9 rows exceeds the largest row bucket, 8"):
        bucket_of(9, (4, 8))


@torch.inference_mode()
def ddim_by_hand(model: Any, seed: int, steps: Any, guidance: Any, digit: Any, letters: Any) -> Any:
    """Guidance and DDIM written out, one forward per row, from the formulas."""
    alphas = model.solver._scheduler.alphas_cumprod.double()
    condition = model.encode_prompt(str(digit))
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    stride = 1000 // steps
    last = None
    for index in range(steps):
        t = (steps - 1 - index) * stride + 1
        time = torch.tensor([float(t)])
        eps_c = model.unet(latent, time, condition.tokens).sample
        if letters[index] == "g":
            eps_u = model.unet(latent, time, condition.unconditional_tokens).sample
            last = eps_c - eps_u
            eps = eps_u + guidance * (eps_c - eps_u)
        elif letters[index] == "r":
            eps = eps_c + (guidance - 1) * last
        else:
            eps = eps_c
        a, b = alphas[t], alphas[max(t - stride, 0)]
        x0 = (latent - (1 - a).sqrt() * eps) / a.sqrt()
        latent = (b.sqrt() * x0 + (1 - b).sqrt() * eps).float()
    return latent


@pytest.mark.parametrize("letters", ["gggggggg", "gcgcgcgc", "ggrrgrrr", "gggcrcrg", "cccccccc"])
def test_modes_follow_their_formulas(letters: str) -> None:
    model = load_model("digits")
    state = model.start(21, 8, 5.0, "6")
    companion = model.start(22, 8, 3.0, "2")
    for letter in letters:
        model.step([companion, state], [GUIDED, MODES[letter]])
    expected = ddim_by_hand(model, 21, 8, 5.0, 6, letters)
    assert float((state.latent - expected).abs().max()) < 1e-4


def test_modes_differ_from_each_other() -> None:
    model = load_model("digits")
    ends = []
    for letters in ("gggggggg", "ggggcccc", "ggggrrrr"):
        state = model.start(21, 8, 5.0, "6")
        for letter in letters:
            model.step([state], [MODES[letter]])
        ends.append(state.latent)
    assert float((ends[0] - ends[1]).abs().max()) > 0.05
    assert float((ends[0] - ends[2]).abs().max()) > 1e-3
    # Adding the last difference again stays nearer to full guidance than dropping it.
    assert float((ends[0] - ends[2]).norm()) < float((ends[0] - ends[1]).norm())


def test_reuse_keeps_the_difference_of_the_last_guided_step() -> None:
    model = load_model("digits")
    state = model.start(21, 8, 5.0)
    model.step([state])
    kept = copy.deepcopy(state.last_difference)
    model.step([state], [REUSE])
    model.step([state], [CONDITIONAL])
    assert torch.equal(state.last_difference, kept)  # type: ignore[arg-type]
    model.step([state], [GUIDED])
    assert not torch.equal(state.last_difference, kept)  # type: ignore[arg-type]


def test_similarity_of_the_two_x0_matches_two_forwards() -> None:
    model = load_model("digits")
    state = model.start(21, 8, 5.0, "6")
    for _ in range(4):
        before, t = state.latent.clone(), state.progress.timesteps[state.step_index]
        model.step([state])
    alpha = model.solver._scheduler.alphas_cumprod[int(t)]  # type: ignore[attr-defined]
    with torch.inference_mode():
        x0s = [
            (before - (1 - alpha).sqrt() * model.unet(before, torch.tensor([t]), tokens).sample) / alpha.sqrt()
            for tokens in (state.condition.tokens, state.condition.unconditional_tokens)
        ]
    expected = torch.cosine_similarity(x0s[0].flatten(), x0s[1].flatten(), dim=0)
    assert model.x0_similarity(state) == pytest.approx(float(expected), abs=1e-4)
    assert 0 < model.x0_similarity(state) < 1


def test_rules_of_a_step() -> None:
    model = load_model("digits")
    guided, unguided = model.start(1, 2, 4.0), model.start(2, 2, 1.0)
    with pytest.raises(ValueError, match="needs an earlier guided step"):
        model.step([guided], [REUSE])
    with pytest.raises(ValueError, match="mode conditional"):
        model.step([unguided], [GUIDED])
    with pytest.raises(ValueError, match="each of them once"):
        model.step([guided, guided])
    with pytest.raises(ValueError, match="at least one sample"):
        model.step([])
    assert model.step([unguided]) == 1
    assert model.step([unguided]) == 1
    with pytest.raises(ValueError, match="all of its 2 steps"):
        model.step([unguided])
    assert guided.step_index == 0


def test_denoiser_calls_are_counted_by_timesteps() -> None:
    assert load_model("digits").denoiser_calls(20) == 20
    assert load_model("digits", scheduler="HeunDiscreteScheduler").denoiser_calls(20) == 39
    assert load_model("digits", scheduler="HeunDiscreteScheduler").start(1, 20).steps == 39
    with pytest.raises(InputError, match="at least 1 step"):
        load_model("digits").start(1, 0)


def test_seeds_of_images() -> None:
    model = load_model("digits")
    assert image_seed(5, 0) == 5
    seeds = {image_seed(seed, image) for seed in range(30) for image in range(8)}
    assert len(seeds) == 240
    first, again, other = model.start(5, 4, image=1), model.start(5, 4, image=1), model.start(6, 4)
    assert torch.equal(first.latent, again.latent)
    assert not torch.equal(first.latent, other.latent)
    assert first.prompt == "5"
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model.start(5, 4).latent, expected)
