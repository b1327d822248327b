"""Rows in one tensor [ROWS, BLOCK_K]: for kernels that mix the channels of a token.

The others take several, see `_rows.py`.
"""

from ._code_bytes import to_bytes, two_nibbles
from ._lang import jit, larger, largest_along, tl


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
    return larger(largest_along(groups, 2), 1e-8) * clip


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
def store_codes(
    q_ptr, y, offs_m, start, M, width,
    QMIN: tl.constexpr, QMAX: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr,
    GROUP: tl.constexpr = 0, SPAN: tl.constexpr = 0,
):  # fmt: skip
    """Rounds y [ROWS, BLOCK_K] and writes bytes, or half-split nibbles."""
    if PACKED:
        offs = start // 2 + tl.arange(0, BLOCK_K // 2)
        mask_k = offs < width
        halves = tl.reshape(y, (ROWS, BLOCK_K // 128, 2, 64))
        low, high = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        codes = tl.reshape(two_nibbles(low, high, QMIN, QMAX), (ROWS, BLOCK_K // 2))
    else:
        offs, mask_k = lanes(start, width, GROUP, SPAN, BLOCK_K)
        codes = to_bytes(y, QMIN, QMAX, OFFSET)
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    tl.store(q_ptr + offs_m[:, None] * width + offs[None, :], codes, mask=mask)
