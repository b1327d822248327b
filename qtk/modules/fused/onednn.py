"""Seams of PyTorch's operations, on float32 and a CPU with oneDNN.

The numbers are those of the kernels' seams. At 16 tokens a CPU spends most of its time between
operations, so all that does not depend on the tokens is looked up once, here. Tensors that nobody
else reads are overwritten: fresh memory costs a CPU more than what it computes there.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.hadamard import rotate
from qtk.modules.fused.parts import Norm, Parts, Seams
from qtk.modules.products.onednn import OneDnn
from qtk.modules.reader import Read, Reader
from qtk_kernels.activation import activate
from qtk_kernels.codes import EPS, Codes

Rounding = Callable[[Tensor], Read]


def runs_here(parts: Parts) -> bool:
    """Whether oneDNN multiplies in every product of the block."""
    return all(isinstance(product, OneDnn) for product in parts.products)


def seams(parts: Parts) -> Seams:
    anatomy, mlp = parts.anatomy, parts.anatomy.mlp
    read_x = in_place(parts.read_x, folded=anatomy.pre_norm, keep=not anatomy.pre_norm)
    read_norm = in_place(parts.read_norm, folded=True)
    read_hidden = in_place(parts.read_hidden)
    norm1, norm2 = partial(_norm, parts.norm1), partial(_norm, parts.norm2)
    fold1 = partial(_folded, parts.norm1)
    fold2 = partial(_folded, parts.norm2 if anatomy.pre_norm else parts.norm1)
    # the activation is nearly free in oneDNN's epilogue
    up = parts.up if mlp.gated else parts.up.activated(mlp.activation or "")

    def up_read(codes: Read, dtype: torch.dtype) -> Read:
        h = up(*codes)
        if mlp.gated:
            gate, rest = h.chunk(2, -1)
            h = activate(gate, mlp.activation) * rest
        return read_hidden(h)

    def sum_read(y: Tensor, x: Tensor) -> tuple[Read, Tensor]:
        x = y.add_(x)
        return read_norm(fold2(x)), x

    def norm_read(y: Tensor, x: Tensor) -> tuple[Read, Tensor]:
        x = y.add_(x)
        return read_norm(fold2(x)), norm1(x)

    read_context = in_place(parts.read_context)
    if anatomy.pre_norm:
        return Seams(
            lambda x: read_x(fold1(x)), read_context, sum_read, up_read, lambda y, x: y.add_(x)
        )
    return Seams(read_x, read_context, norm_read, up_read, lambda y, x: norm2(y.add_(x)))


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _folded(norm: Norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.q_weight, norm.q_bias, norm.eps)


def in_place(reader: Reader, folded: bool = False, keep: bool = False) -> Rounding:
    """The reader's numbers, with x overwritten.

    Args:
        folded: a LayerNorm has done the first affine map.
        keep: the input is needed afterwards, and must not be overwritten.
    """
    assert reader.codes is not None
    first = None if folded else reader.folded
    second = reader.after if reader.rotation else None
    rounding = _static(reader.codes) if reader.codes.static else _per_token(reader.codes)

    def read(x: Tensor) -> Read:
        if keep and first is None:
            x = x.clone()
        elif first is not None:
            x = (x * first[0] if keep else x.mul_(first[0])).add_(first[1])
        if reader.rotation:
            x = rotate(x)
        if second is not None:
            x = x.mul_(second[0]).add_(second[1])
        return rounding(x)

    return read


def _static(codes: Codes) -> Rounding:
    qmin, qmax = codes.qmin, codes.qmax

    def read(x: Tensor) -> Read:
        return x.round_().clamp_(qmin, qmax).to(torch.uint8), None

    return read


def _per_token(codes: Codes) -> Rounding:
    qmax = torch.tensor(float(codes.qmax))
    offset, clip = codes.offset, codes.clip

    def read(x: Tensor) -> Read:
        limit = x.abs().amax(-1, keepdim=True).clamp_(min=EPS)
        if clip != 1:
            limit = limit.mul_(clip)
        x = x.mul_(qmax / limit).round_()
        if clip != 1:
            x = x.clamp_(-qmax - 1, qmax)
        return x.add_(offset).to(torch.uint8), limit.div_(qmax)

    return read
