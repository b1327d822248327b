"""Linear layer on integer codes with packed int4 weights: W4A8 and W4A4.

The same formula as `int8_linear.py`; the weights, and for W4A4 the activations, come in the layout
of `packing.py` and are unpacked in registers.

M tokens, K input channels, N output channels, G groups of group_size channels (1 unless given).
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._gemv import aligned, gemv_integers_kernel, gemv_tile
from ._lang import (
    add_group,
    along_m,
    along_n,
    dot_int8,
    entry,
    first_channel,
    first_sum,
    high_nibbles,
    jit,
    low_nibbles,
    scaled,
    segment_of,
    share_of,
    store_linear,
    store_part,
    tile_of,
    times_x_scale,
    tl,
)
from ._launch import gemm_launch, packed_steps
from ._linear import Output, check_scales, check_sums, empty_output
from ._plan import contiguous_strides, opaque, planned, row_step, shape_of
from ._split_k import LinearPlan, launch_linear, plan_few, plan_linear
from .codes import BYTE_OFFSET, Codes, as_int8, group_size_of, scale_strides
from .dispatch import backend_of
from .int8_linear import (
    float32_name,
    int8_linear,
    int8_linear_ref,
    prepare_int8,
    restore_int8,
)
from .packing import pack_int4, packed_width, unpack_int4


def prepare_int4(w_packed: Tensor, K: int, backend: str | None = None) -> Tensor:
    """The weights in the form that the backend reads. Done once.

    Args:
        w_packed: [N, ceil(K / 128) * 64], uint8, from `pack_int4`.
        K: input channels.

    Returns:
        operand: w_packed itself for Triton; on a CPU the operand of `prepare_int8`, because no CPU
            multiplies nibbles.
    """
    if (
        w_packed.dtype != torch.uint8
        or w_packed.ndim != 2
        or (w_packed.shape[1] != packed_width(K))
    ):
        raise ValueError(
            f"{K} channels need uint8 [N, {packed_width(K)}], "
            f"got {w_packed.dtype} {list(w_packed.shape)}"
        )
    if backend_of(w_packed, backend) == "cpu":
        return prepare_int8(unpack_int4(w_packed, K), "cpu")
    return w_packed.contiguous()


def restore_int4(operand: Tensor, K: int) -> Tensor:
    """Inverts `prepare_int4`: w_packed [N, ceil(K / 128) * 64], uint8."""
    return operand if operand.dtype == torch.uint8 else pack_int4(restore_int8(operand))


def int4_linear_kernel_name(operand: Tensor, *, groups: int = 1, backend: str | None = None) -> str:
    """Which kernel `int4_linear` really runs for this operand."""
    name = backend_of(operand, backend)
    if name == "cpu":
        if operand.is_mkldnn and groups == 1:
            return "onednn.qlinear_pointwise (unpacked)"
        return f"{float32_name(groups)}, unpacked"
    return "triton int4_linear" if name == "triton" else "reference"


@jit
def _even_groups(
    x_ptrs, w_ptrs, x_scale_ptrs, w_scale_ptrs, stride_xsg, stride_wsg,
    zeros, w_sum, K, steps, x_zero_point,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr, X_PACKED: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr, EVEN: tl.constexpr, BYTES: tl.constexpr,
    SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One group (the integer sum) or groups of a multiple of 32 channels (the scaled sum)."""
    offs_b = tl.arange(0, BYTES)
    x_ptrs += offs_b[None, :]
    w_ptrs += offs_b[None, :]
    y = zeros.to(tl.float32)
    p = zeros
    low_sum = w_sum
    high_sum = w_sum

    first, last = share_of(steps, SPLIT_K)
    for step in range(first, last):  # rows of w are padded: no tail
        b = step * BYTES
        k = first_channel(step, BYTES)
        w = tl.load(w_ptrs + b)  # [BLOCK_N, BYTES]
        if X_PACKED:
            x = tl.load(x_ptrs + b)  # [BLOCK_M, BYTES]
            x_low, x_high = low_nibbles(x), high_nibbles(x)
        elif EVEN:
            x_low, x_high = tl.load(x_ptrs + k), tl.load(x_ptrs + k + 64)
        else:
            x_low = tl.load(x_ptrs + k, mask=(offs_b < K - k)[None, :], other=0)
            x_high = tl.load(x_ptrs + k + 64, mask=(offs_b < K - k - 64)[None, :], other=0)
        w_low, w_high = low_nibbles(w), high_nibbles(w)
        if HAS_ZERO_POINT:
            low_sum += tl.sum(w_low.to(tl.int32), axis=1)
            high_sum += tl.sum(w_high.to(tl.int32), axis=1)
        if GROUP == 0:
            p = dot_int8(x_low, w_low, p, SWAP)
            p = dot_int8(x_high, w_high, p, SWAP)
        else:
            low = dot_int8(x_low, w_low, first_sum(zeros, HAS_ZERO_POINT), SWAP)
            if GROUP % 128 == 0:  # both halves lie in one group
                low = dot_int8(x_high, w_high, low, SWAP)
                low_sum += high_sum
            if HAS_ZERO_POINT:
                low -= x_zero_point * along_n(low_sum, SWAP)
            g = k // GROUP
            y = add_group(
                y, low, x_scale_ptrs, g * stride_xsg, w_scale_ptrs, g * stride_wsg,
                X_GROUPS, HAS_ZERO_POINT, SWAP,
            )  # fmt: skip
            if GROUP % 128 != 0:
                high = dot_int8(x_high, w_high, first_sum(zeros, HAS_ZERO_POINT), SWAP)
                if HAS_ZERO_POINT:
                    high -= x_zero_point * along_n(high_sum, SWAP)
                g = tl.minimum(k + 64, K - 1) // GROUP  # padding may lie after the last group
                y = add_group(
                    y, high, x_scale_ptrs, g * stride_xsg, w_scale_ptrs, g * stride_wsg,
                    X_GROUPS, HAS_ZERO_POINT, SWAP,
                )  # fmt: skip
            low_sum = w_sum
            high_sum = w_sum
    if GROUP:
        return y
    else:
        if HAS_ZERO_POINT:
            p -= x_zero_point * along_n(low_sum + high_sum, SWAP)
        return p


@jit
def _odd_groups(
    x_ptrs, w_ptrs, x_scale_ptrs, w_scale_ptrs, stride_xsg, stride_wsg,
    zeros, K, steps, x_zero_point,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr, X_PACKED: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Groups of any size: a masked dot product for what each has of a half of a block."""
    offs_b = tl.arange(0, 64)
    y = zeros.to(tl.float32)
    first, last = share_of(steps, SPLIT_K)
    for step in range(first, last):
        half, g, inside = segment_of(step, K, GROUP)
        byte = half // 2 * 64 + offs_b
        w = tl.load(w_ptrs + byte[None, :], mask=inside[None, :], other=0)  # [BLOCK_N, 64]
        w = tl.where(half % 2 == 0, low_nibbles(w), high_nibbles(w))
        if X_PACKED:
            x = tl.load(x_ptrs + byte[None, :], mask=inside[None, :], other=0)
            x = tl.where(half % 2 == 0, low_nibbles(x), high_nibbles(x))
        else:
            x = tl.load(x_ptrs + (half * 64 + offs_b)[None, :], mask=inside[None, :], other=0)
        p = dot_int8(x, w, first_sum(zeros, HAS_ZERO_POINT), SWAP)
        if HAS_ZERO_POINT:
            p -= x_zero_point * along_n(tl.sum(w.to(tl.int32), axis=1), SWAP)
        y = add_group(
            y, p, x_scale_ptrs, g * stride_xsg, w_scale_ptrs, g * stride_wsg,
            X_GROUPS, HAS_ZERO_POINT, SWAP,
        )  # fmt: skip
    return y


@entry
def _int4_linear_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, parts_ptr,
    M, N, K, steps, x_zero_point, out_step, out_zero_point,
    stride_xm, stride_wn, stride_xsm, stride_xsg, stride_wsn, stride_wsg,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr, X_PACKED: tl.constexpr, EVEN: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr, ACTIVATION: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr,
    GROUP_M: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # the last row is read again where there are no more: that costs no mask, and nobody stores it
    row_m, row_n = tl.minimum(offs_m, M - 1).to(tl.int64), tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + row_m[:, None] * stride_xm
    w_ptrs = w_ptr + row_n.to(tl.int64)[:, None] * stride_wn
    x_scale_at = row_m * stride_xsm
    w_scale_at = row_n * stride_wsn
    w_scale_ptrs = w_scale_ptr + w_scale_at
    x_scale_ptrs = None if x_scale_ptr is None else x_scale_ptr + x_scale_at
    zeros = along_m(offs_m * 0, SWAP) + along_n(offs_n * 0, SWAP)
    if GROUP % 32 == 0:
        y = _even_groups(
            x_ptrs, w_ptrs, x_scale_ptrs, w_scale_ptrs, stride_xsg, stride_wsg,
            zeros, offs_n * 0, K, steps, x_zero_point,
            GROUP, X_GROUPS, X_PACKED, HAS_ZERO_POINT, EVEN, BYTES, SWAP, SPLIT_K,
        )  # fmt: skip
    else:
        y = _odd_groups(
            x_ptrs, w_ptrs, x_scale_ptrs, w_scale_ptrs, stride_xsg, stride_wsg,
            zeros, K, steps, x_zero_point,
            GROUP, X_GROUPS, X_PACKED, HAS_ZERO_POINT, SWAP, SPLIT_K,
        )  # fmt: skip
    if GROUP:  # undoes the 16 of `low_nibbles`
        FACTOR: tl.constexpr = 1 / 256 if X_PACKED else 1 / 16
        y = times_x_scale(y, x_scale_ptr, x_scale_at, FACTOR, X_GROUPS, SWAP)
    if SPLIT_K > 1:
        store_part(parts_ptr, y, offs_m, offs_n, M, N, SWAP)
    else:
        if GROUP == 0:
            y = scaled(
                y >> (8 if X_PACKED else 4), x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N,
                x_scale_at, w_scale_at, SWAP,
            )  # fmt: skip
        store_linear(
            out_ptr, y, bias_ptr, offs_m, offs_n, M, N, out_step, out_zero_point,
            SWAP, ACTIVATION, QMIN, QMAX,
        )  # fmt: skip


def _check(
    x: torch.Size, w_scale: torch.Size, x_scale: torch.Size | None, bias: torch.Size | None,
    K: int, x_packed: bool, group_size: int | None,
) -> int:  # fmt: skip
    """The channels in a group; raises where shapes do not fit."""
    width = packed_width(K) if x_packed else K
    if x[-1] != width:
        raise ValueError(f"x_q must be [..., {width}] for {K} channels, got {list(x)}")
    check_scales(x, w_scale[0], x_scale, bias)
    G = max(w_scale[1], 1 if x_scale is None else x_scale[-1])
    return group_size_of(K, G, group_size)


@planned
def _plan(
    x: torch.Size, stride: tuple[int, ...], x_dtype: torch.dtype, device: torch.device,
    w: torch.Size, w_scale: torch.Size, x_scale: torch.Size | None, bias: torch.Size | None,
    K: int, x_packed: bool, x_zero_point: int, group_size: int | None, start: int | None,
    *output: Any,
) -> LinearPlan:  # fmt: skip
    """start: bytes before the first token in its storage; None where the weight is not aligned."""
    out = Output(*output)
    size = _check(x, w_scale, x_scale, bias, K, x_packed, group_size)
    M, (N, width) = prod(x[:-1]), w
    if w != (w_scale[0], packed_width(K)):
        want = [w_scale[0], packed_width(K)]
        raise ValueError(f"operand must be {want} for {K} channels, got {list(w)}")
    grouped = size < K
    bytes_, steps = packed_steps(K, size, width)
    if x_dtype == torch.uint8 and not x_packed:  # `as_int8` copies
        stride, x_zero_point = contiguous_strides(x), x_zero_point - BYTE_OFFSET
        start = None if start is None else 0
    check_sums(size, x_zero_point * (16 if x_packed else 1))
    op, step = f"int4_linear W4A{4 if x_packed else 8}", row_step(x, stride)
    x_groups = grouped and scale_strides(x_scale)[1] > 0
    if step is not None and start is not None:
        few = gemv_tile(
            op, M, N, K, width, device=device, group=size if grouped else 0, row=step, start=start
        )
        if few is not None:
            return plan_few(
                x, N, out.dtype, few,
                (N, K, width // 4, x_zero_point, out.step, out.zero_point, step,
                 *scale_strides(x_scale), *scale_strides(w_scale)),
                {"GROUP": size if grouped else 0, "X_GROUPS": x_groups,
                 "HAS_ZERO_POINT": x_zero_point != 0, **out.epilogue, "enable_fp_fusion": False},
            )  # fmt: skip
    tile = gemm_launch(
        op, M, N, K, device=device,
        grouped=grouped, weight_bits=4, computed_weights=True, computed_tokens=x_packed,
    )  # fmt: skip
    return plan_linear(
        x, stride, N, out.dtype, tile,
        (M, N, K, steps, x_zero_point * (16 if x_packed else 1), out.step, out.zero_point,
         x[-1] if step is None else step, width,
         *scale_strides(x_scale), *scale_strides(w_scale)),
        {"GROUP": size if grouped else 0, "X_GROUPS": x_groups,
         "X_PACKED": x_packed, "EVEN": K % 128 == 0, "HAS_ZERO_POINT": x_zero_point != 0,
         **out.epilogue, "BYTES": bytes_,
         "enable_fp_fusion": False},  # the epilogue then rounds as the reference does
        integers=not grouped, scaled=grouped, right_shift=0 if grouped else 8 if x_packed else 4,
        out=(out.step, out.zero_point), epilogue=out.epilogue,
    )  # fmt: skip


def _empty(
    x_q: Tensor, w: Tensor, _ws: Any, _b: Any, _k: Any, _p: Any, _xs: Any, _z: Any, _g: Any,
    *output: Any,
) -> Tensor:  # fmt: skip
    return empty_output(x_q, w.shape[0], *output)


@opaque(_empty)
def _launch_int4_linear(
    x_q: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, K: int, x_packed: bool,
    x_scale: Tensor | None, x_zero_point: int, group_size: int | None,
    activation: str | None, out_dtype: torch.dtype, out_codes: Codes | None, out_step: float,
    out_zero_point: int,
) -> Tensor:  # fmt: skip
    w = w.contiguous()
    plan = _plan(
        x_q.shape, x_q.stride(), x_q.dtype, x_q.device, w.shape, w_scale.shape, shape_of(x_scale),
        shape_of(bias), K, x_packed, x_zero_point, group_size,
        x_q.storage_offset() % 16 if aligned(w) else None,
        activation, out_dtype, out_codes, out_step, out_zero_point,
    )  # fmt: skip
    x_scale = None if x_scale is None else x_scale.contiguous()
    w_scale = w_scale.contiguous()
    return launch_linear(
        gemv_integers_kernel if plan.few else _int4_linear_kernel, plan,
        x_q if x_packed else as_int8(x_q), (w, x_scale, w_scale), bias, x_scale, w_scale,
    )  # fmt: skip


def int4_linear(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    x_packed: bool = False,
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
    """Multiplies codes by packed int4 codes and scales the integers once per group.

    Args:
        x_q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if x_packed.
        operand: the weights, from `prepare_int4` with the same backend.
        w_scale: [N, 1] or [N, G], float32.
        bias: [N], float32, or None.
        in_features: K.
        x_packed: x_q holds two codes a byte.
        x_scale: None (static), or [..., 1] or [..., G], float32.
        x_zero_point: subtracted from the codes of x.
        group_size: channels in a group, if there is more than one.
        activation: None or a name in `activation.ACTIVATIONS`.
        out_dtype: of the result, unless out_codes are given.
        out_codes: with them the result is clamp(round(y / out_step) + out_zero_point).

    Returns:
        y: [..., N], out_dtype, or int8 or uint8 codes.
    """
    name, K = backend_of(x_q, backend), in_features
    if name == "triton" and x_q.numel() and w_scale.shape[0]:
        return _launch_int4_linear(
            x_q, restore_int4(operand, K), w_scale, bias, K, x_packed, x_scale, x_zero_point,
            group_size, activation, out_dtype, out_codes, out_step, out_zero_point,
        )  # fmt: skip
    out = Output(activation, out_dtype, out_codes, out_step, out_zero_point)
    _check(x_q.shape, w_scale.shape, shape_of(x_scale), shape_of(bias), K, x_packed, group_size)
    if x_packed:
        x_q = unpack_int4(x_q, K)
    if name == "cpu":
        w = prepare_int4(operand, K, "cpu") if operand.dtype == torch.uint8 else operand
        return int8_linear(
            x_q, w, w_scale, bias, x_scale=x_scale, x_zero_point=x_zero_point,
            group_size=group_size, activation=activation, out_dtype=out_dtype,
            out_codes=out_codes, out_step=out_step, out_zero_point=out_zero_point, backend="cpu",
        )  # fmt: skip
    w_q = unpack_int4(restore_int4(operand, K), K)
    y = int8_linear_ref(
        x_q, w_q, w_scale, bias, x_scale=x_scale, x_zero_point=x_zero_point, group_size=group_size
    )
    return out.of(y)
