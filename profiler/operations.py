"""What a forward does, kernel by kernel: the operations of a UNet, of a decoder and of a text encoder.

The lists are counted from the public configurations (``synerdiff/diffusion/configs``), for any resolution and number
of rows. An execution decides what is launched apart:

- ``eager``: every pointwise operation is a kernel, a bias is added apart, convolutions copy to channels-last and back;
- ``compiled``: pointwise operations join a norm or one another, activations stay channels-last;
- ``engine``: additions, biases and gates move into the products, and the three attention inputs are one product.

Standard library only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import synerdiff

EXECUTIONS = ("eager", "compiled", "engine")
CONFIGS = Path(synerdiff.__file__).parent / "diffusion" / "configs"
TEXT_TOKENS = 77
GROUPS = 32
WIDE_HEAD = 256
"""Above this head size no flash kernel exists."""


class Operation(NamedTuple):
    """Kernels that do one thing. Per row of the batch: FLOPs and activation elements moved; once: weight elements.

    ``m`` x ``n`` is the output of a product (per row) or, for attention, (query tokens x heads) x head size.
    Kinds: ``conv`` and ``linear`` (products), ``attention``, ``unfused`` (attention for which no flash kernel exists),
    ``moments`` (the first pass of torch's GroupNorm), ``layout`` (copies to channels-last and back), ``stream``.
    """

    kind: str
    flops: float
    elements: float
    weights: float
    kernels: int
    m: int = 0
    n: int = 0


Operations = tuple[tuple[Operation, int], ...]
"""Operations with how often each occurs, in no order."""


class Layers:
    """Collects the operations of layers under one execution."""

    def __init__(self, execution: str) -> None:
        self.eager, self.engine = execution == "eager", execution == "engine"
        self.listed: list[Operation] = []

    def product(self, kind: str, m: int, n: int, k: int, reads: float) -> None:
        """An m x n output of k products each, ``reads`` activation elements read."""
        self.listed.append(Operation(kind, 2.0 * m * n * k, reads + m * n, n * k, 1, m, n))
        if kind == "conv" and self.eager:
            self.listed.append(Operation("layout", 0.0, 2 * (reads + m * n), 0.0, 2))
            self.stream(2 * m * n)

    def conv(self, inputs: int, outputs: int, pixels: int, width: int = 3, stride: int = 1) -> None:
        """A ``width`` x ``width`` convolution to ``pixels`` output pixels."""
        self.product("conv", pixels, outputs, width * width * inputs, inputs * pixels * stride * stride)

    def linear(self, tokens: int, inputs: int, outputs: int) -> None:
        """A linear layer on ``tokens`` vectors."""
        self.product("linear", tokens, outputs, inputs, tokens * inputs)

    def attention(self, tokens: int, keys: int, heads: int, size: int) -> None:
        """softmax(Q K^T) V of ``heads`` heads of ``size`` channels; wide heads have no fused kernel."""
        kind = "unfused" if size > WIDE_HEAD else "attention"
        elements = 2.0 * (tokens + keys) * heads * size
        self.listed.append(Operation(kind, 4.0 * tokens * keys * heads * size, elements, 0.0, 1, tokens * heads, size))

    def stream(self, elements: float, kernels: int = 1) -> None:
        """Element-wise kernels that read and write so many elements in all."""
        if elements:
            self.listed.append(Operation("stream", 0.0, elements, 0.0, kernels))

    def eagerly(self, *elements: float) -> None:
        """Element-wise kernels, one each, that only eager execution launches."""
        for each in elements if self.eager else ():
            self.stream(each)

    def group_norm(self, elements: int, activation: bool) -> None:
        """Two passes: the moments of each group, then scale (and, where fused, the activation)."""
        kind = "moments" if self.eager else "stream"
        self.listed.append(Operation(kind, 0.0, elements, 0.0, 1))
        self.stream(2 * elements)
        if activation:
            self.eagerly(2 * elements)

    def layer_norm(self, elements: int) -> None:
        """With the addition before it: apart in eager (3 + 2 passes), else one kernel of 4 passes."""
        self.eagerly(3 * elements, 2 * elements)
        if not self.eager:
            self.stream(4 * elements)

    def resnet(self, inputs: int, outputs: int, pixels: int, time: int = 0) -> None:
        """Two norms and convolutions, the time embedding where there is one (``time`` channels), and the shortcut."""
        self.group_norm(inputs * pixels, activation=True)
        self.conv(inputs, outputs, pixels)
        if time:
            self.linear(1, time, outputs)
            self.eagerly(time, 2 * outputs * pixels)
        self.group_norm(outputs * pixels, activation=True)
        self.conv(outputs, outputs, pixels)
        if inputs != outputs:
            self.conv(inputs, outputs, pixels, width=1)
        self.eagerly(3 * outputs * pixels, 2 * outputs * pixels)
        if not self.eager:
            self.stream((1 if self.engine else 3) * outputs * pixels, 0 if self.engine else 1)

    def attend(self, tokens: int, keys: int, channels: int, heads: int, key_channels: int) -> None:
        """Projections, attention and the output projection; an engine joins Q, K and V into one product."""
        own = self.engine and keys == tokens and key_channels == channels
        self.linear(tokens, channels, 3 * channels if own else channels)
        if not own:
            for times in (2,) if self.engine else (1, 1):
                self.linear(keys, key_channels, times * channels)
        self.attention(tokens, keys, heads, channels // heads)
        self.linear(tokens, channels, channels)
        self.eagerly(2 * tokens * channels)

    def transformer(
        self, pixels: int, channels: int, heads: int, depth: int, text: int, linear_projection: bool
    ) -> None:
        """``depth`` blocks of self-attention, cross-attention to the text and gated feed-forward, projected."""
        self.group_norm(channels * pixels, activation=False)
        self.eagerly(2 * channels * pixels)
        project = self.linear if linear_projection else self._project
        project(pixels, channels, channels)
        for _ in range(depth):
            self.layer_norm(channels * pixels)
            self.attend(pixels, pixels, channels, heads, channels)
            self.layer_norm(channels * pixels)
            self.attend(pixels, TEXT_TOKENS, channels, heads, text)
            self.layer_norm(channels * pixels)
            if self.engine:
                self.product("linear", pixels, 8 * channels, channels, (1 - 4) * channels * pixels)
            else:
                self.linear(pixels, channels, 8 * channels)
            self.eagerly(8 * channels * pixels)
            if not self.engine:
                self.stream(12 * channels * pixels)
            self.linear(pixels, 4 * channels, channels)
        project(pixels, channels, channels)
        self.stream(3 * channels * pixels, 0 if self.engine else 1)
        self.eagerly(2 * channels * pixels)

    def _project(self, pixels: int, inputs: int, outputs: int) -> None:
        self.conv(inputs, outputs, pixels, width=1)

    def upsample(self, channels: int, pixels: int) -> None:
        """Neighbour doubling to ``pixels``, then a convolution."""
        self.stream(1.25 * channels * pixels)
        self.conv(channels, channels, pixels)

    def counted(self) -> Operations:
        """(operation, how often) of everything listed."""
        return tuple(Counter(self.listed).items())


@cache
def architecture(model: str) -> dict[str, Any]:
    """The public diffusers configuration of a model, as it ships beside this file."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8"))
    return config


def _per_block(value: Any, blocks: int) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] * blocks


@cache
def unet(model: str, height: int, width: int, execution: str) -> Operations:
    """One forward of the model's UNet at ``height`` x ``width`` pixels, per row."""
    config = architecture(model)["unet"]
    layers = Layers(execution)
    channels = config["block_out_channels"]
    blocks = len(channels)
    heads = _per_block(config["attention_head_dim"], blocks)
    depths = _per_block(config.get("transformer_layers_per_block", 1), blocks)
    text, linear = config["cross_attention_dim"], config.get("use_linear_projection", False)
    per_block = config["layers_per_block"]
    time = 4 * channels[0]
    pixels = (height // 8) * (width // 8)

    def attend(block: int) -> None:
        layers.transformer(pixels, channels[block], heads[block], depths[block], text, linear)

    for _ in range(4 if config.get("addition_embed_type") else 2):
        layers.linear(1, time, time)
        layers.stream(time)
    layers.conv(config["in_channels"], channels[0], pixels)
    skips = [channels[0]]
    current = channels[0]
    for block, kind in enumerate(config["down_block_types"]):
        for _ in range(per_block):
            layers.resnet(current, channels[block], pixels, time)
            current = channels[block]
            if kind.startswith("CrossAttn"):
                attend(block)
            skips.append(current)
        if block < blocks - 1:
            pixels //= 4
            layers.conv(current, current, pixels, stride=2)
            skips.append(current)
    layers.resnet(current, current, pixels, time)
    attend(blocks - 1)
    layers.resnet(current, current, pixels, time)
    for place, kind in enumerate(config["up_block_types"]):
        block = blocks - 1 - place
        for _ in range(per_block + 1):
            joined = current + skips.pop()
            layers.stream(2 * joined * pixels)
            layers.resnet(joined, channels[block], pixels, time)
            current = channels[block]
            if kind.startswith("CrossAttn"):
                attend(block)
        if block:
            pixels *= 4
            layers.upsample(current, pixels)
    layers.group_norm(current * pixels, activation=True)
    layers.conv(current, config["out_channels"], pixels)
    return layers.counted()


@cache
def decoder(model: str, height: int, width: int, execution: str) -> tuple[tuple[str, Operations], ...]:
    """The decoder's atoms in order, named as in ``synerdiff.diffusion.decoder``, with what each does for an image."""
    config = architecture(model)["vae"]
    channels = config["block_out_channels"][::-1]
    pixels = (height // 8) * (width // 8)
    atoms: list[tuple[str, Operations]] = []

    def atom(name: str, method: str, *arguments: Any) -> None:
        layers = Layers(execution)
        getattr(layers, method)(*arguments)
        atoms.append((name, layers.counted()))

    first = channels[0]
    atom("conv_in", "conv", config["latent_channels"], first, pixels)
    atom("mid.res0", "resnet", first, first, pixels)
    middle = Layers(execution)
    middle.group_norm(first * pixels, activation=False)
    middle.attend(pixels, pixels, first, 1, first)
    middle.stream(4 * first * pixels, 2)
    atoms.append(("mid.attn0", middle.counted()))
    atom("mid.res1", "resnet", first, first, pixels)
    current = first
    for block, outputs in enumerate(channels):
        for layer in range(config["layers_per_block"] + 1):
            atom(f"up{block}.res{layer}", "resnet", current, outputs, pixels)
            current = outputs
        if block < len(channels) - 1:
            pixels *= 4
            atom(f"up{block}.up", "upsample", current, pixels)
    last = Layers(execution)
    last.group_norm(current * pixels, activation=True)
    last.conv(current, config["out_channels"], pixels)
    atoms.append(("out", last.counted()))
    return tuple(atoms)


@cache
def text_encoders(sizes: tuple[tuple[int, int, int], ...], execution: str) -> Operations:
    """CLIP text encoders of (layers, channels, heads), one prompt of 77 tokens each."""
    layers = Layers(execution)
    for depth, channels, heads in sizes:
        for _ in range(depth):
            layers.layer_norm(TEXT_TOKENS * channels)
            layers.attend(TEXT_TOKENS, TEXT_TOKENS, channels, heads, channels)
            layers.layer_norm(TEXT_TOKENS * channels)
            layers.linear(TEXT_TOKENS, channels, 4 * channels)
            layers.stream(8 * TEXT_TOKENS * channels, 2 if layers.eager else 1)
            layers.linear(TEXT_TOKENS, 4 * channels, channels)
    return layers.counted()


def total(operations: Iterable[tuple[Operation, int]]) -> tuple[float, float, float, int]:
    """(FLOPs, activation elements, weight elements, kernels) of a list, for one row."""
    flops = elements = weights = 0.0
    kernels = 0
    for operation, times in operations:
        flops += times * operation.flops
        elements += times * operation.elements
        weights += times * operation.weights
        kernels += times * operation.kernels
    return flops, elements, weights, kernels
