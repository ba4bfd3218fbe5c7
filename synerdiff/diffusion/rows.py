"""The rows of one denoiser forward: assembled from samples in their modes, and combined back into one noise each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from synerdiff.core import CONDITIONAL, GUIDED, REUSE, InputError, Mode
from synerdiff.diffusion.conditioning import Condition
from synerdiff.diffusion.solvers import to_device

_ORDER = {GUIDED: 0, REUSE: 1, CONDITIONAL: 2}


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What a denoiser forward of R rows reads: latents (R, C, h, w), timesteps (R,), tokens (R, T, D); SDXL also
    pooled (R, P) and time_ids (R, 6). All tensors have R rows, so one CUDA graph per R can hold them in buffers.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    tokens: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are present, in the order of the fields."""
        present = (self.latents, self.timesteps, self.tokens, self.pooled, self.time_ids)
        return tuple(tensor for tensor in present if tensor is not None)

    def named(self) -> dict[str, torch.Tensor]:
        """Those that are present, by field: a message's tensors, for `from_named`."""
        fields = ("latents", "timesteps", "tokens", "pooled", "time_ids")
        return {name: tensor for name in fields if (tensor := getattr(self, name)) is not None}

    @classmethod
    def from_named(cls, tensors: Mapping[str, torch.Tensor]) -> RowInputs:
        """From what `named` gave; what else is in there is left alone."""
        return cls(
            tensors["latents"],
            tensors["timesteps"],
            tensors["tokens"],
            tensors.get("pooled"),
            tensors.get("time_ids"),
        )


def runs_of(rows: Sequence[int]) -> list[slice]:
    """Row numbers as slices of consecutive ones, in order: slices need no index tensor, which a GPU would wait for."""
    runs: list[slice] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = slice(runs[-1].start, row + 1)
        else:
            runs.append(slice(row, row + 1))
    return runs


def select_rows(inputs: RowInputs, rows: Sequence[int]) -> RowInputs:
    """Only these rows, in this order: those of a ControlNet's samples, or one half of guidance. At least one row."""
    runs = runs_of(rows)

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[runs[0]] if len(runs) == 1 else torch.cat([tensor[run] for run in runs])

    return RowInputs(*(chosen(tensor) for tensor in inputs.tensors()))


class Denoise(Protocol):
    """A denoiser forward: rows in, predicted noise (R, C, h, w) out; eager, or a captured graph per R."""

    def __call__(self, inputs: RowInputs) -> torch.Tensor: ...


def rows_of(modes: Sequence[Mode]) -> int:
    """Rows that a step takes before padding: two for each guided sample, one for any other."""
    return len(modes) + sum(mode is GUIDED for mode in modes)


def bucket_of(rows: int, buckets: Sequence[int] | None) -> int:
    """The rows that are computed: the smallest bucket that holds `rows`, or `rows` itself without buckets (eager).

    Raises InputError when the largest bucket is too small.
    """
    if buckets is None:
        return rows
    fitting = [bucket for bucket in buckets if bucket >= rows]
    if not fitting:
        raise InputError(f"A step of {rows} rows exceeds the largest row bucket, {max(buckets)}.")
    return min(fitting)


def order_by_mode(modes: Sequence[Mode]) -> list[int]:
    """Positions of the samples, guided first, then reuse, then conditional, so that no row needs to be looked up."""
    return sorted(range(len(modes)), key=lambda position: _ORDER[modes[position]])


def assemble(
    inputs: torch.Tensor,
    timesteps: Sequence[float],
    conditions: Sequence[Condition],
    guided: int,
    total_rows: int,
    time_ids: torch.Tensor | None,
) -> RowInputs:
    """Rows of n samples in `order_by_mode`: n conditional rows, `guided` unconditional ones, then padding.

    `inputs` (n, C, h, w) in the denoiser's dtype; `time_ids` (1, 6) for SDXL. Padding repeats the last row: it costs
    what any row costs, stays finite, and is thrown away.
    """
    pads = total_rows - len(conditions) - guided
    rows = [*range(len(conditions)), *range(guided)]
    rows += [rows[-1]] * pads
    latents = torch.cat([inputs, inputs[:guided], *[inputs[rows[-1]][None]] * pads])
    tokens = [condition.tokens for condition in conditions]
    tokens += [condition.unconditional_tokens for condition in conditions[:guided]]
    tokens += [tokens[-1]] * pads
    pooled = None
    if time_ids is not None:
        present = [_required(condition.pooled) for condition in conditions]
        present += [_required(condition.unconditional_pooled) for condition in conditions[:guided]]
        present += [present[-1]] * pads
        pooled, time_ids = torch.cat(present), time_ids.expand(total_rows, -1)
    return RowInputs(latents, _row_times(timesteps, rows, inputs.device), torch.cat(tokens), pooled, time_ids)


def _row_times(timesteps: Sequence[float], rows: Sequence[int], device: torch.device) -> torch.Tensor:

    return to_device([[timesteps[row] for row in rows]], device)[0]


def _required(pooled: torch.Tensor | None) -> torch.Tensor:
    if pooled is None:
        raise InputError("This model needs a pooled text vector in every condition.")
    return pooled


def combine(
    outputs: torch.Tensor,
    samples: int,
    guided: int,
    reused_differences: Sequence[torch.Tensor],
    guidance_scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the forward's rows to the noise (n, C, h, w) of each sample and the differences (guided, C, h, w).

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) written around the conditional row:
    eps_u + w (eps_c - eps_u) = eps_c + (w - 1) (eps_c - eps_u). `reuse` takes the sample's last difference instead
    of a new one, `conditional` none. `guidance_scales`: (samples that are guided or reuse,).
    """
    noise = outputs[:samples].float()
    differences = noise[:guided] - outputs[samples : samples + guided].float()
    steered = guided + len(reused_differences)
    if steered:
        every = torch.cat([differences, *reused_differences])
        weights = (guidance_scales - 1.0).view(-1, 1, 1, 1)
        noise = torch.cat([noise[:steered] + weights * every, noise[steered:]])
    return noise, differences
