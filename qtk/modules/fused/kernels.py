"""Seams of one kernel each: Triton on a GPU, their PyTorch twins elsewhere.

A residual addition, the LayerNorm after it and the quantizer after that are one kernel, an
activation and its quantizer another; where the grid after the activation is one step and zero point
for all channels, the product before it writes the codes itself.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.modules.fused.parts import Norm, Parts, Seams
from qtk.modules.reader import Read, Reader
from qtk_kernels.activation import activate
from qtk_kernels.hadamard import rotate
from qtk_kernels.layer_norm_quantize import layer_norm_quantize


def seams(parts: Parts) -> Seams:
    """For x of any floating-point type."""
    anatomy, norm1, norm2 = parts.anatomy, parts.norm1, parts.norm2
    mlp, emitting = anatomy.mlp, parts.emitting()

    def up_read(codes: Read, dtype: torch.dtype) -> Read:
        if emitting is not None:
            return emitting(*codes), None
        h = parts.up(*codes, dtype)
        if mlp.gated:
            gate, rest = h.chunk(2, -1)
            return parts.read_hidden(activate(gate, mlp.activation) * rest)
        return parts.read_hidden(h, mlp.activation)

    def enter(x: Tensor) -> Read:
        return norm_quantize(norm1, parts.read_x, x)[0]

    def sum_read(y: Tensor, x: Tensor) -> tuple[Read, Tensor]:
        return norm_quantize(norm2, parts.read_norm, y, x, "sum")

    def norm_read(y: Tensor, x: Tensor) -> tuple[Read, Tensor]:
        return norm_quantize(norm1, parts.read_norm, y, x, "norm")

    def leave(y: Tensor, x: Tensor) -> Tensor:
        return F.layer_norm(x + y, x.shape[-1:], norm2.weight, norm2.bias, norm2.eps)

    if anatomy.pre_norm:
        return Seams(enter, parts.read_context, sum_read, up_read, lambda y, x: x + y)
    return Seams(parts.read_x, parts.read_context, norm_read, up_read, leave)


def norm_quantize(
    norm: Norm, reader: Reader, x: Tensor, residual: Tensor | None = None, emit: str | None = None
) -> tuple[Read, Tensor]:
    """Codes of norm(x + residual), and the "sum" or the "norm" for the residual stream."""
    if reader.rotation or reader.codes is None:  # no kernel normalizes and does that
        h = x if residual is None else x + residual
        y = F.layer_norm(h.float(), h.shape[-1:], norm.q_weight, norm.q_bias, norm.eps)
        if emit == "norm":
            h = F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias, norm.eps)
        return reader.rotated(rotate(y) if reader.rotation else y), h
    emits_norm = emit == "norm"
    codes, scale, emitted = layer_norm_quantize(
        x, norm.q_weight, norm.q_bias, norm.eps, reader.codes, residual=residual, emit=emit,
        norm_weight=norm.weight if emits_norm else None,
        norm_bias=norm.bias if emits_norm else None, backend=reader.backend,
    )  # fmt: skip
    return (codes, scale), x if emitted is None else emitted
