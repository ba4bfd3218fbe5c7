"""Vectorised solvers against diffusers' own schedulers, and whole images against diffusers' own pipelines."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from synerdiff.core import InputError
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.schedulers import CopiedSolver, make_scheduler, make_solver
from synerdiff.diffusion.solvers import LinearSolver

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly so on a busy machine

BASE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
LINEAR = [
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample", "rescale_betas_zero_snr": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "prediction_type": "sample"}),
    ("TCDScheduler", {"clip_sample": False}),
    ("TCDScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    ("LCMScheduler", {"prediction_type": "v_prediction"}),
    ("LCMScheduler", {"prediction_type": "sample"}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small_log"}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large", "steps_offset": 0}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "use_karras_sigmas": True}),
]


def fake_denoiser(inputs: Any, timestep: Any) -> Any:
    """Bounded, nonlinear, and different at every timestep."""
    return torch.sin(3.0 * inputs + float(timestep) / 300.0)


def as_the_pipelines_step(scheduler: Any, noise: Any, steps: int, seed: int) -> tuple[list[float], list[Any]]:
    """diffusers' own loop: the timesteps, and the latent after each; the scheduler gets what a pipeline gives it."""
    known, generator = inspect.signature(scheduler.step).parameters, torch.Generator().manual_seed(seed)
    more = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in known}
    scheduler.set_timesteps(steps)
    latents = [noise * getattr(scheduler, "init_noise_sigma", 1.0)]
    for t in scheduler.timesteps:
        scaled = latents[-1]
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(scaled, t)
        latents.append(scheduler.step(fake_denoiser(scaled, t), t, latents[-1], return_dict=False, **more)[0])
    return [float(t) for t in scheduler.timesteps], latents[1:]


@pytest.mark.parametrize(("name", "options"), LINEAR)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_tables_equal_the_scheduler_itself(name: str, options: Any, steps: int) -> None:
    solver = make_solver(make_scheduler(name, BASE | options))
    assert isinstance(solver, LinearSolver)
    # No multiple of 16 numbers: torch would draw those in another order at once than one latent after the other.
    noise = torch.randn(1, 3, 5, 3, generator=torch.Generator().manual_seed(1))
    timesteps, expected = as_the_pipelines_step(make_scheduler(name, BASE | options), noise, steps, 5)
    progress = solver.start(steps, torch.Generator().manual_seed(5), noise)
    actual = noise * progress.initial_noise_scale
    assert list(progress.timesteps) == timesteps
    for index, t in enumerate(timesteps):
        output = fake_denoiser(solver.denoiser_inputs([progress], [index], actual), t)
        actual = solver.advance([progress], [index], actual, output)
        wanted = expected[index]
        assert float((actual - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max())), index


def test_a_batch_of_noisy_and_plain_steps_gives_each_sample_what_it_gets_alone() -> None:
    """The one at its last step adds no noise, the others theirs; a step that is repeated adds the same again."""
    solver = make_solver(make_scheduler("EulerAncestralDiscreteScheduler", BASE))
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    progress = [solver.start(steps, torch.Generator().manual_seed(steps), latent) for steps in (3, 5, 8)]
    done, stacked = [2, 1, 6], torch.cat([latent] * 3)
    outputs = fake_denoiser(solver.denoiser_inputs(progress, done, stacked), 0)
    together = solver.advance(progress, done, stacked, outputs)
    for i in range(3):
        alone = solver.advance([progress[i]], [done[i]], latent, outputs[i : i + 1])
        assert torch.allclose(alone, together[i : i + 1], atol=1e-6)
    assert solver.start(3, torch.Generator()).noise is None, "a schedule that is only looked at draws nothing"  # type: ignore[attr-defined]


def test_steps_of_no_length_are_refused_before_a_sample_starts() -> None:
    options = {"use_karras_sigmas": True, "solver_type": "heun", "final_sigmas_type": "sigma_min"}
    solver = make_solver(
        make_scheduler("DPMSolverMultistepScheduler", BASE | options | {"timestep_spacing": "linspace"})
    )
    assert len(solver.start(14, torch.Generator()).timesteps) == 14
    with pytest.raises(
        InputError, match=r"DPMSolverMultistepScheduler .* cannot make 15 steps: one of them has no length"
    ):
        solver.start(15, torch.Generator())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("HeunDiscreteScheduler", {}),
        ("TCDScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large_log"}),
        ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
        ("EulerDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_what_the_tables_cannot_do_runs_as_copies(name: str, options: dict[Any, Any] | dict[str, Any]) -> None:
    assert isinstance(make_solver(make_scheduler(name, BASE | options)), CopiedSolver)


def test_noise_without_a_share_of_the_image_is_refused() -> None:
    options = {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InputError, match="cannot make 20 steps: one of them has no length, or starts from noise alone"):
        make_solver(make_scheduler("DDIMScheduler", BASE | options)).start(20, torch.Generator())


def test_a_step_that_a_scheduler_cannot_take_is_one_sentence() -> None:
    options = {"timestep_spacing": "trailing", "num_train_timesteps": 100, "use_karras_sigmas": True}
    scheduler = make_scheduler("EulerDiscreteScheduler", BASE | options | {"sigma_max": 80.0, "sigma_min": 0.002})
    solver, latent = CopiedSolver(scheduler), torch.zeros(1, 4, 8, 8)
    progress = solver.start(16, torch.Generator())
    for done in range(15):
        latent = solver.advance([progress], [done], latent, latent)
    with pytest.raises(InputError, match="EulerDiscreteScheduler with this model's options cannot make 16 steps: "):
        solver.advance([progress], [15], latent, latent)


COPIED = ["HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler"]
COPIED += ["DEISMultistepScheduler", "KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler", "DDPMScheduler"]
COPIED += ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler", "TCDScheduler"]


@pytest.mark.parametrize("name", COPIED)
def test_copies_of_a_scheduler_do_not_disturb_each_other(name: str) -> None:
    """Three samples with different step counts, interleaved, against a fresh scheduler for each alone."""
    solver = CopiedSolver(make_scheduler(name, BASE))
    plans = [(6, 1), (9, 2), (13, 3)]
    starts = [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for _, seed in plans]

    expected = []
    for (steps, seed), noise in zip(plans, starts, strict=True):
        scheduler, generator = make_scheduler(name, BASE), torch.Generator().manual_seed(seed)
        known = inspect.signature(scheduler.step).parameters
        draws = {key: value for key, value in (("generator", generator), ("eta", 0.0)) if key in known}
        scheduler.set_timesteps(steps)
        latent = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = fake_denoiser(scheduler.scale_model_input(latent, t), t)
            latent = scheduler.step(output, t, latent, **draws).prev_sample
        expected.append(latent)

    progress = [solver.start(steps, torch.Generator().manual_seed(seed)) for steps, seed in plans]
    latents = [noise * one.initial_noise_scale for noise, one in zip(starts, progress, strict=True)]
    done = [0, 0, 0]
    while live := [i for i in range(3) if done[i] < len(progress[i].timesteps)]:
        batch, counts = [progress[i] for i in live], [done[i] for i in live]
        stacked = torch.cat([latents[i] for i in live])
        inputs = solver.denoiser_inputs(batch, counts, stacked)
        times = [progress[i].timesteps[done[i]] for i in live]
        outputs = torch.cat([fake_denoiser(inputs[k : k + 1], t) for k, t in enumerate(times)])
        advanced = solver.advance(batch, counts, stacked, outputs)
        for k, i in enumerate(live):
            latents[i] = advanced[k : k + 1]
            done[i] += 1
    for latent, wanted in zip(latents, expected, strict=True):
        assert torch.equal(latent, wanted)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++2m"])
def test_guided_digits_equal_a_plain_diffusers_loop(scheduler: str) -> None:
    model = load_model("digits", scheduler=scheduler)
    states = [model.start(31, 12, 4.0, "3"), model.start(32, 12, 4.0, "8")]
    while not states[0].done:
        model.step(states)
    reference = make_scheduler(type(model.solver._scheduler).__name__, model.solver._scheduler.config)  # type: ignore[attr-defined]
    reference.set_timesteps(12)
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (31, 32)]
    latents = torch.cat(noise) * reference.init_noise_sigma
    conditions = [model.encode_prompt("3"), model.encode_prompt("8")]
    tokens = torch.cat([c.unconditional_tokens for c in conditions] + [c.tokens for c in conditions])
    with torch.inference_mode():
        for t in reference.timesteps:
            inputs = reference.scale_model_input(torch.cat([latents] * 2), t)
            unconditional, conditional = model.unet(inputs, t, tokens).sample.chunk(2)
            noise_guess = unconditional + 4.0 * (conditional - unconditional)
            latents = reference.step(noise_guess, t, latents).prev_sample
    actual = torch.cat([state.latent for state in states])
    assert float((actual - latents).abs().max()) < 1e-4


def tiny_tokenizer(folder: Path) -> Any:
    folder.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *[letter + "</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text("{" + ", ".join(f'"{w}": {i}' for i, w in enumerate(words)) + "}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=9)


def tiny_encoder(kind: str, seed: int, width: int = 32) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=9,
        projection_dim=width,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return kind(config).eval()  # type: ignore[operator]


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sd")
    random = load_model("tiny-sd")
    pipeline = StableDiffusionPipeline(  # type: ignore[no-untyped-call]
        vae=random.vae,
        unet=random.unet,
        text_encoder=tiny_encoder(CLIPTextModel, 0),  # type: ignore[arg-type]
        tokenizer=tiny_tokenizer(folder / "own"),
        scheduler=make_scheduler("DDIMScheduler", BASE | {"clip_sample": False}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "saved")  # type: ignore[attr-defined]
    return folder / "saved", pipeline


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sdxl")
    random = load_model("tiny-sdxl")
    tokenizer = tiny_tokenizer(folder / "own")
    pipeline = StableDiffusionXLPipeline(  # type: ignore[no-untyped-call]
        vae=random.vae,
        unet=random.unet,
        text_encoder=tiny_encoder(CLIPTextModel, 0),  # type: ignore[arg-type]
        text_encoder_2=tiny_encoder(CLIPTextModelWithProjection, 1),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=make_scheduler("EulerDiscreteScheduler", BASE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "saved")  # type: ignore[attr-defined]
    return folder / "saved", pipeline


@pytest.mark.parametrize("folder", ["sd_folder", "sdxl_folder"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_a_checkpoint_folder_makes_the_images_of_its_own_pipeline(
    folder: str, guidance_scale: float, request: Any
) -> None:
    path, pipeline = request.getfixturevalue(folder)
    pipeline.set_progress_bar_config(disable=True)
    sides = {"height": 64, "width": 64}
    expected = pipeline(
        "a red cat",
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
        **sides,
    ).images
    model = load_model(path)
    assert (model.height, model.width) == (64, 64)
    state = model.start(9, 6, guidance_scale, "a red cat")
    while not state.done:
        model.step([state])
    assert float((state.latent - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    other = model.start(9, 6, guidance_scale, "a blue dog")
    assert not torch.equal(other.condition.tokens, state.condition.tokens)
    assert model.decode(state.latent).shape == (1, 3, 64, 64)


def edited(folder: Path, file: str, **changes: Any) -> None:
    """Change a JSON file of a checkpoint; an option that becomes None is taken out."""
    known = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in known.items() if value is not None}))


@pytest.mark.parametrize(
    ("fixture", "kind", "file", "changes"),
    [
        ("sd_folder", StableDiffusionPipeline, "scheduler/scheduler_config.json", {"steps_offset": 0}),
        ("sd_folder", StableDiffusionPipeline, "scheduler/scheduler_config.json", {"clip_sample": True}),
        ("sdxl_folder", StableDiffusionXLPipeline, "model_index.json", {"force_zeros_for_empty_prompt": None}),
        ("sdxl_folder", StableDiffusionXLPipeline, "scheduler/scheduler_config.json", {"steps_offset": 0}),
    ],
)
def test_options_that_the_pipeline_changes_or_fills_in_are_served_as_it_serves_them(
    fixture: str, kind: Any, file: str, changes: dict[str, Any], tmp_path: Path, request: Any
) -> None:
    folder = shutil.copytree(request.getfixturevalue(fixture)[0], tmp_path / "copy")
    edited(folder, file, **changes)
    pipeline = kind.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    more = {"generator": torch.Generator().manual_seed(9), "output_type": "latent", "height": 64, "width": 64}
    expected = pipeline("a cat", num_inference_steps=4, guidance_scale=5.0, **more).images
    model = load_model(folder)
    state = model.start(9, 4, 5.0, "a cat")
    while not state.done:
        model.step([state])
    assert float((state.latent - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_other_pipelines_and_options_that_they_have_are_refused_by_name(tmp_path: Path, sd_folder: Any) -> None:
    folder = shutil.copytree(sd_folder[0], tmp_path / "copy")
    edited(folder, "model_index.json", controlnet=["diffusers", "ControlNetModel"])
    with pytest.raises(InputError, match=r"model_index\.json has controlnet, which a StableDiffusionPipeline does not"):
        load_model(folder)
    edited(folder, "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    with pytest.raises(
        InputError, match="copy is a StableDiffusionInpaintPipeline; served are StableDiffusionPipeline"
    ):
        load_model(folder)
    edited(folder, "model_index.json", _class_name="StableDiffusionPipeline", controlnet=None)
    edited(folder, "model_index.json", scheduler=["diffusers", "TCDScheduler"])
    with pytest.raises(InputError, match="names the scheduler TCDScheduler, its scheduler's own file DDIMScheduler"):
        load_model(folder)
    edited(folder, "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edited(folder, "text_encoder/config.json", use_attention_mask=True)
    with pytest.raises(InputError, match="its text_encoder has use_attention_mask, an input that is not fed"):
        load_model(folder)


class Remembering:
    """A scheduler of the kind that appends to a list made at construction; set_timesteps does not renew it."""

    init_noise_sigma = 1.0

    def __init__(self) -> None:
        self.history: list[Any] = []

    def set_timesteps(self, steps: Any) -> None:
        self.timesteps = torch.arange(steps, 0, -1)

    def scale_model_input(self, latents: Any, timestep: Any) -> Any:
        return latents

    def step(self, output: Any, timestep: Any, latents: Any, return_dict: Any) -> Any:
        self.history.append(output)
        return (latents + sum(self.history),)


def test_histories_that_a_shallow_copy_would_share_are_separate() -> None:
    solver = CopiedSolver(Remembering())
    progress = [solver.start(2, torch.Generator()) for _ in range(2)]
    latents, outputs = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    for done in range(2):
        latents = solver.advance(progress, [done, done], latents, outputs)
    assert latents.flatten().tolist() == [3.0, 30.0]
    assert solver.start(2, torch.Generator()).scheduler.history == []


class Brownian(Remembering):
    """A scheduler with a noise source of its own, as DPMSolverSDE has one."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_sampler_seed: int | None = None

    def step(self, output: Any, timestep: Any, latents: Any, return_dict: Any) -> Any:
        assert self.noise_sampler_seed is not None
        return (latents + torch.randn(1, generator=torch.Generator().manual_seed(self.noise_sampler_seed)),)


def test_a_noise_source_of_its_own_gets_the_seed_of_the_sample() -> None:
    solver = CopiedSolver(Brownian())
    alone, first, second = (solver.start(1, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    zero = torch.zeros(2, 1, 1, 1)
    one = solver.advance([alone], [0], zero[:1], zero[:1])
    two = solver.advance([first, second], [0, 0], zero, zero)
    assert torch.equal(one, two[:1])
    assert not torch.equal(two[:1], two[1:])
