"""The levers: how a loaded model's kernels are replaced, each a switch of its own.

All of them compute what the model computes, in another order of additions; `float8` alone changes numbers. They are put
on once, before anything is captured, and not taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from synerdiff.core import InputError
from synerdiff.diffusion.execution import ModelExecution, require_compiler
from synerdiff.diffusion.group_norm import ChannelsLastGroupNorm
from synerdiff.diffusion.model import DiffusionModel

MOST_COMPILED = 1024
"""Shapes for which a block may be compiled: (kinds of block) x (row buckets) are needed, torch's own limit is 8."""


def apply_execution(model: DiffusionModel, execution: ModelExecution) -> None:
    """Put the levers on, and note how steps and chunks are to be launched. InputError for a missing compiler."""
    if model.execution.levers:
        raise ValueError(f"{model.name} already has the levers {', '.join(model.execution.levers)}.")
    require_compiler(execution, model.device.type == "cuda")
    for lever in execution.levers:
        _APPLY[lever](model)
    model.execution = execution


def _channels_last(model: DiffusionModel) -> None:
    """Weights, and with them all activations, with channels innermost: as tensor cores read convolutions."""
    model.unet.to(memory_format=torch.channels_last)
    model.vae.to(memory_format=torch.channels_last)


class _ActivatedBefore(torch.nn.Module):
    """In place of a block's SiLU, which the norm before it has done for maps: what is left are time embeddings."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.silu(hidden) if hidden.dim() == 2 else hidden


def _group_norm(model: DiffusionModel) -> None:
    """Every GroupNorm by kernels of our own, together with the SiLU that follows it, if one does."""
    for root in (model.unet, model.vae.decoder):
        if isinstance(root.conv_norm_out, torch.nn.GroupNorm) and isinstance(root.conv_act, torch.nn.SiLU):
            root.conv_norm_out = ChannelsLastGroupNorm(root.conv_norm_out, silu=True)
            root.conv_act = torch.nn.Identity()
        for block in list(root.modules()):
            plain = type(block).__name__ == "ResnetBlock2D" and block.time_embedding_norm == "default"
            fused = plain and isinstance(block.nonlinearity, torch.nn.SiLU)
            for name, norm in list(block.named_children()):
                if isinstance(norm, torch.nn.GroupNorm) and norm.affine:
                    silu = fused and name in ("norm1", "norm2")
                    setattr(block, name, ChannelsLastGroupNorm(norm, silu))
            if fused:
                block.nonlinearity = _ActivatedBefore()


def _compile(model: DiffusionModel) -> None:
    """The UNet's transformer blocks by torch's compiler; each new shape is compiled when it is first run."""
    config: Any = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, name, max(MOST_COMPILED, getattr(config, name)))
    try:
        model.unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    except ValueError:
        raise InputError(f"the lever compile finds no repeated block in {model.name}.") from None


def _attention(model: DiffusionModel) -> None:
    """The decoder's attention, one head of 512, as two batched products: no flash kernel takes heads so large."""
    from diffusers.models.attention_processor import AttnProcessor

    for attention in model.vae.decoder.mid_block.attentions:
        if attention is not None:
            # A softmax adds up in single precision whatever it reads; writing its input so doubles the traffic.
            attention.upcast_softmax = False
            attention.set_processor(AttnProcessor())


def _fuse_qkv(model: DiffusionModel) -> None:
    """Query, key and value (over text: key and value) in one product.

    diffusers copies the weights; the single ones become views of the copy, so that a LoRA merged into them is in it.
    """
    model.unet.fuse_qkv_projections()
    for module in model.unet.modules():
        fused = getattr(module, "to_kv" if getattr(module, "is_cross_attention", False) else "to_qkv", None)
        if fused is None:
            continue
        fused.requires_grad_(False)
        names = ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v")
        parts = [getattr(module, name) for name in names]
        sizes = [part.out_features for part in parts]
        for part, weight in zip(parts, fused.weight.data.split(sizes), strict=True):
            part.weight.data = weight
        if fused.bias is not None:
            for part, bias in zip(parts, fused.bias.data.split(sizes), strict=True):
                part.bias.data = bias


def _cudnn_benchmark(model: DiffusionModel) -> None:
    """cuDNN tries its convolutions when it first meets a shape, which is in warm-up. Holds for the whole process."""
    torch.backends.cudnn.benchmark = True


FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


class Float8Linear(torch.nn.Linear):
    """A Linear whose product has 8-bit inputs (e4m3): weights scaled by output, activations by row as they come.

    On a CPU the 8-bit values are multiplied in the activations' own dtype. `refresh` after a change of the weight.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.quantised, self.scale = _quantised(linear.weight)

    def refresh(self) -> None:
        """In place: graphs that were captured stay valid."""
        quantised, scale = _quantised(self.weight)
        self.quantised.copy_(quantised)
        self.scale.copy_(scale)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        quantised, scale = _quantised(hidden.reshape(-1, hidden.shape[-1]))
        if hidden.device.type == "cuda":
            out = torch._scaled_mm(
                quantised, self.quantised.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16
            ).to(hidden.dtype)
        else:
            dtype = hidden.dtype
            out = (quantised.to(dtype) @ self.quantised.to(dtype).t()) * scale.to(dtype) * self.scale.t().to(dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*hidden.shape[:-1], -1)


def _quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, m) -> 8-bit (n, m) and the scales (n, 1) in float32 with which rows are about their product."""
    scale = rows.detach().abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (rows.detach() / scale).clamp(-_LARGEST, _LARGEST).to(FLOAT8), scale


def _float8(model: DiffusionModel) -> None:
    """The products of the UNet's transformer blocks; a GPU's need sides that are multiples of 16."""
    on_gpu = model.device.type == "cuda"
    if on_gpu and torch.cuda.get_device_capability(model.device) < (8, 9):
        raise InputError("the lever float8 needs a GPU with 8-bit floating-point products (compute capability 8.9).")
    for block in list(model.unet.modules()):
        if type(block).__name__ != "BasicTransformerBlock":
            continue
        for parent in list(block.modules()):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear) and not (
                    on_gpu and (linear.in_features % 16 or linear.out_features % 16)
                ):
                    setattr(parent, name, Float8Linear(linear))


_APPLY: Mapping[str, Callable[[DiffusionModel], None]] = {
    "channels-last": _channels_last,
    "group-norm": _group_norm,
    "compile": _compile,
    "attention": _attention,
    "qkv": _fuse_qkv,
    "cudnn-benchmark": _cudnn_benchmark,
    "float8": _float8,
}
