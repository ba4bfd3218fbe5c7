"""One thin class for every model: start samples, advance a mixed batch by one step, decode in chunks."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from synerdiff.core import CONDITIONAL, GUIDED, REUSE, InputError, Mode
from synerdiff.diffusion.conditioning import Condition, PromptEncoder
from synerdiff.diffusion.decoder import WHOLE, Chunk, ChunkedDecoder, Chunking
from synerdiff.diffusion.denoisers.controlnet import ControlNet, ControlUse, control_calls
from synerdiff.diffusion.denoisers.unet import EagerDenoiser, SplitDenoiser, sum_residuals
from synerdiff.diffusion.execution import ModelExecution
from synerdiff.diffusion.rows import Denoise, RowInputs, assemble, bucket_of, combine, order_by_mode, rows_of
from synerdiff.diffusion.solvers import LinearProgress, Progress, Solver, to_device
from synerdiff.files import MOST_SIDE


@dataclass(slots=True, eq=False)
class SampleState:
    """One image on its way through the steps; `DiffusionModel.step` advances it in place.

    `latent`: float32 (1, C, h, w) on the model's device. `last_difference`: eps_c - eps_u of the last guided step.
    `controls`: the ControlNets that steer it, each with its scale and image.
    """

    seed: int
    guidance_scale: float
    condition: Condition
    progress: Progress
    latent: torch.Tensor
    step_index: int = 0
    last_difference: torch.Tensor | None = None
    prompt: str = ""
    controls: tuple[ControlUse, ...] = ()

    @property
    def steps(self) -> int:
        """Denoiser calls in all: len(timesteps), which exceeds the steps asked for with Heun or PNDM."""
        return len(self.progress.timesteps)

    @property
    def done(self) -> bool:
        """All denoiser calls are made; what is left is the decode."""
        return self.step_index >= self.steps

    @property
    def default_mode(self) -> Mode:
        """Guided, or conditional for an unguided sample (guidance_scale <= 1)."""
        return GUIDED if self.guidance_scale > 1.0 else CONDITIONAL


def image_seed(seed: int, image: int) -> int:
    """The seed of image i of a request: the request's own for image 0, else 63 bits of SHA-256 of "seed/i".

    Hashed, because seed + i would give neighbouring requests the same images.
    """
    if image == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{image}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step between its assembly and its end: `inputs` has n conditional rows, `guided` unconditional ones, padding.

    `states`: n samples in row order, the guided ones first; `steered` of them use guidance of this or an earlier step.
    """

    states: tuple[SampleState, ...]
    guided: int
    steered: int
    inputs: RowInputs
    latents: torch.Tensor

    @property
    def total_rows(self) -> int:
        """Rows that the forward computes, padding included."""
        return len(self.inputs.latents)

    def rows_of_state(self, position: int) -> tuple[int, ...]:
        """The rows of `states[position]`: its conditional one, and its unconditional one if it is guided."""
        conditional = (position,)
        return (*conditional, len(self.states) + position) if position < self.guided else conditional


class DiffusionModel:
    """A UNet2DConditionModel, an AutoencoderKL, a noise schedule and a prompt encoder. Made by `load_model`.

    `row_buckets` (None = eager, any number of rows) pads each step up to a bucket; `denoise` may be replaced by a
    graph per bucket (`stages.GraphedDenoiser`); `split` is the same forward in two halves, always eager.
    `execution`: how it is to be launched, and with which levers (`kernels.apply_execution`).
    `controlnets`: by name, those that `step` runs itself. `weights`: `trained`, `checkpoint` or `random`;
    `own_scheduler`: the class of the scheduler that the model came with, whichever `solver` runs. Work is
    enqueued on the current CUDA stream and never waited for. Steps of different samples and chunks of different decodes
    may run in different threads at once.
    """

    def __init__(
        self,
        name: str,
        unet: Any,
        vae: Any,
        solver: Solver,
        prompts: PromptEncoder,
        resolution: tuple[int, int],
        weights: str = "checkpoint",
        own_scheduler: str | None = None,
    ) -> None:
        self.name = name
        self.weights = weights
        self.own_scheduler = own_scheduler or solver.scheduler_name
        self.unet = unet
        self.vae = vae
        self.solver = solver
        self.prompts = prompts
        self.device = torch.device(unet.device)
        self.dtype: torch.dtype = unet.dtype
        self.decoder = ChunkedDecoder(vae)
        self.denoise: Denoise = EagerDenoiser(unet)
        self.split = SplitDenoiser(unet)
        self.controlnets: dict[str, ControlNet] = {}
        self.row_buckets: tuple[int, ...] | None = None
        self.execution = ModelExecution("graphs" if self.device.type == "cuda" else "eager")
        self._set_resolution(resolution)

    def _set_resolution(self, resolution: tuple[int, int]) -> None:
        unet, factor = self.unet, vae_factor(self.vae)
        _check_resolution(self.name, resolution, factor * 2 ** (len(unet.config.block_out_channels) - 1))
        self.height, self.width = resolution
        self.latent_shape = (1, int(unet.config.in_channels), self.height // factor, self.width // factor)
        self._time_ids: torch.Tensor | None = None
        if getattr(unet.config, "addition_embed_type", None) == "text_time":
            # SDXL: original size, crop corner, target size.
            sizes = [float(size) for size in (*resolution, 0, 0, *resolution)]
            self._time_ids = torch.tensor([sizes], dtype=self.dtype, device=self.device)

    def at(self, resolution: tuple[int, int]) -> DiffusionModel:
        """The same networks, weights and prompts at another resolution, with buckets and graphs of its own (none yet).

        Raises InputError for sides that the model cannot make.
        """
        other = copy.copy(self)
        other._set_resolution(resolution)
        other.denoise, other.row_buckets = EagerDenoiser(self.unet), None
        return other

    def denoiser_calls(self, steps: int) -> int:
        """Denoiser calls that a sample of `steps` scheduler steps makes (Heun at 20 makes 39)."""
        return len(self.solver.start(steps, torch.Generator()).timesteps)

    def encode_prompt(self, prompt: str, negative_prompt: str = "") -> Condition:
        """Encode once per request; its images share the result. Raises InputError for a prompt that cannot be."""
        return self.prompts.encode(prompt, negative_prompt)

    def start(
        self,
        seed: int,
        steps: int,
        guidance_scale: float = 7.5,
        prompt: str | None = None,
        *,
        image: int = 0,
        condition: Condition | None = None,
    ) -> SampleState:
        """A sample before its first step: noise from a CPU generator, so that every device starts from the same.

        Without `prompt` the encoder's default for the request's seed is used (`digits`: class seed % 10); a given
        `condition` (from `encode_prompt`) saves encoding again. Raises InputError for impossible steps or prompts.
        """
        if prompt is None:
            prompt = self.prompts.default_prompt(seed)
        own_seed = image_seed(seed, image)
        generator = torch.Generator().manual_seed(own_seed)
        noise = torch.randn(self.latent_shape, generator=generator).to(self.device)
        progress = self.solver.start(steps, generator, noise)
        return SampleState(
            seed=own_seed,
            guidance_scale=guidance_scale,
            condition=self.encode_prompt(prompt) if condition is None else condition,
            progress=progress,
            latent=noise * progress.initial_noise_scale,
            prompt=prompt,
        )

    def rows(self, modes: Sequence[Mode], pad_rows: int = 0) -> int:
        """Rows that a step with these modes computes: its own, `pad_rows`, then up to the bucket."""
        return bucket_of(rows_of(modes) + pad_rows, self.row_buckets)

    @torch.inference_mode()
    def step(self, states: Sequence[SampleState], modes: Sequence[Mode] | None = None, pad_rows: int = 0) -> int:
        """Advance every sample by one step in one denoiser forward and return the rows computed.

        ControlNets of the samples run before it, from `controlnets`. `modes` and errors as for `prepare`.
        """
        step = self.prepare(states, modes, pad_rows)
        self.finish(step, self._denoised(step))
        return step.total_rows

    def _denoised(self, step: PreparedStep) -> torch.Tensor:
        calls = control_calls(step.states, step.rows_of_state, step.inputs)
        if not calls:
            return self.denoise(step.inputs)
        for call in calls:
            if call.name not in self.controlnets:
                known = ", ".join(sorted(self.controlnets)) or "none"
                raise InputError(f"ControlNet {call.name} is not loaded; loaded: {known}.")
        residuals = [(call.rows, self.controlnets[call.name].residuals(call)) for call in calls]
        return self.split(step.inputs, lambda: sum_residuals(step.total_rows, residuals))

    @torch.inference_mode()
    def prepare(
        self, states: Sequence[SampleState], modes: Sequence[Mode] | None = None, pad_rows: int = 0
    ) -> PreparedStep:
        """The first half of a step: its rows, assembled and padded; nothing is advanced yet.

        `modes` defaults to each sample's own. A sample without guidance takes `conditional` only; `reuse` needs an
        earlier guided step. Raises ValueError where these rules, or a finished sample, are violated, and InputError
        when the rows exceed the buckets.
        """
        if modes is None:
            modes = [state.default_mode for state in states]
        self._check(states, modes)
        total_rows = self.rows(modes, pad_rows)
        ordered = [states[position] for position in order_by_mode(modes)]
        guided = sum(mode is GUIDED for mode in modes)
        steered = guided + sum(mode is REUSE for mode in modes)
        if self.device.type == "cuda":
            # The first latent was made on another stream and is dropped at the end, before this stream has read it.
            for state in ordered:
                state.latent.record_stream(torch.cuda.current_stream(self.device))
        latents = torch.cat([state.latent for state in ordered])
        inputs = assemble(
            self.solver.denoiser_inputs(
                [state.progress for state in ordered], [state.step_index for state in ordered], latents
            ).to(self.dtype),
            [state.progress.timesteps[state.step_index] for state in ordered],
            [state.condition for state in ordered],
            guided,
            total_rows,
            self._time_ids,
        )
        return PreparedStep(tuple(ordered), guided, steered, inputs, latents)

    @torch.inference_mode()
    def finish(self, step: PreparedStep, outputs: torch.Tensor) -> None:
        """The second half: advance the step's samples by what the denoiser predicted for its rows (R, C, h, w)."""
        ordered, guided = step.states, step.guided
        progress, steps_done = [state.progress for state in ordered], [state.step_index for state in ordered]
        reused = [
            state.last_difference for state in ordered[guided : step.steered] if state.last_difference is not None
        ]
        scales = to_device([[state.guidance_scale for state in ordered[: step.steered]]], self.device)[0]
        noise, differences = combine(outputs, len(ordered), guided, reused, scales)
        latents = self.solver.advance(progress, steps_done, step.latents, noise)
        for position, state in enumerate(ordered):
            state.latent = latents[position : position + 1]
            state.step_index += 1
            if position < guided:
                state.last_difference = differences[position : position + 1]

    @torch.inference_mode()
    def example_rows(self, rows: int, condition: Condition) -> RowInputs:
        """`rows` rows of the right shapes and dtypes, all alike: what a capture or a measurement of a forward needs."""
        latents = torch.zeros(self.latent_shape, dtype=self.dtype, device=self.device)
        return assemble(latents, [999.0], [condition], 0, rows, self._time_ids)

    def _check(self, states: Sequence[SampleState], modes: Sequence[Mode]) -> None:
        if not states or len(states) != len(modes) or len({id(state) for state in states}) != len(states):
            raise ValueError("A step needs at least one sample, each of them once, and one mode for each.")
        for state, mode in zip(states, modes, strict=True):
            if state.done:
                raise ValueError(f"The sample with seed {state.seed} has done all of its {state.steps} steps.")
            if state.default_mode is CONDITIONAL and mode is not CONDITIONAL:
                raise ValueError(f"A sample without guidance takes its steps in mode conditional, not {mode}.")
            if mode is REUSE and state.last_difference is None:
                raise ValueError("Mode reuse needs an earlier guided step of the same sample.")

    @torch.inference_mode()
    def x0_similarity(self, state: SampleState) -> float:
        """Cosine of the x0 that eps_c and eps_u predicted in the step just done, if that was guided (in -1..1).

        From what is kept: x0(m) = P x + Q m, and m = eps_c + (w - 1) d, so x0_c = x0 - Q (w - 1) d and
        x0_u = x0_c - Q d. Waits for the device. Raises ValueError without a guided step or for a scheduler that
        is not vectorised.
        """
        progress, difference = state.progress, state.last_difference
        if not isinstance(progress, LinearProgress) or progress.previous_x0 is None or difference is None:
            raise ValueError("The similarity of x0 needs a guided step under DDIM, Euler or DPM-Solver++ 2M.")
        q = progress.table.rows[state.step_index - 1].x0_output
        conditional = progress.previous_x0 - q * (state.guidance_scale - 1.0) * difference
        unconditional = conditional - q * difference
        return float(torch.cosine_similarity(conditional.flatten(), unconditional.flatten(), dim=0))

    def chunks(self, chunking: Chunking = WHOLE) -> tuple[Chunk, ...]:
        """The decode as callables: the first takes a latent (n, C, h, w), each next the output of the one before,
        the last returns images (n, channels, height, width), about [-1, 1], in the VAE's dtype.
        """
        return self.decoder.chunks(chunking)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """All atoms at once: latents (n, C, h, w) -> images (n, channels, height, width), about [-1, 1], unclamped."""
        return self.decoder.chunks(WHOLE)[0](latent)


def vae_factor(vae: Any) -> int:
    """Pixels per latent cell and side: 8 for SD and SDXL, 4 for `digits`."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _check_resolution(name: str, resolution: tuple[int, int], multiple: int) -> None:
    if any(not 0 < side <= MOST_SIDE or side % multiple for side in resolution):
        height, width = resolution
        raise InputError(
            f"{name} makes images whose sides are multiples of {multiple} pixels up to {MOST_SIDE}, "
            f"not {height}x{width}."
        )
