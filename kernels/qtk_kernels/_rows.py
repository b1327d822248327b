"""Tiles of rows: what the kernels share that quantize a token's channels.

A program holds ROWS tokens as PARTS tensors [ROWS, PART]. A row of 768 channels is three parts of
256 lanes without an idle one, and the two nibbles of a packed byte are the same lane of the parts
2 i and 2 i + 1, so that packing moves nothing from thread to thread.

GROUP channels share a scale and take SPAN lanes; GROUP is 0 for static codes, and TOKEN where one
scale serves a token. FULL: no lane of the tile is idle, no mask is needed.
"""

from . import codes
from ._code_bytes import to_bytes, two_nibbles
from ._lang import PTX, jit, larger, largest_along, tl

TOKEN = tl.constexpr(codes.TOKEN)


@jit
def none():
    """No parts yet."""
    return ()


@jit
def append(parts, part):
    return parts + (part,)  # noqa: RUF005 (Triton unpacks no tuple)


@jit
def channels_of_part(
    start, K, P: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The channels [PART] of part P of a tile, and which of them there are."""
    lane = tl.arange(0, PART)
    if PACKED:  # half-split blocks of 128 channels
        offs_k = start + (P // 2 * 2 * PART + P % 2 * 64) + lane // 64 * 128 + lane % 64
        return offs_k, offs_k < K
    elif GROUP == SPAN:
        offs_k = start + P * PART + lane
        return offs_k, offs_k < K
    else:  # a group whose size is no power of two leaves lanes idle
        offs_k = start + P * (PART // SPAN * GROUP) + lane // SPAN * GROUP + lane % SPAN
        return offs_k, (lane % SPAN < GROUP) & (offs_k < K)


@jit
def load_floats(at, mask, FULL: tl.constexpr):
    # a mask costs an instruction a register
    x = tl.load(at) if FULL else tl.load(at, mask=mask, other=0.0)
    if PTX and x.dtype.is_bf16():  # one instruction each; the compiler takes two for the upper half
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=r,=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@jit
def load_rows(
    ptr, offs_m, stride, start, K,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS tensors [ROWS, PART], float32; [1, PART] of a vector, which is a row of stride 0.

    As [1, PART] a vector shares the layout of rows, and needs no way through shared memory.
    """
    parts = none()
    for P in tl.static_range(PARTS):
        offs_k, mask = channels_of_part(start, K, P, GROUP, SPAN, PACKED, PART)
        at = ptr + offs_m[:, None] * stride + offs_k[None, :]
        parts = append(parts, load_floats(at, mask[None, :], FULL))
    return parts


@jit
def largest(
    ys, clip,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The magnitudes to represent: [ROWS, 1] of a token, else [ROWS, groups] of every part.

    Two halves of a block that lie in one group have the same.
    """
    if GROUP == TOKEN:
        top = tl.abs(ys[0])
        for P in tl.static_range(1, PARTS):
            top = larger(top, tl.abs(ys[P]))
        return larger(largest_along(top, 1)[:, None], 1e-8) * clip
    else:
        limits = none()
        PAIRED: tl.constexpr = PACKED and SPAN > 64
        LANES: tl.constexpr = SPAN // 2 if PAIRED else SPAN
        for P in tl.static_range(PARTS):
            top = tl.abs(ys[P])
            if PAIRED:
                top = larger(top, tl.abs(ys[P ^ 1]))
            top = largest_along(tl.reshape(top, (ROWS, PART // LANES, LANES)), 2)
            limits = append(limits, larger(top, 1e-8) * clip)
        return limits


@jit
def store_scale(scale_ptr, limit, at, mask, QMAX: tl.constexpr):
    tl.store(scale_ptr + at, tl.div_rn(limit, limit * 0.0 + QMAX), mask=mask)


@jit
def store_scales(
    scale_ptr, limits, offs_m, start, G,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, QMAX: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes limits / QMAX to scale [M, G]; M - 1 may be several rows' number, all the same."""
    row = offs_m[:, None] * G
    if GROUP == TOKEN:
        store_scale(scale_ptr, limits, row, None, QMAX)
    else:
        PAIRED: tl.constexpr = PACKED and SPAN > 64
        STEP: tl.constexpr = 2 if PAIRED else 1
        GROUPS: tl.constexpr = PART * STEP // SPAN
        HALF: tl.constexpr = 64 // SPAN if PACKED and not PAIRED else 1  # groups in half a block
        for P in tl.static_range(0, PARTS, STEP):
            i = tl.arange(0, GROUPS)
            if PACKED and not PAIRED:
                g = P // 2 * 2 * GROUPS + P % 2 * HALF + i // HALF * 2 * HALF + i % HALF
            else:
                g = P // STEP * GROUPS + i
            g = (start // GROUP + g)[None, :]
            store_scale(scale_ptr, limits[P], row + g, g < G, QMAX)


@jit
def divided(
    ys, limits,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, QMAX: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ys * (QMAX / limits)."""
    LANES: tl.constexpr = SPAN // 2 if PACKED and SPAN > 64 else SPAN
    scaled = none()
    for P in tl.static_range(PARTS):
        if GROUP == TOKEN:
            scaled = append(scaled, ys[P] * tl.div_rn(limits * 0.0 + QMAX, limits))
        else:
            inverse = tl.div_rn(limits[P] * 0.0 + QMAX, limits[P])
            groups = tl.reshape(ys[P], (ROWS, PART // LANES, LANES)) * inverse[:, :, None]
            scaled = append(scaled, tl.reshape(groups, (ROWS, PART)))
    return scaled


@jit
def store_rows(
    q_ptr, ys, offs_m, start, K, width,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, OFFSET: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Rounds ys and writes bytes, or half-split nibbles, to q [M, width]."""
    row = q_ptr + offs_m[:, None] * width
    if PACKED:
        for P in tl.static_range(0, PARTS, 2):
            byte = start // 2 + P // 2 * PART + tl.arange(0, PART)
            nibbles = two_nibbles(ys[P], ys[P + 1], QMIN, QMAX)
            if FULL:
                tl.store(row + byte[None, :], nibbles)
            else:
                tl.store(row + byte[None, :], nibbles, mask=(byte < width)[None, :])
    else:
        for P in tl.static_range(PARTS):
            offs_k, mask = channels_of_part(start, K, P, GROUP, SPAN, PACKED, PART)
            codes = to_bytes(ys[P], QMIN, QMAX, OFFSET)
            if FULL:
                tl.store(row + offs_k[None, :], codes)
            else:
                tl.store(row + offs_k[None, :], codes, mask=mask[None, :])
