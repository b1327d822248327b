"""Integer linear layers on a CPU: oneDNN where the CPU multiplies bytes, else exact float32."""

import torch
from torch import Tensor

from ._dispatch import cpu_has_int8

EXACT_K = 512  # products of 8-bit codes that float32 adds exactly: 512 * 255 * 128 < 2**24


def is_onednn(operand: Tensor, groups: int = 1) -> bool:
    """Whether `prepare_int8` made this operand for oneDNN."""
    if torch.compiler.is_compiling():
        # a traced tensor has lost its layout, so this goes by what the CPU can do; weights in
        # groups are left as they are, since oneDNN has one scale a row
        return cpu_has_int8() and groups == 1
    return operand.is_mkldnn


def onednn_linear(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    activation: str | None = None,
    out_step: float = 1.0,
    out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    if x_q.dtype == torch.int8:
        # oneDNN has no fast kernel for signed sources without AMX: flip the sign bit
        x_q, x_zero_point = x_q.view(torch.uint8) ^ 0x80, x_zero_point + 128
    name = {"gelu_tanh": "gelu"}.get(activation or "", activation or "none")
    algorithm = {"gelu": "none", "gelu_tanh": "tanh"}.get(activation or "", "")
    N = operand.shape[1]
    if not x_q.numel():  # oneDNN drops the leading axes of an empty batch
        return torch.empty(*x_q.shape[:-1], N, dtype=out_dtype)
    arguments = (
        x_q, operand, w_scale.reshape(N), bias, x_zero_point,
        out_step, out_zero_point, out_dtype, name, algorithm,
    )  # fmt: skip
    return _opaque(*arguments) if torch.compiler.is_compiling() else _pointwise(*arguments)


def _pointwise(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    out_step: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    name: str,
    algorithm: str,
) -> Tensor:
    N = len(w_scale)
    return torch.ops.onednn.qlinear_pointwise(
        x_q, 1.0, x_zero_point, operand, w_scale, torch.zeros(N, dtype=torch.int32), bias,
        out_step, out_zero_point, out_dtype, name, [], algorithm,
    )  # fmt: skip


# The default compiler has its own lowering of oneDNN's op, and that wants frozen weights.
_opaque = torch.library.custom_op("qtk::onednn_linear", _pointwise, mutates_args=())


@_opaque.register_fake
def _shape_of_pointwise(
    x_q: Tensor, operand: Tensor, w_scale: Tensor, bias: Tensor | None, x_zero_point: int,
    out_step: float, out_zero_point: int, out_dtype: torch.dtype, name: str, algorithm: str,
) -> Tensor:  # fmt: skip
    return x_q.new_empty((*x_q.shape[:-1], len(w_scale)), dtype=out_dtype)


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


def onednn_static(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    activation: str | None,
    out_dtype: torch.dtype,
    out_step: float | None,
    out_zero_point: int,
    out_signed: bool,
    out_bits: int,
) -> Tensor:
    """Everything in oneDNN's epilogue; its saturation is that of 8 bits."""
    if out_step is None:
        y = onednn_linear(x_q, operand, w_scale, bias, x_zero_point, activation)
        return y.to(out_dtype)
    code_dtype = torch.int8 if out_signed else torch.uint8
    q = onednn_linear(
        x_q, operand, w_scale, bias, x_zero_point, activation, out_step, out_zero_point, code_dtype
    )
    qmin = -(2 ** (out_bits - 1)) if out_signed else 0
    return q if out_bits == 8 else q.clamp_(qmin, qmin + 2**out_bits - 1)
