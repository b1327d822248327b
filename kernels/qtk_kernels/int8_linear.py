"""Linear layer on integer codes: int8 or uint8 activations, int8 weights.

    p[m, n, g] = sum_{k in g} (x_q[m, k] - x_zero_point) * w_q[n, k]                 int32
    y[m, n]    = sum_g p[m, n, g] * x_scale[m, g] * w_scale[n, g]  + bias[n]         float32
    out        = activation(y)    or    clamp(round(activation(y) / out_step) + out_zero_point)

Static activations have no x_scale: their step is folded into w_scale by the caller and their zero
point into bias by `fold_zero_point`.

M tokens, K input channels, N output channels, G groups of group_size channels (1 unless given).
"""

from functools import cache

import torch
from torch import Tensor

from ._activation import activate, check_activation
from ._dispatch import backend_of, cpu_has_int8

EXACT_K = 512  # products of 8-bit codes that float32 adds exactly: 512 * 255 * 128 < 2**24


def fold_zero_point(
    bias: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    x_step: float,
    zero_point: int,
    group_size: int | None = None,
) -> Tensor:
    """The bias that cancels the zero point of static activations.

    bias[n] - x_step * zero_point * sum_g w_scale[n, g] * sum_{k in g} w_q[n, k]

    Args:
        bias: [N], or None for 0.
        w_q: [N, K], int8.
        w_scale: [N, 1] or [N, G], the weights' own scale, without x_step.
        x_step: the activations' step; 1 if w_scale already holds it.
        zero_point: the activations' zero point.

    Returns:
        bias: [N], float32.
    """
    N, K = w_q.shape
    G = w_scale.shape[1]
    size = _group_size(K, G, group_size)
    sums = torch.stack([group.sum(1, dtype=torch.int32) for group in w_q.split(size, 1)], 1)
    folded = -x_step * zero_point * (sums.double() * w_scale.double()).sum(1)
    return (folded if bias is None else bias.double() + folded).float()


def _group_size(K: int, G: int, group_size: int | None) -> int:
    if G == 1:
        return max(K, 1)
    if group_size is None or -(-K // group_size) != G:
        raise ValueError(
            f"scales with {G} groups over {K} channels need group_size with "
            f"ceil({K} / group_size) = {G}, got {group_size}"
        )
    return group_size


def requantize_ref(
    y: Tensor, out_step: float | None, out_zero_point: int, out_signed: bool, out_bits: int
) -> Tensor:
    """clamp(round(y / out_step) + out_zero_point), or y if there is no out_step."""
    if out_step is None:
        return y
    qmin = -(2 ** (out_bits - 1)) if out_signed else 0
    q = (torch.round(y / out_step) + out_zero_point).clamp_(qmin, qmin + 2**out_bits - 1)
    return q.to(torch.int8 if out_signed else torch.uint8)


def int8_linear_ref(
    x_q: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: int = 0,
    group_size: int | None = None,
) -> Tensor:
    """The definition of y: the integer part exact, then float32 in the order written."""
    K = x_q.shape[-1]
    G = max(w_scale.shape[1], 1 if x_scale is None else x_scale.shape[-1])
    size = _group_size(K, G, group_size)
    x, w = x_q.double() - x_zero_point, w_q.double()
    y = torch.zeros(*x_q.shape[:-1], w_q.shape[0], device=x_q.device)
    for g in range(G):
        span = slice(g * size, (g + 1) * size)
        p = (x[..., span] @ w[:, span].T).float()  # [..., N], exact before the rounding to float32
        if x_scale is not None:
            p *= x_scale[..., g % x_scale.shape[-1], None]
        y += p * w_scale[:, g % w_scale.shape[1]]
    return y if bias is None else y + bias.float()


def prepare_int8(w_q: Tensor, backend: str | None = None) -> Tensor:
    """The weights in the form that the backend reads. Done once.

    Args:
        w_q: [N, K], int8.

    Returns:
        operand: oneDNN's blocked layout on a CPU that multiplies bytes, elsewhere w_q itself.
    """
    if w_q.dtype != torch.int8 or w_q.ndim != 2:
        raise ValueError(f"weights must be int8 [N, K], got {w_q.dtype} {list(w_q.shape)}")
    if backend_of(w_q, backend) == "cpu" and cpu_has_int8() and w_q.numel():
        return torch.ops.onednn.qlinear_prepack(w_q.contiguous(), None)
    return w_q.contiguous()


def restore_int8(operand: Tensor) -> Tensor:
    """Inverts `prepare_int8`: w_q [N, K], int8."""
    return operand.to_dense().T.contiguous() if operand.is_mkldnn else operand


def int8_linear_kernel_name(
    operand: Tensor, *, groups: int = 1, backend: str | None = None
) -> str:
    """Which kernel `int8_linear` really runs for this operand."""
    name = backend_of(operand, backend)
    if name == "cpu":
        onednn = operand.is_mkldnn and groups == 1
        return "onednn.qlinear_pointwise" if onednn else "float32 chunks (no int8 instructions)"
    return "triton int8_linear" if name == "triton" else "reference"


@cache
def _no_zero_points(N: int) -> Tensor:
    return torch.zeros(N, dtype=torch.int32)


def _onednn(
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
    name = {None: "none", "gelu_tanh": "gelu"}.get(activation, activation)
    algorithm = {"gelu": "none", "gelu_tanh": "tanh"}.get(activation or "", "")
    N = operand.shape[1]
    return torch.ops.onednn.qlinear_pointwise(
        x_q, 1.0, x_zero_point, operand, w_scale.reshape(N), _no_zero_points(N), bias,
        out_step, out_zero_point, out_dtype, name, [], algorithm,
    )  # fmt: skip


def _chunks(
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


def int8_linear(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: int = 0,
    group_size: int | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_step: float | None = None,
    out_zero_point: int = 0,
    out_signed: bool = True,
    out_bits: int = 8,
    backend: str | None = None,
) -> Tensor:
    """Multiplies codes by codes and scales the integers once per group.

    Args:
        x_q: [..., K], int8 or uint8.
        operand: the weights, from `prepare_int8` with the same backend.
        w_scale: [N, 1] or [N, G], float32.
        bias: [N], float32, or None.
        x_scale: None (static), or [..., 1] or [..., G], float32.
        x_zero_point: subtracted from x_q.
        group_size: channels in a group, if there is more than one.
        activation: None, "gelu", "gelu_tanh" or "relu".
        out_dtype: of the result, unless out_step is given.
        out_step: with it the result is codes: clamp(round(y / out_step) + out_zero_point).
        out_signed, out_bits: the grid of those codes.

    Returns:
        y: [..., N], out_dtype, or int8 or uint8 codes.
    """
    check_activation(activation)
    name = backend_of(x_q, backend)
    K, N = x_q.shape[-1], w_scale.shape[0]
    G = max(w_scale.shape[1], 1 if x_scale is None else x_scale.shape[-1])
    size = _group_size(K, G, group_size)
    want = (K, N) if operand.is_mkldnn else (N, K)
    if operand.shape != want:
        raise ValueError(
            f"operand must be {list(want)} for x_q {list(x_q.shape)} and w_scale "
            f"{list(w_scale.shape)}, got {list(operand.shape)}"
        )
    if x_q.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"x_q must be int8 or uint8, got {x_q.dtype}")
    if name == "cpu" and operand.is_mkldnn and G == 1 and x_scale is None:
        return _onednn_static(
            x_q, operand, w_scale, bias, x_zero_point, activation,
            out_dtype, out_step, out_zero_point, out_signed, out_bits,
        )  # fmt: skip
    if name == "cpu" and operand.is_mkldnn and G == 1 and x_scale is not None:
        y = _onednn(x_q, operand, w_scale, None, x_zero_point)
        y = y.mul_(x_scale) if bias is None else torch.addcmul(bias, y, x_scale)
    elif name == "cpu":
        y = _chunks(x_q, restore_int8(operand), w_scale, x_scale, x_zero_point, size)
        y = y if bias is None else y.add_(bias)
    else:
        y = int8_linear_ref(
            x_q, restore_int8(operand), w_scale, bias,
            x_scale=x_scale, x_zero_point=x_zero_point, group_size=group_size,
        )  # fmt: skip
    y = activate(y, activation)
    if out_step is not None:
        return requantize_ref(y, out_step, out_zero_point, out_signed, out_bits)
    return y.to(out_dtype)


def _onednn_static(
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
        y = _onednn(x_q, operand, w_scale, bias, x_zero_point, activation)
        return y.to(out_dtype)
    code_dtype = torch.int8 if out_signed else torch.uint8
    q = _onednn(
        x_q, operand, w_scale, bias, x_zero_point, activation, out_step, out_zero_point, code_dtype
    )
    qmin = -(2 ** (out_bits - 1)) if out_signed else 0
    return q if out_bits == 8 else q.clamp_(qmin, qmin + 2**out_bits - 1)
