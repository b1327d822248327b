"""The fused block on a CPU with oneDNN: the calls of PyTorch that it takes, chosen beforehand.

The numbers are those of `fused_forward` in block.py. At 16 tokens a CPU spends most of its time
between operations, so all that does not depend on the tokens is looked up once, here. Tensors that
nobody else reads are overwritten: fresh memory costs a CPU more than what it computes there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.hadamard import rotate
from qtk.models import Block
from qtk.modules.attention import attention
from qtk.modules.linear import QuantLinear
from qtk.modules.parts import Norm, Parts
from qtk.modules.plan import Plan
from qtk_kernels.codes import EPS, Codes
from qtk_kernels.onednn import onednn_linear

Quantized = tuple[Tensor, Tensor | None]  # codes and their scale
Reader = Callable[[Tensor], Quantized]
Forward = Callable[[Tensor, Tensor | None, Any], Tensor]


def runs_here(parts: Parts) -> bool:
    """Whether oneDNN multiplies in every linear of the block."""
    return parts.qkv.onednn and all(linear.plan.onednn for linear in parts.linears[1:])


def cpu_forward(parts: Parts, block: Block) -> Forward:
    """The block's forward on float32 [B, T, H]; a mask and a cache may be None."""
    q, out, fc1, fc2 = parts.linears
    norm1, norm2 = partial(_norm, parts.norm1), partial(_norm, parts.norm2)
    read_stream = reader(q, folded=block.pre_norm, keep=not block.pre_norm)
    read_context, read_hidden = reader(out), reader(fc2)
    read_norm = reader(fc1, folded=True)
    to_qkv, project = product(parts.qkv), product(out.plan)
    up, down = product(fc1.plan, block.activation), product(fc2.plan)
    fold1 = partial(_folded, parts.norm1)
    fold2 = partial(_folded, parts.norm2 if block.pre_norm else parts.norm1)

    def forward(x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        qkv = to_qkv(*read_stream(fold1(x) if block.pre_norm else x))
        context = attention(qkv, block, mask, cache, parts.products)
        x = project(*read_context(context)).add_(x)
        codes = read_norm(fold2(x))
        if not block.pre_norm:
            x = norm1(x)
        y = down(*read_hidden(up(*codes))).add_(x)
        return y if block.pre_norm else norm2(y)

    return forward


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _folded(norm: Norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.q_weight, norm.q_bias, norm.eps)


def product(plan: Plan, activation: str | None = None) -> Callable[..., Tensor]:
    """Codes and their scale -> activation(linear), float32."""
    assert plan.operand is not None
    operand: Tensor = plan.operand

    def multiply(codes: Tensor, scale: Tensor | None) -> Tensor:
        return onednn_linear(
            codes, operand, plan.weight_scale, plan.bias, plan.x_zero_point, x_scale=scale,
            activation=activation,
        )  # fmt: skip

    return multiply


def reader(linear: QuantLinear, folded: bool = False, keep: bool = False) -> Reader:
    """How the input of a linear becomes codes.

    Args:
        folded: a LayerNorm has done the first affine map.
        keep: the input is needed afterwards, and must not be overwritten.
    """
    plan, codes = linear.plan, linear.plan.codes
    assert codes is not None
    last = None
    if plan.multiplier is not None and plan.offset is not None:
        last = (plan.multiplier, plan.offset)
    first, second = (plan.before, last) if linear.rotation else (last, None)
    if folded:
        first = None
    grid = _static_grid(codes.bits) if codes.static else _token_grid(codes)

    def read(x: Tensor) -> Quantized:
        if keep and first is None:
            x = x.clone()
        elif first is not None:
            x = (x * first[0] if keep else x.mul_(first[0])).add_(first[1])
        if linear.rotation:
            x = rotate(x)
        if second is not None:
            x = x.mul_(second[0]).add_(second[1])
        return grid(x)

    return read


def _static_grid(bits: int) -> Reader:
    qmax = 2**bits - 1

    def read(x: Tensor) -> Quantized:
        return x.round_().clamp_(0, qmax).to(torch.uint8), None

    return read


def _token_grid(codes: Codes) -> Reader:
    qmax = torch.tensor(float(codes.qmax))

    def read(x: Tensor) -> Quantized:
        limit = x.abs().amax(-1, keepdim=True).clamp_(min=EPS)
        if codes.clip != 1:
            limit = limit.mul_(codes.clip)
        x = x.mul_(qmax / limit).round_()
        if codes.clip != 1:
            x = x.clamp_(codes.qmin, codes.qmax)
        return x.add_(codes.offset).to(torch.uint8), limit.div_(qmax)

    return read
