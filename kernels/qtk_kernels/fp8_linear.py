"""Linear layer on e4m3 activations and e4m3 weights: FP8.

    y[m, n] = (sum_k x_q[m, k] * w_q[n, k]) * x_scale[m] * w_scale[n] + bias[n]         float32
    out     = activation(y)

Static activations have no x_scale: their scale is folded into w_scale by the caller. Products of
e4m3 values are exact in float32. Tensor cores of Hopper add them with about 14 bits; the kernel
therefore adds every 128 channels to a float32 sum of its own.

M tokens, K input channels, N output channels. Tensor cores multiply e4m3 from sm_89 on.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._lang import (
    along_m,
    along_n,
    entry,
    scaled,
    share_of,
    store_linear,
    store_part,
    tile_of,
    tl,
)
from ._launch import cdiv, gemm_launch
from ._linear import check_scales
from ._plan import opaque, planned, row_step, shape_of
from ._split_k import LinearPlan, launch_linear, plan_linear
from ._tma import aligned, launch_tma, plan_tma, tma_tile
from .activation import activate, check_activation
from .codes import EPS, scale_strides
from .dispatch import backend_of

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
BLOCK_K = 128


def to_fp8(x: Tensor, *, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """Rounds to e4m3 with one scale per row (token or output channel) or one for everything.

    Args:
        x: [..., K], floating point.

    Returns:
        q: [..., K], e4m3, nearest even.
        scale: [..., 1], or [] if not per_row, float32; q * scale is close to x.
    """
    x = x.float()
    limit = x.abs().amax(-1, keepdim=True) if per_row else x.abs().max()
    scale = limit.clamp(min=EPS) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def fp8_linear_ref(
    x_q: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, x_scale: Tensor | None
) -> Tensor:
    """The definition of y: the sum in float64, then float32 in the order written."""
    y = (x_q.double() @ w_q.double().T).float()  # [..., N]
    y = y if x_scale is None else y * x_scale
    y = y * w_scale[:, 0]
    return y if bias is None else y + bias.float()


@entry
def _fp8_linear_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, parts_ptr,
    M, N, K, steps, stride_xm, stride_xsm,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # the last row is read again where there are no more: that costs no mask, and nobody stores it
    row_m, row_n = tl.minimum(offs_m, M - 1).to(tl.int64), tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + row_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + row_n[:, None] * K + offs_k[None, :]
    y = (along_m(offs_m * 0, SWAP) + along_n(offs_n * 0, SWAP)).to(tl.float32)
    first, last = share_of(steps, SPLIT_K)
    for step in range(first, last):
        k = step * BLOCK_K
        if EVEN:
            x, w = tl.load(x_ptrs + k), tl.load(w_ptrs + k)
        else:
            mask = (offs_k < K - k)[None, :]
            x = tl.load(x_ptrs + k, mask=mask, other=0.0)
            w = tl.load(w_ptrs + k, mask=mask, other=0.0)
        # a limit of 128 adds every block to y in float32
        if SWAP:
            y = tl.dot(w, tl.trans(x), y, max_num_imprecise_acc=BLOCK_K)
        else:
            y = tl.dot(x, tl.trans(w), y, max_num_imprecise_acc=BLOCK_K)
    if SPLIT_K > 1:
        store_part(parts_ptr, y, offs_m, offs_n, M, N, SWAP)
    else:
        y = scaled(
            y, x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N,
            offs_m.to(tl.int64) * stride_xsm, offs_n, SWAP,
        )  # fmt: skip
        store_linear(out_ptr, y, bias_ptr, offs_m, offs_n, M, N, 1.0, 0, SWAP, ACTIVATION, 0, 0)


def _check(
    x: torch.Size, x_dtype: torch.dtype, w: torch.Size, w_dtype: torch.dtype,
    w_scale: torch.Size, bias: torch.Size | None, x_scale: torch.Size | None,
    activation: str | None,
) -> None:  # fmt: skip
    check_activation(activation)
    if x_dtype != E4M3 or w_dtype != E4M3:
        raise ValueError(f"codes must be {E4M3}, got {x_dtype} and {w_dtype}")
    K, N = x[-1], w_scale[0]
    if w != (N, K) or w_scale != (N, 1):
        raise ValueError(
            f"operand must be [{N}, {K}] and w_scale [{N}, 1], got {list(w)} and {list(w_scale)}"
        )
    if x_scale is not None and x_scale != (*x[:-1], 1):
        raise ValueError(f"x_scale must be {[*x[:-1], 1]}, got {list(x_scale)}")
    check_scales(x, N, x_scale, bias)


@planned
def _plan(
    x: torch.Size, stride: tuple[int, ...], device: torch.device, out_dtype: torch.dtype,
    bulk: bool, *signature: Any,
) -> LinearPlan:  # fmt: skip
    """bulk: operands are aligned as a bulk copy wants them."""
    _check(x, *signature)
    _, (N, K), _, _, _, x_scale, activation = signature
    M, step = prod(x[:-1]), row_step(x, stride)
    epilogue: dict[str, Any] = {"ACTIVATION": activation or ""}
    floats = {**epilogue, "QMIN": 0, "QMAX": 0}
    if bulk and step == K:
        tile = tma_tile("fp8_linear", M, N, K, device=device, plain=activation is None)
        if tile is not None:
            return plan_tma(
                x, N, out_dtype, tile, scale_strides(x_scale)[0], (1.0, 0), floats, fp8=True
            )
    tile = gemm_launch(
        "fp8_linear", M, N, K, device=device, grouped=False, computed_weights=False,
        heavy=K % 16 > 0,
    )  # fmt: skip
    return plan_linear(
        x, stride, N, out_dtype, tile,
        (M, N, K, cdiv(K, BLOCK_K), K if step is None else step, scale_strides(x_scale)[0]),
        {**epilogue, "EVEN": K % BLOCK_K == 0, "BLOCK_K": BLOCK_K,
         "enable_fp_fusion": False},  # the epilogue then rounds as the reference does
        integers=False, scaled=False, epilogue=floats,
    )  # fmt: skip


def _empty(
    x: Tensor, w: Tensor, _ws: Any, _b: Any, _xs: Any, _a: Any, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)


@opaque(_empty)
def _launch_fp8_linear(
    x_q: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    activation: str | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = w.contiguous()
    plan = _plan(
        x_q.shape, x_q.stride(), x_q.device, out_dtype, aligned(x_q, w), x_q.dtype, w.shape,
        w.dtype, w_scale.shape, shape_of(bias), shape_of(x_scale), activation,
    )  # fmt: skip
    x_scale = None if x_scale is None else x_scale.contiguous()
    w_scale = w_scale.contiguous()
    if plan.bulk:
        return launch_tma(plan, x_q, w, x_scale, w_scale, bias)
    return launch_linear(
        _fp8_linear_kernel, plan, x_q, (w, x_scale, w_scale), bias, x_scale, w_scale
    )


def fp8_linear_kernel_name(operand: Tensor, *, backend: str | None = None) -> str:
    """Which kernel `fp8_linear` really runs for this operand."""
    name = backend_of(operand, backend)
    return {"triton": "triton fp8_linear", "cpu": "float32 linear"}.get(name, "reference")


def fp8_linear(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Multiplies e4m3 by e4m3 and scales the sum.

    Args:
        x_q: [..., K], e4m3, from `to_fp8`.
        operand: the weights [N, K], e4m3, from `to_fp8`; every backend reads them as they are.
        w_scale: [N, 1], float32.
        bias: [N], or None.
        x_scale: None (static), or [..., 1], float32.
        activation: None or a name in `activation.ACTIVATIONS`.

    Returns:
        y: [..., N], out_dtype.

    Raises:
        ValueError: a dtype or a shape is not as above.
    """
    name = backend_of(x_q, backend)
    if name == "triton" and x_q.numel() and w_scale.shape[0]:
        return _launch_fp8_linear(x_q, operand, w_scale, bias, x_scale, activation, out_dtype)
    _check(
        x_q.shape, x_q.dtype, operand.shape, operand.dtype, w_scale.shape, shape_of(bias),
        shape_of(x_scale), activation,
    )  # fmt: skip
    if name == "cpu":
        y = x_q.float() @ operand.float().T
        y = (y if x_scale is None else y * x_scale) * w_scale[:, 0]
        y = y if bias is None else y + bias.float()
    else:
        y = fp8_linear_ref(x_q, operand, w_scale, bias, x_scale)
    return activate(y, activation).to(out_dtype)
