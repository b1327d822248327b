"""Triton if there is one, and the pieces that kernels share.

Without Triton (it is only published for Linux) the kernels below become plain functions that nobody
calls, so that the cpu and reference backends work everywhere.

The arithmetic is float32 and avoids libdevice, inline assembly and bfloat16 arithmetic, which the
interpreter does not run, or runs wrongly.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

if find_spec("triton"):
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
    jit: Any = triton.jit
    constexpr_function: Any = triton.constexpr_function
else:
    triton, tl = None, SimpleNamespace(constexpr=int)
    jit = constexpr_function = lambda kernel: kernel


# Inline PTX works on four bytes at once; the interpreter cannot run it and takes the other branch.
PTX = tl.constexpr(triton is not None and os.environ.get("TRITON_INTERPRET") != "1")


@jit
def round_codes(y, qmin, qmax):
    """Rounds to nearest even and clamps: float32 to int32, without a conversion instruction."""
    y = tl.minimum(tl.maximum(y, qmin), qmax)
    # adding 1.5 * 2**23 rounds the fraction away and leaves the integer in the low bits; exact
    # because the clamp comes first, which integer bounds allow
    return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@jit
def activate_tile(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        y = y * 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        # (1 + tanh(u)) / 2 is the logistic function of 2u, which needs no libdevice
        y = tl.div_rn(y, 1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    return y


@jit
def lanes(start, K, GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr):
    """The channels of a tile, and which of them there are.

    A group whose size is no power of two takes SPAN lanes of a tile and leaves some idle.
    """
    lane = tl.arange(0, BLOCK_K)
    if GROUP == SPAN:
        return start + lane, start + lane < K
    else:
        offs_k = start + lane // SPAN * GROUP + lane % SPAN
        return offs_k, (lane % SPAN < GROUP) & (offs_k < K)


@jit
def dynamic_limit(y, clip, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr):
    """The largest magnitude to represent, per group: [ROWS, BLOCK_K] to [ROWS, BLOCK_K / SPAN]."""
    groups = tl.reshape(tl.abs(y), (ROWS, BLOCK_K // SPAN, SPAN))
    return tl.maximum(tl.max(groups, axis=2), 1e-8) * clip


@jit
def dynamic_divide(
    y, limit, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, QMAX: tl.constexpr
):
    inverse = tl.div_rn(limit * 0.0 + QMAX, limit)
    groups = tl.reshape(y, (ROWS, BLOCK_K // SPAN, SPAN))
    return tl.reshape(groups * inverse[:, :, None], (ROWS, BLOCK_K))


@jit
def store_scale(
    scale_ptr, limit, offs_m, M, G, first,
    BLOCK_G: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    offs_g = first + tl.arange(0, BLOCK_G)
    mask = (offs_m < M)[:, None] & (offs_g < G)[None, :]
    scale = tl.div_rn(limit, limit * 0.0 + QMAX)
    tl.store(scale_ptr + offs_m[:, None] * G + offs_g[None, :], scale, mask=mask)


@jit
def in_order(codes, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
             SPAN: tl.constexpr):  # fmt: skip
    """Padded groups moved together: [ROWS, BLOCK_K], zeros at the end."""
    CHANNELS: tl.constexpr = BLOCK_K // SPAN * GROUP
    channel = tl.arange(0, BLOCK_K)
    lane = tl.where(channel < CHANNELS, channel // GROUP * SPAN + channel % GROUP, 0)
    at = tl.broadcast_to(lane[None, :], (ROWS, BLOCK_K))
    return tl.where((channel < CHANNELS)[None, :], tl.gather(codes, at, axis=1), 0)


@jit
def store_codes(
    q_ptr, codes, offs_m, start, M, width,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr,
    GROUP: tl.constexpr = 0, SPAN: tl.constexpr = 0,
):  # fmt: skip
    """Writes [ROWS, BLOCK_K] codes as bytes, or as half-split nibbles."""
    if PACKED:
        offs = start // 2 + tl.arange(0, BLOCK_K // 2)
        mask_k = offs < width
        if GROUP != SPAN:
            codes = in_order(codes, ROWS, BLOCK_K, GROUP, SPAN)
            if BLOCK_K // SPAN * GROUP % 128 == 0:  # what follows belongs to the next tile
                mask_k &= tl.arange(0, BLOCK_K // 2) < BLOCK_K // SPAN * GROUP // 2
        halves = tl.reshape(codes & 15, (ROWS, BLOCK_K // 128, 2, 64))
        shift = (tl.arange(0, 2) * 4)[None, None, :, None]
        codes = tl.reshape(tl.sum(halves << shift, axis=2), (ROWS, BLOCK_K // 2))
    else:
        offs, mask_k = lanes(start, width, GROUP, SPAN, BLOCK_K)
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    tl.store(q_ptr + offs_m[:, None] * width + offs[None, :], codes.to(tl.int8), mask=mask)


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
    p, x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N, x_at, w_at, SWAP: tl.constexpr,
    FACTOR: tl.constexpr = 1.0,
):  # fmt: skip
    """(p * x_scale) * (w_scale * FACTOR) in float32; x_at and w_at are the offsets of the scales.

    FACTOR is a power of two, which changes no digit.
    """
    y = p.to(tl.float32)
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + x_at, mask=offs_m < M, other=0.0)
        y = y * along_m(x_scale, SWAP)
    if w_scale_ptr is not None:
        w_scale = tl.load(w_scale_ptr + w_at, mask=offs_n < N, other=0.0) * FACTOR
        y = y * along_n(w_scale, SWAP)
    return y


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
def segment_of(step, K, GROUP: tl.constexpr):
    """Where groups end inside packed bytes, a step is what a group has of one half of a block.

    Returns the half's number, the group's number, and the channels of the half that belong to both.
    """
    SEGMENTS: tl.constexpr = (62 + GROUP) // GROUP + 1  # groups that 64 channels may touch
    half = step // SEGMENTS
    g = half * 64 // GROUP + step % SEGMENTS
    offs_k = half * 64 + tl.arange(0, 64)
    inside = (offs_k >= g * GROUP) & (offs_k < g * GROUP + GROUP) & (offs_k < K)
    return half, tl.minimum(g, (K - 1) // GROUP), inside  # nothing is inside behind the last group


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
