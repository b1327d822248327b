"""Integer linear layers on a CPU: oneDNN where the CPU multiplies bytes, else exact float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils.weak import WeakTensorKeyDictionary

from .activation import activate
from .codes import BYTE_OFFSET, as_uint8
from .dispatch import cpu_has_int8

EXACT_K = 512  # products of 8-bit codes that float32 adds exactly: 512 * 255 * 128 < 2**24

NAMED = {None: ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"),
         "gelu_tanh": ("gelu", "tanh")}  # fmt: skip
WRITES = (torch.float32, torch.bfloat16, torch.uint8, torch.int8)  # what oneDNN's epilogue can


def is_onednn(operand: Tensor, groups: int = 1) -> bool:
    """Whether `prepare_int8` made this operand for oneDNN."""
    if torch.compiler.is_compiling():
        # a traced tensor has lost its layout, so this goes by what the CPU can do; weights in
        # groups are left as they are, since oneDNN has one scale per row
        return cpu_has_int8() and groups == 1
    return operand.is_mkldnn


def onednn_linear(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int = 0,
    *,
    x_scale: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_step: float = 1.0,
    out_zero_point: int = 0,
) -> Tensor:
    """`int8_linear` of one group, without its checks: what a layer calls that made them before.

    With codes for out_dtype, which takes an activation in NAMED, the result is theirs, saturated at
    8 bits.
    """
    if x_q.dtype == torch.int8:  # oneDNN has no fast kernel for signed sources without AMX
        x_q, x_zero_point = as_uint8(x_q), x_zero_point + BYTE_OFFSET
    if not x_q.numel():  # oneDNN drops the leading axes of an empty batch
        return torch.empty(*x_q.shape[:-1], operand.shape[1], dtype=out_dtype)
    call = _pointwise
    if torch.compiler.is_compiling() and not _visible:
        call = _opaque
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            operand, call = _plain(operand), _of_codes
    if x_scale is not None:
        y = call(x_q, operand, w_scale, None, x_zero_point, 1.0, 0, torch.float32, None)
        y = y.mul_(x_scale) if bias is None else torch.addcmul(bias, y, x_scale)
        return activate(y, activation).to(out_dtype)
    if activation not in NAMED:  # oneDNN's epilogue has no such activation
        y = call(x_q, operand, w_scale, bias, x_zero_point, 1.0, 0, torch.float32, None)
        return activate(y, activation).to(out_dtype)
    writes = out_dtype if out_dtype in WRITES else torch.float32
    y = call(
        x_q, operand, w_scale, bias, x_zero_point, out_step, out_zero_point, writes, activation
    )
    return y.to(out_dtype)


_visible = False  # a plain global: a trace reads it


@contextmanager
def visible_to_compiler() -> Iterator[None]:
    """Inside, traces show oneDNN's own operation, for a compiler that freezes the weights.

    Inductor has a lowering and templates of its own for it. It wants weights that are constants in
    oneDNN's layout; a program with such constants cannot be saved, only compiled.
    """
    global _visible
    before, _visible = _visible, True
    try:
        yield
    finally:
        _visible = before


@cache
def _no_zero_points(N: int) -> Tensor:
    return torch.zeros(N, dtype=torch.int32)


def _pointwise(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    out_step: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    activation: str | None,
) -> Tensor:
    N = w_scale.shape[0]
    name, algorithm = NAMED[activation]
    if bias is not None:
        bias = bias.contiguous()  # oneDNN takes it for that, and would read what lies beyond it
    return torch.ops.onednn.qlinear_pointwise.default(
        x_q, 1.0, x_zero_point, operand, w_scale.view(N).contiguous(), _no_zero_points(N), bias,
        out_step, out_zero_point, out_dtype, name, [], algorithm,
    )  # fmt: skip


# The default compiler has its own lowering of oneDNN's op, and that wants frozen weights. Not a
# `custom_op`, whose checks of every call cost 10 microseconds more.
torch.library.define(
    "qtk::onednn_linear",
    "(Tensor x_q, Tensor operand, Tensor w_scale, Tensor? bias, int x_zero_point, float out_step, "
    "int out_zero_point, ScalarType out_dtype, str? activation) -> Tensor",
)
torch.library.impl("qtk::onednn_linear", "CompositeExplicitAutograd", _pointwise)
_opaque = torch.ops.qtk.onednn_linear.default


@torch.library.register_fake("qtk::onednn_linear")
def _shape_of_pointwise(
    x_q: Tensor, operand: Tensor, w_scale: Tensor, bias: Tensor | None, x_zero_point: int,
    out_step: float, out_zero_point: int, out_dtype: torch.dtype, activation: str | None,
) -> Tensor:  # fmt: skip
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


# What torch.export writes: plain codes, because tensors in oneDNN's layout cannot be saved.
torch.library.define(
    "qtk::onednn_linear_of_codes",
    "(Tensor x_q, Tensor codes, Tensor w_scale, Tensor? bias, int x_zero_point, float out_step, "
    "int out_zero_point, ScalarType out_dtype, str? activation) -> Tensor",
)
_packed_once = WeakTensorKeyDictionary()


@torch.library.impl("qtk::onednn_linear_of_codes", "CompositeExplicitAutograd")
def _pointwise_of_codes(x_q: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """`_pointwise` of plain codes [N, K], which are packed at the first call."""
    packed = _packed_once.get(codes)
    if packed is None:
        packed = _packed_once[codes] = torch.ops.onednn.qlinear_prepack(codes, None)
    return _pointwise(x_q, packed, *rest)


_of_codes = torch.ops.qtk.onednn_linear_of_codes.default
torch.library.register_fake("qtk::onednn_linear_of_codes", _shape_of_pointwise)


def _plain(operand: Tensor) -> Tensor:
    """The codes [N, K] behind an operand, as a constant of the program that is being traced."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        codes: Tensor = operand.to_dense().T.contiguous()
    return codes


def float32_chunks(
    x_q: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    x_scale: Tensor | None,
    x_zero_point: int,
    size: int,
) -> Tensor:
    """float32 matrix products over so few channels that every partial sum is exact."""
    K = x_q.shape[-1]
    x, w = x_q.float(), w_q.float()
    if x_zero_point:
        x -= x_zero_point
    y = None
    for g, start in enumerate(range(0, K, size)):
        stop = min(start + size, K)
        p = x[..., start : min(start + EXACT_K, stop)] @ w[:, start : min(start + EXACT_K, stop)].T
        for k in range(start + EXACT_K, stop, EXACT_K):
            end = min(k + EXACT_K, stop)
            p = p.to(torch.int32) + (x[..., k:end] @ w[:, k:end].T).to(torch.int32)
        p = p.float()
        if x_scale is not None:
            p *= x_scale[..., g % x_scale.shape[-1], None]
        p *= w_scale[:, g % w_scale.shape[1]]
        y = p if y is None else y + p
    return torch.zeros(*x_q.shape[:-1], w_q.shape[0]) if y is None else y
