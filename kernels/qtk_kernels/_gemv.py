"""One or two tokens times packed int4 weights, W4A16 and W4A8, without a tensor core.

A product of so few tokens is as fast as its weights arrive. A tensor core multiplies 16 tokens or
more, its operand goes through shared memory, and so few tiles need a sum in parts and a second
launch. Here a program takes some output channels over all of K, 16 bytes a load straight to
registers, in one launch. The formulas, and the definitions in plain PyTorch, are those of
`weight_only_linear.py` and `int4_linear.py`.

A word is four bytes of a packed row: channels k to k + 3 in its low nibbles, k + 64 to k + 67 in
its high ones. Integers go by dp4a, four products an instruction. For floats a nibble becomes the
top of a mantissa, code + 24, by one byte permute, and 24 times the sum of x is taken off for all
rows at once; everything stays float32.
"""

from typing import Any

import torch
from torch import Tensor

from ._lang import PTX, constexpr_function, entry, jit, scaled, store_linear, tl
from ._launch import SMS, cdiv, is_forced, measured, next_power_of_2

MOST_ROWS = 2
CHUNK = tl.constexpr(4)  # words of a load: 16 bytes, which lie in one half of a block
WORDS = 512  # of a row and step
MOST_N = 8  # output channels of a program
# of packed weights, by tokens: floats take 4.6 instructions a weight (8.2 of two tokens) where
# tiles take 2.8, and beyond no second launch makes up for that
MOST_BYTES = {1: 1 << 25, 2: 1 << 23}


def serves(kernel: str, M: int, N: int, K: int) -> bool:
    """Whether that op multiplies so by rule, of aligned operands."""
    op = kernel.removesuffix(" grouped")
    if M > MOST_ROWS or K % 4:
        return False
    return op == "int4_linear W4A8" or (
        op == "weight_only_linear W4A16" and MOST_BYTES[M] >= N * K // 2
    )


def gemv_tile(
    kernel: str, M: int, N: int, K: int, width: int, *, device: torch.device, group: int,
    row: int, start: int,
) -> dict[str, Any] | None:  # fmt: skip
    """The parameters of a launch; None where the product with tiles serves.

    Args:
        kernel: the op's name in the tables of measured tiles, whose word counts.
        width: bytes of a packed row.
        group: channels in a group, 0 for one group; loads of 16 bytes must lie in one.
        row: bytes from token to token, start: from the storage's begin to the first.
    """
    if not serves(kernel, M, N, K) or group % 16 or is_forced():
        return None
    word = 4 if kernel.startswith("int4") else 8  # bytes of x in a load of codes, or of floats
    if start % word or (M > 1 and row % word):
        return None
    if measured(kernel, M, N, K, device, grouped=group > 0) is not None:
        return None
    words = width // 4
    step = min(next_power_of_2(words), WORDS)
    rows = MOST_N if word == 4 else MOST_N // M  # sums in float32 of two tokens fill registers
    while rows > 1 and cdiv(N, rows) < 2 * SMS:
        rows //= 2
    return {
        "ROWS": M, "BLOCK_N": rows, "WORDS": step, "EVEN": K % 128 == 0 and words % step == 0,
        "num_warps": max(step // (32 * 4), 1),
    }  # fmt: skip


def aligned(w: Tensor) -> bool:
    """Whether a weight's rows, whole blocks of 64 bytes, begin on 16 bytes."""
    return w.storage_offset() % 16 == 0


@jit
def _words(w_ptr, offs_n, N, words, offs_j, EVEN: tl.constexpr):
    """A step's words, [BLOCK_N, WORDS]; the last row is read again where there are no more."""
    row = w_ptr.to(tl.pointer_type(tl.int32)) + tl.minimum(offs_n, N - 1).to(tl.int64) * words
    at = row[:, None] + offs_j[None, :]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(offs_j < words)[None, :], other=0)


@jit
def _channel(offs_j):
    """The channel of a word's first low nibble."""
    return offs_j // 16 * 128 + offs_j % 16 * 4


@constexpr_function
def _floats_ptx():
    """The eight nibbles of a word to code + 24, low ones first.

    (16 + n) is 0x41 in the first byte of a float32 and 0x80 + 8 n in the second; n is code + 8.
    """
    lines = ["{ .reg .b32 t, one; mov.b32 one, 0x41000000;"]
    for half, shift in enumerate(("shl.b32 t, $8, 3;", "shr.u32 t, $8, 1;")):
        lines.append(f"{shift} lop3.b32 t, t, 0x78787878, 0xC0C0C0C0, 0x6A;")
        lines += [f"prmt.b32 ${4 * half + i}, t, one, 0x7{i}44;" for i in range(4)]
    return " ".join(lines) + " }"


@jit
def _floats(w):
    """code + 24 of a word's eight nibbles."""
    if PTX:
        return tl.inline_asm_elementwise(
            _floats_ptx(), "=r,=r,=r,=r,=r,=r,=r,=r,r", [w],
            dtype=(
                tl.float32, tl.float32, tl.float32, tl.float32,
                tl.float32, tl.float32, tl.float32, tl.float32,
            ), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            _float(w), _float(w >> 8), _float(w >> 16), _float(w >> 24),
            _float(w >> 4), _float(w >> 12), _float(w >> 20), _float(w >> 28),
        )  # fmt: skip


@jit
def _float(w):
    return (((w & 15) ^ 8) + 16).to(tl.float32)


@jit
def _four(x_ptr, k, K, EVEN: tl.constexpr):
    """Channels k to k + 3 as four tensors in float32, 0 beyond K; 8 bytes a load."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    long = (x_ptr + k).to(tl.pointer_type(tl.int64))
    if DTYPE.is_fp32():
        first = _load(long, k, K, EVEN)
        second = _load(long + 1, k, K, EVEN)
        return (
            first.to(tl.int32).to(tl.float32, bitcast=True),
            (first >> 32).to(tl.int32).to(tl.float32, bitcast=True),
            second.to(tl.int32).to(tl.float32, bitcast=True),
            (second >> 32).to(tl.int32).to(tl.float32, bitcast=True),
        )
    else:
        x = _load(long, k, K, EVEN)
        low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
        return (
            _half(low, False, DTYPE), _half(low, True, DTYPE),
            _half(high, False, DTYPE), _half(high, True, DTYPE),
        )  # fmt: skip


@jit
def _load(at, k, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=k < K, other=0)


@jit
def _half(pair, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """One of two 16-bit floats of a word, in float32."""
    if DTYPE.is_bf16():  # a float32 without its lower half
        bits = pair & -65536 if HIGH else pair << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        bits = pair >> 16 if HIGH else pair
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _chunks(p):
    """Sums over the words of a load, [rows, WORDS] to [rows, WORDS / 4]."""
    return tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // CHUNK, CHUNK)), axis=2)


@jit
def _add_products(p, x, c0, c1, c2, c3):
    """p and four products a word."""
    p = tl.fma(c0, tl.broadcast_to(x[0], c0.shape), p)
    p = tl.fma(c1, tl.broadcast_to(x[1], c0.shape), p)
    p = tl.fma(c2, tl.broadcast_to(x[2], c0.shape), p)
    return tl.fma(c3, tl.broadcast_to(x[3], c0.shape), p)


@jit
def _add_scaled(
    y, p, x_sum, w_scale_ptrs, zero_point_ptrs, k, K, stride_sg,
    GROUP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """y + (p - zero_point * sum of x) * w_scale for chunks from channel k on, [BLOCK_N, chunks]."""
    at = tl.minimum(k, K - 1)[None, :] // GROUP * stride_sg if GROUP else tl.arange(0, 1)[None, :]
    p = _chunks(p)
    if HAS_ZERO_POINT:
        p -= _chunks(x_sum) * tl.load(zero_point_ptrs + at)
    return y + p * tl.load(w_scale_ptrs + at)


@jit
def _add_token(
    y, x_low, x_high, codes, w_scale_ptrs, zero_point_ptrs, first, K, stride_sg,
    GROUP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """What a step adds to one token's sums; first: the channels of its chunks."""
    x_sum = (x_low[0] + x_low[1]) + (x_low[2] + x_low[3])  # [1, WORDS]
    high_sum = (x_high[0] + x_high[1]) + (x_high[2] + x_high[3])
    if GROUP % 128 == 0:  # both halves lie in one group
        x_sum += high_sum
    p = tl.broadcast_to(x_sum * -24.0, codes[0].shape)
    p = _add_products(p, x_low, codes[0], codes[1], codes[2], codes[3])
    if GROUP % 128 == 0:
        p = _add_products(p, x_high, codes[4], codes[5], codes[6], codes[7])
    y = _add_scaled(
        y, p, x_sum, w_scale_ptrs, zero_point_ptrs, first, K, stride_sg, GROUP, HAS_ZERO_POINT
    )
    if GROUP % 128 != 0:
        p = tl.broadcast_to(high_sum * -24.0, codes[0].shape)
        p = _add_products(p, x_high, codes[4], codes[5], codes[6], codes[7])
        y = _add_scaled(
            y, p, high_sum, w_scale_ptrs, zero_point_ptrs, first + 64, K, stride_sg,
            GROUP, HAS_ZERO_POINT,
        )  # fmt: skip
    return y


@entry
def gemv_floats_kernel(
    x_ptr, w_ptr, w_scale_ptr, zero_point_ptr, bias_ptr, out_ptr, parts_ptr,
    N, K, words, stride_xm, stride_sn, stride_sg,
    GROUP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """W4A16; arguments in the order of `weight_only_linear`'s kernel, parts_ptr is None."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_n = tl.minimum(offs_n, N - 1)
    w_scale_ptrs = w_scale_ptr + (row_n * stride_sn)[:, None]
    zero_point_ptrs = None
    if HAS_ZERO_POINT:
        zero_point_ptrs = zero_point_ptr + (row_n * stride_sn)[:, None]
    y0 = tl.zeros([BLOCK_N, WORDS // CHUNK], tl.float32)
    y1 = y0
    for start in range(0, words, WORDS):
        offs_j = start + tl.arange(0, WORDS)
        k = _channel(offs_j)[None, :]
        # the compiler gives all of a step the layout of its last load: those of x come first
        x_low, x_high = _four(x_ptr, k, K, EVEN), _four(x_ptr, k + 64, K, EVEN)
        second_low, second_high = x_low, x_high
        if ROWS == 2:
            second_low = _four(x_ptr + stride_xm, k, K, EVEN)
            second_high = _four(x_ptr + stride_xm, k + 64, K, EVEN)
        codes = _floats(_words(w_ptr, offs_n, N, words, offs_j, EVEN))
        first = _channel(start + tl.arange(0, WORDS // CHUNK) * CHUNK)
        y0 = _add_token(
            y0, x_low, x_high, codes, w_scale_ptrs, zero_point_ptrs, first, K, stride_sg,
            GROUP, HAS_ZERO_POINT,
        )  # fmt: skip
        if ROWS == 2:
            y1 = _add_token(
                y1, second_low, second_high, codes, w_scale_ptrs, zero_point_ptrs, first, K,
                stride_sg, GROUP, HAS_ZERO_POINT,
            )  # fmt: skip
    _store_token(out_ptr, y0, bias_ptr, 0, offs_n, N, ROWS)
    if ROWS == 2:
        _store_token(out_ptr, y1, bias_ptr, 1, offs_n, N, ROWS)


@jit
def _store_token(out_ptr, y, bias_ptr, m, offs_n, N, ROWS: tl.constexpr):
    store_linear(
        out_ptr, tl.sum(y, axis=1)[None, :], bias_ptr, m + tl.arange(0, 1), offs_n, ROWS, N,
        1.0, 0, False, "", 0, 0,
    )  # fmt: skip


@jit
def _dp4a(x, w, acc):
    """acc + the four products of bytes of two words."""
    if PTX:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, w, acc], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for i in tl.static_range(4):
            acc += ((x << (24 - 8 * i)) >> 24) * ((w << (24 - 8 * i)) >> 24)
        return acc


@jit
def _load_word(x_ptr, k, K, EVEN: tl.constexpr):
    """Channels k to k + 3 of int8 as a word, 0 beyond K."""
    return _load((x_ptr + k).to(tl.pointer_type(tl.int32)), k, K, EVEN)


@jit
def _add_integers(
    y, p, x_scale_ptr, w_scale_ptrs, k, K, stride_xsg, stride_wsg,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr,
):  # fmt: skip
    """y + p * w_scale, and times x_scale if that varies with the group, for chunks from k on."""
    g = tl.minimum(k, K - 1)[None, :] // GROUP
    p = _chunks(p).to(tl.float32)
    if X_GROUPS:
        p = p * tl.load(x_scale_ptr + g * stride_xsg)
    return tl.fma(p, tl.load(w_scale_ptrs + g * stride_wsg), y)


@jit
def _integer_step(
    p, y, x_low, x_high, w_low, w_high, x_zero_point, x_scale_ptr, w_scale_ptrs, first, K,
    stride_xsg, stride_wsg,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """What a step adds to one token's integers (one group) or floats (several)."""
    low = _dp4a(x_low, w_low, p)
    if GROUP % 128 == 0:
        low = _dp4a(x_high, w_high, low)
    if HAS_ZERO_POINT:
        ones = w_low * 0 + 0x01010101
        taken = _dp4a(ones, w_low, w_low * 0)
        if GROUP % 128 == 0:
            taken = _dp4a(ones, w_high, taken)
        low -= x_zero_point * taken
    if GROUP == 0:
        return low, y
    y = _add_integers(
        y, low, x_scale_ptr, w_scale_ptrs, first, K, stride_xsg, stride_wsg, GROUP, X_GROUPS
    )
    if GROUP % 128 != 0:
        high = _dp4a(x_high, w_high, p)
        if HAS_ZERO_POINT:
            high -= x_zero_point * _dp4a(w_high * 0 + 0x01010101, w_high, w_high * 0)
        y = _add_integers(
            y, high, x_scale_ptr, w_scale_ptrs, first + 64, K, stride_xsg, stride_wsg,
            GROUP, X_GROUPS,
        )  # fmt: skip
    return p, y


@jit
def _store_integers(
    out_ptr, p, y, x_scale_ptr, w_scale_ptr, bias_ptr, m, offs_n, N, out_step, out_zero_point,
    stride_xsm, stride_wsn,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs_m = m + tl.arange(0, 1)
    if GROUP:  # undoes the 16 of `low_nibbles`
        y = tl.sum(y, axis=1)[None, :]
        if X_GROUPS or x_scale_ptr is None:
            y = y * 0.0625
        else:
            y = y * (tl.load(x_scale_ptr + m * stride_xsm) * 0.0625)
    else:
        y = scaled(
            tl.sum(p, axis=1)[None, :] >> 4, x_scale_ptr, w_scale_ptr, offs_m, offs_n, ROWS, N,
            offs_m * stride_xsm, offs_n * stride_wsn, False,
        )  # fmt: skip
    store_linear(
        out_ptr, y, bias_ptr, offs_m, offs_n, ROWS, N, out_step, out_zero_point,
        False, ACTIVATION, QMIN, QMAX,
    )  # fmt: skip


@entry
def gemv_integers_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, parts_ptr,
    N, K, words, x_zero_point, out_step, out_zero_point,
    stride_xm, stride_xsm, stride_xsg, stride_wsn, stride_wsg,
    GROUP: tl.constexpr, X_GROUPS: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """W4A8; arguments in the order of `int4_linear`'s kernel, parts_ptr is None."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_scale_ptrs = w_scale_ptr + (tl.minimum(offs_n, N - 1) * stride_wsn)[:, None]
    p0 = tl.zeros([BLOCK_N, WORDS], tl.int32)
    y0 = tl.zeros([BLOCK_N, WORDS // CHUNK], tl.float32)
    p1, y1 = p0, y0
    for start in range(0, words, WORDS):
        offs_j = start + tl.arange(0, WORDS)
        k = _channel(offs_j)[None, :]
        # the compiler gives all of a step the layout of its last load: those of x come first
        x_low, x_high = _load_word(x_ptr, k, K, EVEN), _load_word(x_ptr, k + 64, K, EVEN)
        second_low, second_high = x_low, x_high
        if ROWS == 2:
            second_low = _load_word(x_ptr + stride_xm, k, K, EVEN)
            second_high = _load_word(x_ptr + stride_xm, k + 64, K, EVEN)
        w = _words(w_ptr, offs_n, N, words, offs_j, EVEN)
        w_low, w_high = (w << 4) & -252645136, w & -252645136  # 0xF0F0F0F0
        first = _channel(start + tl.arange(0, WORDS // CHUNK) * CHUNK)
        p0, y0 = _integer_step(
            p0, y0, x_low, x_high, w_low, w_high, x_zero_point, x_scale_ptr, w_scale_ptrs, first,
            K, stride_xsg, stride_wsg, GROUP, X_GROUPS, HAS_ZERO_POINT,
        )  # fmt: skip
        if ROWS == 2:
            second_scale = None if x_scale_ptr is None else x_scale_ptr + stride_xsm
            p1, y1 = _integer_step(
                p1, y1, second_low, second_high, w_low, w_high, x_zero_point, second_scale,
                w_scale_ptrs, first, K, stride_xsg, stride_wsg,
                GROUP, X_GROUPS, HAS_ZERO_POINT,
            )  # fmt: skip
    _store_integers(
        out_ptr, p0, y0, x_scale_ptr, w_scale_ptr, bias_ptr, 0, offs_n, N, out_step,
        out_zero_point, stride_xsm, stride_wsn,
        GROUP, X_GROUPS, ACTIVATION, QMIN, QMAX, ROWS,
    )  # fmt: skip
    if ROWS == 2:
        _store_integers(
            out_ptr, p1, y1, x_scale_ptr, w_scale_ptr, bias_ptr, 1, offs_n, N, out_step,
            out_zero_point, stride_xsm, stride_wsn,
            GROUP, X_GROUPS, ACTIVATION, QMIN, QMAX, ROWS,
        )  # fmt: skip
