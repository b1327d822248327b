"""Linear layer on integer codes: int8 or uint8 activations, int8 weights.

    p[m, n, g] = sum_{k in g} (x_q[m, k] - x_zero_point) * w_q[n, k]                 int32
    y[m, n]    = sum_g p[m, n, g] * x_scale[m, g] * w_scale[n, g]  + bias[n]         float32
    out        = activation(y)    or    clamp(round(activation(y) / out_step) + out_zero_point)

Static activations have no x_scale: their step is folded into w_scale by the caller and their zero
point into bias by `fold_zero_point`.

M tokens, K input channels, N output channels, G groups of group_size channels (1 unless given).
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._lang import (
    add_group,
    along_m,
    along_n,
    block_of,
    dot_int8,
    entry,
    first_sum,
    scaled,
    share_of,
    store_linear,
    store_part,
    tile_of,
    times_x_scale,
    tl,
)
from ._launch import dot_width, gemm_launch, steps_of
from ._linear import Output, check_scales, check_sums, empty_output
from ._plan import contiguous_strides, opaque, planned, row_step, shape_of
from ._split_k import LinearPlan, launch_linear, plan_linear
from ._tma import aligned, launch_tma, plan_tma, tma_tile
from .codes import (
    BYTE_OFFSET,
    Codes,
    as_int8,
    group_size_of,
    scale_strides,
)
from .dispatch import backend_of, cpu_has_int8
from .onednn import NAMED, float32_chunks, is_onednn, onednn_linear


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
    K, G = w_q.shape[1], w_scale.shape[1]
    size = group_size_of(K, G, group_size)
    sums = torch.stack([group.sum(1, dtype=torch.int32) for group in w_q.split(size, 1)], 1)
    folded = -x_step * zero_point * (sums.double() * w_scale.double()).sum(1)
    return (folded if bias is None else bias.double() + folded).float()


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
    size = group_size_of(K, G, group_size)
    x, w = x_q.double() - x_zero_point, w_q.double()
    y = torch.zeros(*x_q.shape[:-1], w_q.shape[0], device=x_q.device)
    for g in range(G):
        span = slice(g * size, (g + 1) * size)
        p = (x[..., span] @ w[:, span].T).float()  # [..., N], exact before the rounding to float32
        if x_scale is not None:
            p *= x_scale[..., g % x_scale.shape[-1], None]
        y += p * w_scale[:, g % w_scale.shape[1]]
    return y if bias is None else y + bias.float()


def prepare_int8(
    w_q: Tensor, backend: str | None = None, *, w_bits: int = 8, a_bits: int = 8
) -> Tensor:
    """The weights in the form that the backend reads. Done once.

    Args:
        w_q: [N, K], int8.
        w_bits, a_bits: of the codes of both operands; not all CPUs multiply two of 8 bits.

    Returns:
        operand: oneDNN's blocked layout on a CPU that multiplies such codes, elsewhere w_q itself.
    """
    if w_q.dtype != torch.int8 or w_q.ndim != 2:
        raise ValueError(f"weights must be int8 [N, K], got {w_q.dtype} {list(w_q.shape)}")
    if backend_of(w_q, backend) == "cpu" and cpu_has_int8(w_bits, a_bits) and w_q.numel():
        return torch.ops.onednn.qlinear_prepack(w_q.contiguous(), None)
    return w_q.contiguous()


def restore_int8(operand: Tensor) -> Tensor:
    """Inverts `prepare_int8`: w_q [N, K], int8."""
    return operand.to_dense().T.contiguous() if operand.is_mkldnn else operand


def float32_name(groups: int) -> str:
    """What replaces oneDNN on a CPU, and why."""
    if groups > 1 or cpu_has_int8():
        return "float32 chunks"
    fewer = "w=7 or a=7 computes in int8" if cpu_has_int8(7, 8) else "no int8 instructions"
    return f"float32 chunks ({fewer})"


def int8_linear_kernel_name(operand: Tensor, *, groups: int = 1, backend: str | None = None) -> str:
    """Which kernel `int8_linear` really runs for this operand."""
    name = backend_of(operand, backend)
    if name == "cpu":
        onednn = operand.is_mkldnn and groups == 1
        return "onednn.qlinear_pointwise" if onednn else float32_name(groups)
    return "triton int8_linear" if name == "triton" else "reference"


@entry
def _int8_linear_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, parts_ptr,
    M, N, K, steps, x_zero_point, out_step, out_zero_point,
    stride_xm, stride_xsm, stride_xsg, stride_wsn, stride_wsg,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr, EVEN: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr, ACTIVATION: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # the last row is read again where there are no more: that costs no mask, and nobody stores it
    row_m, row_n = tl.minimum(offs_m, M - 1).to(tl.int64), tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + row_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + row_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    x_scale_at = row_m * stride_xsm
    w_scale_at = row_n * stride_wsn
    w_scale_ptrs = w_scale_ptr + w_scale_at
    x_scale_ptrs = None if x_scale_ptr is None else x_scale_ptr + x_scale_at
    # tokens down and output channels across, or the other way round
    zeros = along_m(offs_m * 0, SWAP) + along_n(offs_n * 0, SWAP)
    y = zeros.to(tl.float32)
    p = zeros
    w_sum = offs_n * 0

    first, last = share_of(steps, SPLIT_K)
    for step in range(first, last):
        k, end = block_of(step, K, GROUP, BLOCK_K)
        if EVEN:
            x, w = tl.load(x_ptrs + k), tl.load(w_ptrs + k)
        else:
            mask = (offs_k < end - k)[None, :]
            x = tl.load(x_ptrs + k, mask=mask, other=0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs + k, mask=mask, other=0)  # [BLOCK_N, BLOCK_K]
        if HAS_ZERO_POINT:
            w_sum += tl.sum(w.to(tl.int32), axis=1)
        if GROUP:
            p = dot_int8(x, w, first_sum(zeros, HAS_ZERO_POINT), SWAP)
            if HAS_ZERO_POINT:
                p -= x_zero_point * along_n(w_sum, SWAP)
                w_sum = offs_n * 0
            g = k // GROUP
            y = add_group(
                y, p, x_scale_ptrs, g * stride_xsg, w_scale_ptrs, g * stride_wsg,
                X_GROUPS, HAS_ZERO_POINT, SWAP,
            )  # fmt: skip
        else:
            p = dot_int8(x, w, p, SWAP)

    if not GROUP and HAS_ZERO_POINT:
        p -= x_zero_point * along_n(w_sum, SWAP)
    if GROUP:
        y = times_x_scale(y, x_scale_ptr, x_scale_at, 1.0, X_GROUPS, SWAP)
    if SPLIT_K > 1:
        store_part(parts_ptr, y if GROUP else p, offs_m, offs_n, M, N, SWAP)
    else:
        if not GROUP:
            y = scaled(
                p, x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N, x_scale_at, w_scale_at, SWAP
            )
        store_linear(
            out_ptr, y, bias_ptr, offs_m, offs_n, M, N, out_step, out_zero_point,
            SWAP, ACTIVATION, QMIN, QMAX,
        )  # fmt: skip


def _check(
    x: torch.Size, x_dtype: torch.dtype, w: torch.Size, w_scale: torch.Size,
    x_scale: torch.Size | None, bias: torch.Size | None, group_size: int | None, blocked: bool,
) -> int:  # fmt: skip
    """The channels in a group; raises where shapes or dtypes do not fit."""
    K, N = x[-1], w_scale[0]
    G = max(w_scale[1], 1 if x_scale is None else x_scale[-1])
    size = group_size_of(K, G, group_size)
    want = (K, N) if blocked else (N, K)
    if w != want:
        raise ValueError(
            f"operand must be {list(want)} for x_q {list(x)} and w_scale {list(w_scale)}, "
            f"got {list(w)}"
        )
    if x_dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"x_q must be int8 or uint8, got {x_dtype}")
    check_scales(x, N, x_scale, bias)
    return size


@planned
def _plan(
    x: torch.Size, stride: tuple[int, ...], x_dtype: torch.dtype, device: torch.device,
    w: torch.Size, w_scale: torch.Size, x_scale: torch.Size | None, bias: torch.Size | None,
    x_zero_point: int, group_size: int | None, bulk: bool, *output: Any,
) -> LinearPlan:  # fmt: skip
    """bulk: operands are aligned as a bulk copy wants them."""
    out = Output(*output)
    size = _check(x, x_dtype, w, w_scale, x_scale, bias, group_size, blocked=False)
    M, (N, K) = prod(x[:-1]), w
    grouped = size < K
    group, block_k = (size, dot_width(size)) if grouped else (0, 128)
    if x_dtype == torch.uint8:  # tensor cores multiply int8 by int8 only: `as_int8` copies
        stride, x_zero_point = contiguous_strides(x), x_zero_point - BYTE_OFFSET
    check_sums(size, x_zero_point)
    step = row_step(x, stride)
    if bulk and step == K and not grouped and x_zero_point == 0:
        plain = out.activation is None and out.codes is None and out.dtype.itemsize == 2
        tile = tma_tile("int8_linear", M, N, K, device=device, plain=plain)
        if tile is not None:
            return plan_tma(
                x, N, out.dtype, tile, scale_strides(x_scale)[0], (out.step, out.zero_point),
                out.epilogue, fp8=False,
            )  # fmt: skip
    tile = gemm_launch(
        "int8_linear", M, N, K, device=device, grouped=grouped, computed_weights=False,
        heavy=K % 16 > 0,
    )  # fmt: skip
    return plan_linear(
        x, stride, N, out.dtype, tile,
        (M, N, K, steps_of(K, group, block_k), x_zero_point, out.step, out.zero_point,
         K if step is None else step, *scale_strides(x_scale), *scale_strides(w_scale)),
        {"GROUP": group, "X_GROUPS": grouped and scale_strides(x_scale)[1] > 0,
         "EVEN": K % block_k == 0 and group % block_k == 0, "HAS_ZERO_POINT": x_zero_point != 0,
         **out.epilogue, "BLOCK_K": block_k,
         "enable_fp_fusion": False},  # the epilogue then rounds as the reference does
        integers=not grouped, scaled=grouped, out=(out.step, out.zero_point),
        epilogue=out.epilogue,
    )  # fmt: skip


def _empty(
    x_q: Tensor, w: Tensor, _ws: Any, _b: Any, _xs: Any, _z: Any, _g: Any, *output: Any
) -> Tensor:
    return empty_output(x_q, w.shape[0], *output)


@opaque(_empty)
def _launch_int8_linear(
    x_q: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    x_zero_point: int, group_size: int | None, activation: str | None, out_dtype: torch.dtype,
    out_codes: Codes | None, out_step: float, out_zero_point: int,
) -> Tensor:  # fmt: skip
    w = w.contiguous()
    plan = _plan(
        x_q.shape, x_q.stride(), x_q.dtype, x_q.device, w.shape, w_scale.shape, shape_of(x_scale),
        shape_of(bias), x_zero_point, group_size, aligned(x_q, w),
        activation, out_dtype, out_codes, out_step, out_zero_point,
    )  # fmt: skip
    x_scale = None if x_scale is None else x_scale.contiguous()
    w_scale = w_scale.contiguous()
    if plan.bulk:
        return launch_tma(plan, as_int8(x_q), w, x_scale, w_scale, bias)
    return launch_linear(
        _int8_linear_kernel, plan, as_int8(x_q), (w, x_scale, w_scale), bias,
        x_scale, w_scale,
    )  # fmt: skip


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
    out_codes: Codes | None = None,
    out_step: float = 1.0,
    out_zero_point: int = 0,
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
        activation: None or a name in `activation.ACTIVATIONS`.
        out_dtype: of the result, unless out_codes are given.
        out_codes: with them the result is clamp(round(y / out_step) + out_zero_point).

    Returns:
        y: [..., N], out_dtype, or int8 or uint8 codes.
    """
    name = backend_of(x_q, backend)
    if name == "triton" and x_q.numel() and w_scale.shape[0]:
        return _launch_int8_linear(
            x_q, restore_int8(operand), w_scale, bias, x_scale, x_zero_point, group_size,
            activation, out_dtype, out_codes, out_step, out_zero_point,
        )  # fmt: skip
    out = Output(activation, out_dtype, out_codes, out_step, out_zero_point)
    G = max(w_scale.shape[1], 1 if x_scale is None else x_scale.shape[-1])
    onednn = name == "cpu" and is_onednn(operand, w_scale.shape[1])
    size = _check(
        x_q.shape, x_q.dtype, operand.shape, w_scale.shape, shape_of(x_scale), shape_of(bias),
        group_size, blocked=onednn or operand.is_mkldnn,
    )  # fmt: skip
    w_scale = w_scale.contiguous()
    if onednn and G == 1 and x_scale is None and activation in NAMED:
        y = onednn_linear(
            x_q, operand, w_scale, bias, x_zero_point, activation=activation,
            out_dtype=out.dtype, out_step=out.step, out_zero_point=out_zero_point,
        )  # fmt: skip
        full = out_codes is None or out_codes.bits == 8  # oneDNN saturates at 8 bits
        return y if full or out_codes is None else y.clamp_(out_codes.qmin, out_codes.qmax)
    if onednn and G == 1:
        y = onednn_linear(x_q, operand, w_scale, bias, x_zero_point, x_scale=x_scale)
    elif name == "cpu":
        w_q = restore_int8(operand)
        y = float32_chunks(x_q, w_q, w_scale, x_scale, x_zero_point, size)
        y = y if bias is None else y.add_(bias)
    else:
        y = int8_linear_ref(
            x_q, restore_int8(operand), w_scale, bias,
            x_scale=x_scale, x_zero_point=x_zero_point, group_size=group_size,
        )  # fmt: skip
    return out.of(y)
