"""Linear layer on float activations with integer weights: W4A16 and W8A16.

    w_hat[n, k] = (w_q[n, k] - w_zero_point[n, g]) * w_scale[n, g]          g = k // group_size
    y[m, n]     = sum_k x[m, k] * w_hat[n, k] + bias[n]

M tokens, K input channels, N output channels, G groups of group_size channels (1 unless given).
Weights of up to 4 bits are packed in the layout of `packing.py`, wider ones are int8.
"""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gemv import aligned, gemv_floats_kernel, gemv_tile
from ._lang import (
    PTX,
    along_m,
    along_n,
    block_of,
    constexpr_function,
    entry,
    first_channel,
    jit,
    segment_of,
    share_of,
    store_linear,
    store_part,
    tile_of,
    tl,
)
from ._launch import dot_width, gemm_launch, packed_steps, steps_of
from ._linear import check_scales
from ._plan import opaque, planned, row_step, shape_of
from ._split_k import LinearPlan, launch_linear, plan_few, plan_linear
from .codes import group_size_of, scale_strides
from .dispatch import INTERPRETED, backend_of
from .packing import pack_int4, packed_width, unpack_int4


def dequantize_ref(
    w_q: Tensor, w_scale: Tensor, w_zero_point: Tensor | None, group_size: int | None
) -> Tensor:
    """w_hat [N, K], float32."""
    K, G = w_q.shape[1], w_scale.shape[1]
    size = group_size_of(K, G, group_size)
    w = w_q.float() if G * size == K else F.pad(w_q.float(), (0, G * size - K))
    w = w.unflatten(1, (G, size))  # [N, G, g]
    if w_zero_point is not None:
        w -= w_zero_point.unsqueeze(-1)
    w *= w_scale.unsqueeze(-1)
    return w.flatten(1)[:, :K]


def weight_only_linear_ref(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """The definition, in float32 and returned in x's dtype."""
    y = x.float() @ dequantize_ref(w_q, w_scale, w_zero_point, group_size).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def prepare_weight_only(
    w: Tensor, *, bits: int, in_features: int, backend: str | None = None
) -> Tensor:
    """The weights in the form that the backend reads. Done once.

    Args:
        w: [N, ceil(K / 128) * 64], uint8, if bits <= 4, else [N, K], int8.

    Returns:
        operand: w itself, but unpacked on a CPU, which takes longer to unpack than to multiply.
    """
    width = packed_width(in_features) if bits <= 4 else in_features
    dtype = torch.uint8 if bits <= 4 else torch.int8
    if w.dtype != dtype or w.ndim != 2 or w.shape[1] != width:
        raise ValueError(
            f"{bits}-bit weights over {in_features} channels need {dtype} [N, {width}], "
            f"got {w.dtype} {list(w.shape)}"
        )
    if backend_of(w, backend) == "cpu" and bits <= 4:
        return unpack_int4(w, in_features).contiguous()
    return w.contiguous()


def restore_weight_only(operand: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Inverts `prepare_weight_only`."""
    return pack_int4(operand) if bits <= 4 and operand.dtype == torch.int8 else operand


def weight_only_kernel_name(
    operand: Tensor, *, bits: int, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> str:
    """Which kernel `weight_only_linear` really runs for this operand and activations of `dtype`."""
    name = backend_of(operand, backend)
    if name == "cpu":
        return "dequantize, then float linear"
    return "triton weight_only_linear" if name == "triton" else "reference"


@jit
def _nibbles_to_float(w, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """Two's-complement nibbles to floats, by putting them into a float's mantissa.

    code + 8 under the exponent of 128 (bfloat16) or 1024 (float16), less 136 or 1032.
    """
    if PTX and DTYPE.is_bf16():
        return tl.inline_asm_elementwise(
            _unpack_ptx("0x43434343", "fma.rn.bf16x2", "0x3F803F80", "0xC308C308", HIGH),
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    elif PTX and DTYPE.is_fp16():
        return tl.inline_asm_elementwise(
            _unpack_ptx("0x64646464", "fma.rn.f16x2", "0x3C003C00", "0xE408E408", HIGH),
            "=r,=r,r", [w], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        nibble = w >> 4 if HIGH else w & 15
        return ((nibble ^ 8).to(tl.float32) - 8.0).to(DTYPE)


@constexpr_function
def _unpack_ptx(exponent, fma, one, minus, high):
    """Four nibbles of a register to four floats: mask and flip, spread, subtract."""
    source = "shr.b32 t, $2, 4;" if high else "mov.b32 t, $2;"
    return (
        f"{{ .reg .b32 t, u, v, one, minus; mov.b32 one, {one}; mov.b32 minus, {minus}; "
        + source
        + " lop3.b32 t, t, 0x0F0F0F0F, 0x08080808, 0x6A; "
        f"prmt.b32 u, t, {exponent}, 0x4140; prmt.b32 v, t, {exponent}, 0x4342; "
        f"{fma} $0, u, one, minus; {fma} $1, v, one, minus; }}"
    )


@jit
def _bytes_to_float(w, DTYPE: tl.constexpr):
    """int8 to floats, by way of a mantissa as above."""
    if PTX and DTYPE.is_bf16():
        return tl.inline_asm_elementwise(
            _widen_bf16_ptx(), "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif PTX and DTYPE.is_fp16():
        return tl.inline_asm_elementwise(
            _widen_fp16_ptx(), "=r,=r,r", [w], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        code = (w ^ -128).to(tl.uint8, bitcast=True).to(tl.int32)  # code + 128
        return ((code | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(DTYPE)


@constexpr_function
def _widen_bf16_ptx():
    """Four bytes of a register to four bfloat16, whose mantissa holds seven bits.

    Those under the exponent of 128, less 128, or 256 where the eighth, the sign, is set: with it
    as the last bit of the exponent 128 becomes 256.
    """
    lines = ["{ .reg .b32 t, less, minus; mov.b32 minus, 0xBF80BF80;"]
    for i, bytes_ in enumerate(("0x4140", "0x4342")):
        lines.append(f"prmt.b32 t, $2, 0x43434343, {bytes_};")
        lines.append("and.b32 less, t, 0xFF80FF80; and.b32 t, t, 0xFF7FFF7F;")
        lines.append(f"fma.rn.bf16x2 ${i}, less, minus, t;")
    return " ".join(lines) + " }"


@constexpr_function
def _widen_fp16_ptx():
    """To float16, whose mantissa holds code + 128: under the exponent of 1024, less 1152."""
    lines = ["{ .reg .b32 t, u, one, minus; mov.b32 one, 0x3C003C00; mov.b32 minus, 0xE480E480;"]
    lines.append("xor.b32 t, $2, 0x80808080;")
    for i, bytes_ in enumerate(("0x4140", "0x4342")):
        lines.append(f"prmt.b32 u, t, 0x64646464, {bytes_}; fma.rn.f16x2 ${i}, u, one, minus;")
    return " ".join(lines) + " }"


@jit
def _dot(x, w, acc, SWAP: tl.constexpr):
    """acc + x w^T, or its transpose; float32 in three products of tensor cores, within 2**-21."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="tf32x3")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="tf32x3")


@jit
def _add_group(
    y, p, x_sum, zero_point_ptrs, w_scale_ptrs, at,
    HAS_ZERO_POINT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """y + (p - zero_point * sum of x) * w_scale, which is exact where rounding w_hat is not."""
    if HAS_ZERO_POINT:
        p -= along_m(x_sum, SWAP) * along_n(tl.load(zero_point_ptrs + at), SWAP)
    return tl.fma(p, along_n(tl.load(w_scale_ptrs + at), SWAP), y)


@jit
def _load_x(x_ptrs, k, offs_k, end, EVEN: tl.constexpr):
    """Channels k + offs_k of a tile of x, 0 from `end` on."""
    if EVEN:
        return tl.load(x_ptrs + k)
    else:
        return tl.load(x_ptrs + k, mask=(offs_k < end - k)[None, :], other=0.0)


@jit
def _bytes(
    x_ptrs, w_ptrs, w_scale_ptrs, zero_point_ptrs, stride_sg, zeros, x_zeros, K, steps,
    GROUP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, DTYPE: tl.constexpr, EVEN: tl.constexpr,
    WIDTH: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """The scaled sum over int8 weights."""
    offs_k = tl.arange(0, WIDTH)
    x_ptrs += offs_k[None, :]
    w_ptrs += offs_k[None, :]
    y = zeros
    p = zeros
    x_sum = x_zeros
    first, last = share_of(steps, SPLIT_K)
    for step in range(first, last):
        k, end = block_of(step, K, GROUP, WIDTH)
        if EVEN:
            w = tl.load(w_ptrs + k)
        else:
            w = tl.load(w_ptrs + k, mask=(offs_k < end - k)[None, :], other=0)
        x = _load_x(x_ptrs, k, offs_k, end, EVEN)
        if HAS_ZERO_POINT:
            x_sum += tl.sum(x.to(tl.float32), axis=1)
        p = _dot(x.to(DTYPE), _bytes_to_float(w, DTYPE), p, SWAP)
        if GROUP:
            y = _add_group(
                y, p, x_sum, zero_point_ptrs, w_scale_ptrs, k // GROUP * stride_sg,
                HAS_ZERO_POINT, SWAP,
            )  # fmt: skip
            p = zeros
            x_sum = x_zeros
    if not GROUP:
        y = _add_group(y, p, x_sum, zero_point_ptrs, w_scale_ptrs, 0, HAS_ZERO_POINT, SWAP)
    return y


@jit
def _even_nibbles(
    x_ptrs, w_ptrs, w_scale_ptrs, zero_point_ptrs, stride_sg, zeros, x_zeros, K, steps,
    GROUP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, DTYPE: tl.constexpr, EVEN: tl.constexpr,
    WIDTH: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """The scaled sum over packed weights in one group or groups of a multiple of 32 channels."""
    offs_b = tl.arange(0, WIDTH)
    x_ptrs += offs_b[None, :]
    w_ptrs += offs_b[None, :]
    y = zeros
    p = zeros
    x_sum = x_zeros
    high_sum = x_zeros  # of its own: the compiler takes no two reductions into one sum
    first, last = share_of(steps, SPLIT_K)
    for step in range(first, last):
        b = step * WIDTH
        k = first_channel(step, WIDTH)
        w = tl.load(w_ptrs + b)
        x = _load_x(x_ptrs, k, offs_b, K, EVEN)
        if HAS_ZERO_POINT:
            x_sum += tl.sum(x.to(tl.float32), axis=1)
        p = _dot(x.to(DTYPE), _nibbles_to_float(w, False, DTYPE), p, SWAP)
        if GROUP % 128 != 0:
            y = _add_group(
                y, p, x_sum, zero_point_ptrs, w_scale_ptrs, k // GROUP * stride_sg,
                HAS_ZERO_POINT, SWAP,
            )  # fmt: skip
            p = zeros
            x_sum = x_zeros
        x = _load_x(x_ptrs, k + 64, offs_b, K, EVEN)
        if HAS_ZERO_POINT:
            high_sum += tl.sum(x.to(tl.float32), axis=1)
        p = _dot(x.to(DTYPE), _nibbles_to_float(w, True, DTYPE), p, SWAP)
        if GROUP:
            g = tl.minimum(k + 64, K - 1) // GROUP  # padding may lie after the last group
            y = _add_group(
                y, p, x_sum + high_sum, zero_point_ptrs, w_scale_ptrs, g * stride_sg,
                HAS_ZERO_POINT, SWAP,
            )  # fmt: skip
            p = zeros
            x_sum = x_zeros
            high_sum = x_zeros
    if not GROUP:
        y = _add_group(
            y, p, x_sum + high_sum, zero_point_ptrs, w_scale_ptrs, 0, HAS_ZERO_POINT, SWAP
        )
    return y


@jit
def _odd_nibbles(
    x_ptrs, w_ptrs, w_scale_ptrs, zero_point_ptrs, stride_sg, zeros, K, steps,
    GROUP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, DTYPE: tl.constexpr,
    SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Packed weights in groups of any size: a masked product for each part of a half of a block."""
    offs_b = tl.arange(0, 64)
    y = zeros
    first, last = share_of(steps, SPLIT_K)
    for step in range(first, last):
        half, g, inside = segment_of(step, K, GROUP)
        byte = (half // 2 * 64 + offs_b)[None, :]
        w = tl.load(w_ptrs + byte, mask=inside[None, :], other=0)
        w = tl.where(half % 2 == 0, w & 15, w >> 4)
        x = tl.load(x_ptrs + (half * 64 + offs_b)[None, :], mask=inside[None, :], other=0.0)
        p = _dot(x.to(DTYPE), _nibbles_to_float(w, False, DTYPE), zeros, SWAP)
        y = _add_group(
            y, p, tl.sum(x.to(tl.float32), axis=1), zero_point_ptrs, w_scale_ptrs,
            g * stride_sg, HAS_ZERO_POINT, SWAP,
        )  # fmt: skip
    return y


@entry
def _weight_only_linear_kernel(
    x_ptr, w_ptr, w_scale_ptr, zero_point_ptr, bias_ptr, out_ptr, parts_ptr,
    M, N, K, steps, stride_xm, stride_wn, stride_sn, stride_sg,
    GROUP: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    GROUP_M: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # the last row is read again where there are no more: that costs no mask, and nobody stores it
    row_m, row_n = tl.minimum(offs_m, M - 1), tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + row_m.to(tl.int64)[:, None] * stride_xm
    w_ptrs = w_ptr + row_n.to(tl.int64)[:, None] * stride_wn
    w_scale_ptrs = w_scale_ptr + row_n * stride_sn
    zero_point_ptrs = None if zero_point_ptr is None else zero_point_ptr + row_n * stride_sn
    zeros = (along_m(offs_m * 0, SWAP) + along_n(offs_n * 0, SWAP)).to(tl.float32)
    x_zeros = (offs_m * 0).to(tl.float32)
    if not PACKED:
        y = _bytes(
            x_ptrs, w_ptrs, w_scale_ptrs, zero_point_ptrs, stride_sg, zeros, x_zeros,
            K, steps, GROUP, HAS_ZERO_POINT, DTYPE, EVEN, WIDTH, SWAP, SPLIT_K,
        )  # fmt: skip
    elif GROUP % 32 == 0:
        y = _even_nibbles(
            x_ptrs, w_ptrs, w_scale_ptrs, zero_point_ptrs, stride_sg, zeros, x_zeros,
            K, steps, GROUP, HAS_ZERO_POINT, DTYPE, EVEN, WIDTH, SWAP, SPLIT_K,
        )  # fmt: skip
    else:
        y = _odd_nibbles(
            x_ptrs, w_ptrs, w_scale_ptrs, zero_point_ptrs, stride_sg, zeros,
            K, steps, GROUP, HAS_ZERO_POINT, DTYPE, SWAP, SPLIT_K,
        )  # fmt: skip
    if SPLIT_K > 1:
        store_part(parts_ptr, y, offs_m, offs_n, M, N, SWAP)
    else:
        store_linear(out_ptr, y, bias_ptr, offs_m, offs_n, M, N, 1.0, 0, SWAP, "", 0, 0)


def _check(
    x: torch.Size, K: int, w_scale: torch.Size, w_zero_point: torch.Size | None,
    bias: torch.Size | None, group_size: int | None,
) -> int:  # fmt: skip
    """The channels in a group; raises where shapes do not fit."""
    if x[-1] != K:
        raise ValueError(f"x must be [..., {K}], got {list(x)}")
    if w_zero_point is not None and w_zero_point != w_scale:
        raise ValueError(
            f"w_zero_point must be {list(w_scale)} as w_scale is, got {list(w_zero_point)}"
        )
    check_scales(x, w_scale[0], None, bias)
    return group_size_of(K, w_scale[1], group_size)


@planned
def _plan(
    x: torch.Size, stride: tuple[int, ...], x_dtype: torch.dtype, device: torch.device,
    w: torch.Size, w_scale: torch.Size, w_zero_point: torch.Size | None, bias: torch.Size | None,
    bits: int, K: int, group_size: int | None, start: int | None,
) -> LinearPlan:  # fmt: skip
    """start: bytes before the first token in its storage; None where the weight is not aligned."""
    size, packed = _check(x, K, w_scale, w_zero_point, bias, group_size), bits <= 4
    M, N = prod(x[:-1]), w_scale[0]
    if w != (N, packed_width(K) if packed else K):
        want = [N, packed_width(K) if packed else K]
        raise ValueError(f"operand must be {want} for {K} channels of {bits} bits, got {list(w)}")
    grouped, step = size < K, row_step(x, stride)
    op = f"weight_only_linear W{4 if packed else 8}A16"
    if step is not None and start is not None:
        few = gemv_tile(
            op, M, N, K, w[1], device=device, group=size if grouped else 0,
            row=step * x_dtype.itemsize, start=start,
        )  # fmt: skip
        if few is not None:
            return plan_few(
                x, N, x_dtype, few, (N, K, w[1] // 4, step, *scale_strides(w_scale)),
                {"GROUP": size if grouped else 0, "HAS_ZERO_POINT": w_zero_point is not None,
                 "enable_fp_fusion": True},
            )  # fmt: skip
    tile = gemm_launch(
        op, M, N, K, device=device, grouped=grouped,
        weight_bits=4 if packed else 8, computed_weights=True, wide=True,
        heavy=x_dtype == torch.float32 or K % 16 > 0,
    )  # fmt: skip
    if packed:
        width, steps = packed_steps(K, size, w[1])
    else:
        width = min(dot_width(size), 64) if grouped else 64
        steps = steps_of(K, size if grouped else 0, width)
    # the interpreter multiplies bfloat16 wrongly
    exact = x_dtype == torch.bfloat16 and INTERPRETED
    dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x_dtype, tl.float32)
    return plan_linear(
        x, stride, N, x_dtype, tile,
        (M, N, K, steps, K if step is None else step, w[1], *scale_strides(w_scale)),
        {"GROUP": size if grouped else 0, "PACKED": packed,
         "EVEN": K % 128 == 0 if packed else K % width == 0 and (not grouped or size % width == 0),
         "HAS_ZERO_POINT": w_zero_point is not None, "DTYPE": tl.float32 if exact else dtype,
         "WIDTH": width, "enable_fp_fusion": True},
        integers=False, scaled=True, epilogue={"ACTIVATION": "", "QMIN": 0, "QMAX": 0},
    )  # fmt: skip


def _empty(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@opaque(_empty)
def _launch_weight_only_linear(
    x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, w_zero_point: Tensor | None,
    bits: int, K: int, group_size: int | None,
) -> Tensor:  # fmt: skip
    w = w.contiguous()
    plan = _plan(
        x.shape, x.stride(), x.dtype, x.device, w.shape, w_scale.shape, shape_of(w_zero_point),
        shape_of(bias), bits, K, group_size,
        x.storage_offset() * x.itemsize % 16 if aligned(w) else None,
    )  # fmt: skip
    zero_point = None if w_zero_point is None else w_zero_point.contiguous()
    return launch_linear(
        gemv_floats_kernel if plan.few else _weight_only_linear_kernel, plan, x,
        (w, w_scale.contiguous(), zero_point), bias,
    )  # fmt: skip


def weight_only_linear(
    x: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    w_zero_point: Tensor | None = None,
    bits: int,
    in_features: int,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiplies activations by weights that are dequantized on the way.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        operand: the weights, from `prepare_weight_only` with the same backend.
        w_scale: [N, 1] or [N, G], float32.
        bias: [N], or None.
        w_zero_point: as w_scale, or None for 0; need not be whole.
        bits: 2 to 8, of the weights.
        in_features: K.
        group_size: channels in a group, if there is more than one.

    Returns:
        y: [..., N], in x's dtype.
    """
    name, K = backend_of(x, backend), in_features
    if name == "triton" and x.numel() and w_scale.shape[0]:
        w = restore_weight_only(operand, bits=bits, in_features=K)
        return _launch_weight_only_linear(x, w, w_scale, bias, w_zero_point, bits, K, group_size)
    _check(x.shape, K, w_scale.shape, shape_of(w_zero_point), shape_of(bias), group_size)
    w_q = unpack_int4(operand, K) if operand.dtype == torch.uint8 else operand
    if name == "cpu":
        w = dequantize_ref(w_q, w_scale, w_zero_point, group_size).to(x.dtype)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype))
    return weight_only_linear_ref(x, w_q, w_scale, bias, w_zero_point, group_size)
