"""From a prompt to what the denoiser is conditioned on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from synerdiff.core import InputError


@dataclass(frozen=True, slots=True)
class Condition:
    """What one sample's two rows look at: tokens (1, T, D), and for SDXL a pooled vector (1, P); None without one."""

    tokens: torch.Tensor
    unconditional_tokens: torch.Tensor
    pooled: torch.Tensor | None = None
    unconditional_pooled: torch.Tensor | None = None


class PromptEncoder(Protocol):
    """Encodes one prompt; the only stage that occupies no lane."""

    def encode(self, prompt: str, negative_prompt: str = "") -> Condition:
        """What both rows of a sample look at; the unconditional one at the negative prompt, if there is one.

        Raises InputError for a prompt that the model does not have.
        """

    def default_prompt(self, seed: int) -> str:
        """The prompt of a request that brings only a seed."""

    def knows(self, prompt: str) -> bool:
        """Whether `encode` takes it."""


class ClassTokens:
    """Ten classes, each a row of a trained table (11, T, D) whose last entry means unconditional; `digits` has it."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def encode(self, prompt: str, negative_prompt: str = "") -> Condition:
        """`prompt` names the class: "0" to "9", and so may `negative_prompt`. Raises InputError otherwise."""
        unconditional = self._row(negative_prompt) if negative_prompt else self._table[-1:]
        return Condition(self._row(prompt), unconditional)

    def knows(self, prompt: str) -> bool:
        return prompt.isascii() and prompt.isdecimal() and len(prompt) < 20 and int(prompt) < len(self._table) - 1

    def _row(self, prompt: str) -> torch.Tensor:
        if not self.knows(prompt):
            raise InputError(f"A prompt of this model is a class from 0 to {len(self._table) - 2}, not {prompt!r}.")
        return self._table[int(prompt) : int(prompt) + 1]

    def default_prompt(self, seed: int) -> str:
        return str(seed % (len(self._table) - 1))


class RandomText:
    """Stands in for text encoders where the weights are random anyway: unit normal numbers seeded by the prompt."""

    def __init__(self, tokens: int, width: int, pooled_width: int | None, device: torch.device, dtype: torch.dtype):
        self._shape, self._pooled_width = (1, tokens, width), pooled_width
        self._device, self._dtype = device, dtype

    def encode(self, prompt: str, negative_prompt: str = "") -> Condition:
        tokens, pooled = self._encode_one(prompt)
        unconditional_tokens, unconditional_pooled = self._encode_one(negative_prompt)
        return Condition(tokens, unconditional_tokens, pooled, unconditional_pooled)

    def knows(self, prompt: str) -> bool:
        return True

    def default_prompt(self, seed: int) -> str:
        return f"photograph number {seed}"

    def _encode_one(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(self._shape, generator=generator).to(self._device, self._dtype)
        if self._pooled_width is None:
            return tokens, None
        return tokens, torch.randn(1, self._pooled_width, generator=generator).to(self._device, self._dtype)


class ClipText:
    """Stable Diffusion's CLIP text encoder, or SDXL's two, as their pipelines use them.

    One encoder: its last hidden state. Two: their penultimate hidden states side by side, and the second one's
    projected pooled vector; with `zeros_for_empty` the empty prompt is all zeros (SDXL's
    `force_zeros_for_empty_prompt`). Long prompts are cut at the tokenizer's length.
    """

    def __init__(self, encoders: list[Any], tokenizers: list[Any], zeros_for_empty: bool) -> None:
        self._encoders, self._tokenizers, self._zeros_for_empty = encoders, tokenizers, zeros_for_empty

    def encode(self, prompt: str, negative_prompt: str = "") -> Condition:
        tokens, pooled = self._encode_one(prompt)
        empty_tokens, empty_pooled = self._encode_one(negative_prompt)
        if self._zeros_for_empty and not negative_prompt and len(self._encoders) > 1:
            empty_tokens = torch.zeros_like(empty_tokens)
            empty_pooled = None if empty_pooled is None else torch.zeros_like(empty_pooled)
        return Condition(tokens, empty_tokens, pooled, empty_pooled)

    def knows(self, prompt: str) -> bool:
        return True

    def default_prompt(self, seed: int) -> str:
        return f"photograph number {seed}"

    @torch.inference_mode()
    def _encode_one(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden: list[torch.Tensor] = []
        pooled: torch.Tensor | None = None
        for encoder, tokenizer in zip(self._encoders, self._tokenizers, strict=True):
            length = tokenizer.model_max_length
            ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            output = encoder(ids.input_ids.to(encoder.device), output_hidden_states=len(self._encoders) > 1)
            if len(self._encoders) == 1:
                return output.last_hidden_state, None
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        return torch.cat(hidden, dim=-1), pooled


def pooled_width(unet_config: Any) -> int | None:
    """Width of SDXL's pooled vector: the added embedding's input less six size embeddings; None for other models."""
    if getattr(unet_config, "addition_embed_type", None) != "text_time":
        return None
    return int(unet_config.projection_class_embeddings_input_dim) - 6 * int(unet_config.addition_time_embed_dim)
