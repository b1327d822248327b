"""Triton if there is one, and the pieces that kernels share.

Without Triton (it is only published for Linux, and an import may fail where a driver is missing)
the kernels below become plain functions that nobody calls, so that the cpu and reference backends
work everywhere.

The arithmetic is float32 and avoids libdevice, inline assembly and bfloat16 arithmetic, which the
interpreter does not run, or runs wrongly.
"""

import os
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

# counts of tokens, bytes of a row and zero points: the JIT would make constants of those that are
# 1, which have no methods, and a binary for each kind of them
RUN_TIME = ("M", "Tq", "steps", "row_bytes", "x_zero_point", "out_zero_point")

try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
    jit: Any = triton.jit
    entry: Any = triton.jit(do_not_specialize=RUN_TIME)  # of what the host launches
    constexpr_function: Any = triton.constexpr_function
except Exception:  # a broken installation raises what it likes
    triton, tl = None, SimpleNamespace(constexpr=int)
    jit = entry = constexpr_function = lambda kernel: kernel


# Inline PTX works on four bytes at once; the interpreter cannot run it and takes the other branch.
PTX = tl.constexpr(
    triton is not None and os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None
)


@jit
def round_codes(y, qmin, qmax):
    """Rounds to nearest even and clamps: float32 to int32, without a conversion instruction."""
    y = tl.minimum(tl.maximum(y, qmin), qmax)
    # adding 1.5 * 2**23 rounds the fraction away and leaves the integer in the low bits; exact
    # because the clamp comes first, which integer bounds allow
    return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@jit
def larger(a, b):
    """The larger of two, nan where one is: `tl.maximum` loses it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def largest_along(x, axis: tl.constexpr):
    """The largest of magnitudes along an axis, nan where one is."""
    if PTX:
        return tl.reduce(x, axis, larger)
    else:  # bits of magnitudes are ordered as they are, nan last; the interpreter skips a nan
        return tl.max(x.to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)


@jit
def exp2(x):
    """2**x within 2 ulp, 0 for results below 2**-126."""
    if PTX:  # without the instructions that make room for smaller results
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(tl.minimum(x, 127.0))  # NumPy warns of infinite results


@jit
def reciprocal(x):
    """1 / x within 1 ulp."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(1.0, x)


@jit
def rsqrt(x):
    """1 / sqrt(x) of positive numbers within 1 ulp: the approximation, and a step of Newton's."""
    r = tl.rsqrt(x)
    return r * tl.fma(-0.5 * x * r, r, 1.5)


@jit
def gelu_tile(y):
    """y Phi(y) = max(y, 0) - |y| Phi(-|y|), the latter as 2 to the power of a polynomial.

    It is a minimax fit of log2 Phi(-a), exact at 0, that moves Phi by less than 4e-8 anywhere: it
    falls for ever, as Phi(-a) does.
    """
    a = tl.abs(y)
    p = tl.fma(a, -2.83505795e-06, 3.93791473e-05)
    p = tl.fma(p, a, -1.86185961e-04)
    p = tl.fma(p, a, -1.36925142e-04)
    p = tl.fma(p, a, 7.06340848e-03)
    p = tl.fma(p, a, -5.24961722e-02)
    p = tl.fma(p, a, -4.59208198e-01)
    p = tl.fma(p, a, -1.15110521)
    return tl.fma(-a, exp2(tl.fma(p, a, -1.0)), tl.maximum(y, 0.0))


@jit
def activate_tile(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        y = gelu_tile(y)
    elif ACTIVATION == "gelu_tanh":
        # y over 1 + exp(-2 u), u = sqrt(2 / pi) (y + 0.044715 y**3): (1 + tanh u) / 2 is that
        exponent = y * tl.fma(y * y, -0.1029432397, -2.302208198)  # of 2
        y = y * reciprocal(1.0 + exp2(exponent))
    elif ACTIVATION == "silu":  # y over 1 + exp(-y)
        y = y * reciprocal(1.0 + exp2(y * -1.442695041))
    elif ACTIVATION == "quick_gelu":  # y over 1 + exp(-1.702 y)
        y = y * reciprocal(1.0 + exp2(y * -2.455466960))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    return y


@jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Walks GROUP_M rows of tiles down before going right, so that weights stay in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@jit
def along_m(v, SWAP: tl.constexpr):
    """[BLOCK_M], to be broadcast over an accumulator [M, N], or [N, M] if SWAP."""
    if SWAP:
        return v[None, :]
    else:
        return v[:, None]


@jit
def along_n(v, SWAP: tl.constexpr):
    """[BLOCK_N], to be broadcast over an accumulator [M, N], or [N, M] if SWAP."""
    if SWAP:
        return v[:, None]
    else:
        return v[None, :]


@jit
def dot_int8(x, w, acc, SWAP: tl.constexpr):
    """acc + x w^T, or its transpose: few tokens fill a tensor core better from the other side."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
    else:
        return tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)


@jit
def scaled(
    p, x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N, x_at, w_at, SWAP: tl.constexpr
):  # fmt: skip
    """(p * x_scale) * w_scale in float32; x_at and w_at are the offsets of the scales."""
    y = p.to(tl.float32)
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + x_at, mask=offs_m < M, other=0.0)
        y = y * along_m(x_scale, SWAP)
    if w_scale_ptr is not None:
        w_scale = tl.load(w_scale_ptr + w_at, mask=offs_n < N, other=0.0)
        y = y * along_n(w_scale, SWAP)
    return y


@jit
def first_sum(zeros, HAS_ZERO_POINT: tl.constexpr):
    """What the integer sum of a block starts from: the bits of 1.5 * 2**23, see `float_of`."""
    if HAS_ZERO_POINT:
        return zeros
    else:
        return zeros + 0x4B400000


@jit
def float_of(p, HAS_ZERO_POINT: tl.constexpr):
    """A sum of at most 128 products of bytes, from `first_sum` on, without a conversion.

    It is at most 2**21, so that added to the bits of 1.5 * 2**23 it counts units of that float.
    With a zero point, which nothing bounds, it is converted.
    """
    if HAS_ZERO_POINT:
        return p.to(tl.float32)
    else:
        return p.to(tl.float32, bitcast=True) - 12582912.0


@jit
def add_group(
    y, p, x_scale_ptrs, x_at, w_scale_ptrs, w_at,
    X_GROUPS: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """y + p * w_scale, and times x_scale if that varies with the group."""
    p = float_of(p, HAS_ZERO_POINT)
    if X_GROUPS:
        p = p * along_m(tl.load(x_scale_ptrs + x_at), SWAP)
    return tl.fma(p, along_n(tl.load(w_scale_ptrs + w_at), SWAP), y)


@jit
def times_x_scale(
    y, x_scale_ptr, x_at, FACTOR: tl.constexpr, X_GROUPS: tl.constexpr, SWAP: tl.constexpr
):
    """The sum over groups times FACTOR, a power of two, and x_scale where all groups share it."""
    if X_GROUPS or x_scale_ptr is None:
        return y * FACTOR
    else:
        return y * along_m(tl.load(x_scale_ptr + x_at) * FACTOR, SWAP)


@jit
def share_of(total, SPLIT_K: tl.constexpr):
    """The steps along K that this program takes: first and past the last."""
    each = tl.cdiv(total, SPLIT_K)
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, total)


@jit
def low_nibbles(byte):
    """16 times the code: in the upper half of a byte a nibble needs no sign extension."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (byte << 4).to(tl.int8, bitcast=True)


@jit
def high_nibbles(byte):
    if PTX:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (byte & 0xF0).to(tl.int8, bitcast=True)


@jit
def block_of(step, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """First channel of a step along K, and the end of what belongs to it: of its group, or of K."""
    if GROUP % BLOCK_K == 0:
        return step * BLOCK_K, K
    else:
        BLOCKS: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K  # of a group
        g = step // BLOCKS
        return g * GROUP + step % BLOCKS * BLOCK_K, tl.minimum(g * GROUP + GROUP, K)


@jit
def first_channel(step, BYTES: tl.constexpr):
    """The channel of the first low nibble of a step over packed weights, 64 or 32 bytes."""
    if BYTES == 64:
        return step * 128
    else:
        return step // 2 * 128 + step % 2 * BYTES


@jit
def segment_of(step, K, GROUP: tl.constexpr):
    """Where groups end inside packed bytes, a step is what a group has of one half of a block.

    Returns the half's number, the group's number, and the channels of the half that belong to both.
    """
    SEGMENTS: tl.constexpr = (62 + GROUP) // GROUP + 1  # groups that 64 channels may touch
    half = step // SEGMENTS
    g = half * 64 // GROUP + step % SEGMENTS
    offs_k = half * 64 + tl.arange(0, 64)
    inside = (offs_k >= g * GROUP) & (offs_k < g * GROUP + GROUP) & (offs_k < K)
    return half, tl.minimum(g, (K - 1) // GROUP), inside  # nothing is inside after the last group


@jit
def store_part(parts_ptr, part, offs_m, offs_n, M, N, SWAP: tl.constexpr):
    """Writes one split's share of the sum to parts [SPLIT_K, M, N]."""
    row = tl.program_id(1).to(tl.int64) * M + offs_m
    mask = along_m(offs_m < M, SWAP) & along_n(offs_n < N, SWAP)
    tl.store(parts_ptr + along_m(row, SWAP) * N + along_n(offs_n, SWAP), part, mask=mask)


@jit
def store_linear(
    out_ptr, y, bias_ptr, offs_m, offs_n, M, N, out_step, out_zero_point,
    SWAP: tl.constexpr, ACTIVATION: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    """Adds the bias, activates, requantizes if QMAX > QMIN and stores to out [M, N]."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        y = y + along_n(bias, SWAP)
    y = activate_tile(y, ACTIVATION)
    at = along_m(offs_m.to(tl.int64), SWAP) * N + along_n(offs_n, SWAP)
    mask = along_m(offs_m < M, SWAP) & along_n(offs_n < N, SWAP)
    if QMAX > QMIN:
        zero_point = out_zero_point.to(tl.float32)
        codes = round_codes(tl.div_rn(y, y * 0.0 + out_step), QMIN - zero_point, QMAX - zero_point)
        tl.store(out_ptr + at, (codes + out_zero_point).to(tl.int8), mask=mask)
    else:
        tl.store(out_ptr + at, y, mask=mask)
