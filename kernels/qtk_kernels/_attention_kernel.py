"""The Triton kernel of `quantized_attention`, whose file defines what it computes.

A program holds some queries of one head. Where all keys fit one tile their scores are computed
once; "float" and the anchored codes ("grid") otherwise rescale what they summed so far, exactly, by
powers of two; the other kinds compute scores twice, first for what they must know of the row.

SEQUENCES: tokens of several sentences lie one after another, `sequences` [B, 3] says of each where
it begins, and between which places of a padded one it lies. Tiles are those of padded sentences,
less those without a token, and so are the bits.
"""

from ._lang import entry, jit, round_codes, tl
from ._softmax import anchor_tile, code_tile, fma_tile


@jit
def _dot(a, a_high, b, b_high, PACKED: tl.constexpr):
    """a @ b in float32, within 2**-21 on tensor cores, or exactly for bytes; and the high nibbles'.

    To start from the bits of 1.5 * 2**23 would save the conversion, and cost the setting of every
    sum to that, which zero has free: one instruction a score more.
    """
    if a.dtype == tl.int8:
        p = tl.dot(a, b, out_dtype=tl.int32)
        if PACKED:
            p = tl.dot(a_high, b_high, p, out_dtype=tl.int32)
        return p.to(tl.float32)
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@jit
def _there(places, first, end, SEQUENCES: tl.constexpr):
    """Which places are a token's."""
    if SEQUENCES:
        return (places >= first) & (places < end)
    else:
        return places < end


@jit
def _scores(
    q_low, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, offs_n, first, Tq, Tk, D,
    stride_kt, stride_kst, k_group, stride_mq, stride_mk,
    CAUSAL: tl.constexpr, TAIL: tl.constexpr, KEY_MASK: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """u, [BLOCK_M, BLOCK_N]; KEY_MASK: one row of the mask serves all queries."""
    offs_d = tl.arange(0, BLOCK_D)
    there = _there(offs_n, first, Tk, SEQUENCES)
    inside = there[:, None] & (offs_d < D)[None, :]
    at = offs_n.to(tl.int64)[:, None] * stride_kt + offs_d[None, :]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    k_high = k
    if PACKED:
        k = k.to(tl.int8, bitcast=True)
        k_high = k >> 4
        k = (k << 4) >> 4
    u = _dot(q_low, q_high, tl.trans(k), tl.trans(k_high), PACKED)
    if k_scale_ptr is not None:
        k_scale = tl.load(k_scale_ptr + offs_n // k_group * stride_kst, mask=there, other=0.0)
        u = u * k_scale[None, :]
    if TAIL:
        allowed = there[None, :]
        if CAUSAL:
            allowed = allowed & (offs_n[None, :] <= offs_m[:, None] + (Tk - Tq))
        if KEY_MASK:
            seen = tl.load(mask_ptr + offs_n * stride_mk, mask=offs_n < Tk, other=0)
            allowed = allowed & (seen != 0)[None, :]
        elif mask_ptr is not None:
            bounds = (offs_m < Tq)[:, None] & (offs_n < Tk)[None, :]
            m_at = offs_m.to(tl.int64)[:, None] * stride_mq + offs_n[None, :] * stride_mk
            allowed = allowed & (tl.load(mask_ptr + m_at, mask=bounds, other=0) != 0)
        u = tl.where(allowed, u, -1e30)
    return u


@jit
def _values(
    u, a, top, total, step,
    KIND: tl.constexpr, STEPS: tl.constexpr, TOP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """P in float32, but the bytes of "code", for which `top` is K."""
    if KIND == "code":
        return code_tile(fma_tile(u, a[:, None], top[:, None], EXACT), STEPS, EXACT)
    else:
        t = u * a[:, None] - top[:, None]
        if KIND == "log2":
            k = (STEPS * (tl.log2(total)[:, None] - t) + 12582912.0) - 12582912.0
            return tl.where(k < TOP, tl.exp2(-k / STEPS), 0.0)
        elif KIND == "uniform":
            inverse = tl.div_rn(total * 0.0 + 1.0, total * step)
            return round_codes(tl.exp2(t) * inverse[:, None], 0.0, TOP * 1.0).to(tl.float32)
        else:
            return tl.exp2(t)


@jit
def _product(p, v, KIND: tl.constexpr, TOP: tl.constexpr, V_FP8: tl.constexpr):
    """sum_j P v of one tile, [BLOCK_M, BLOCK_D]; e5m2 carries 2**15 times the values of "log2"."""
    if V_FP8:
        if KIND == "log2":  # 2**-k to (30 - k) << 2: float32's exponent field is 127 - k
            k = tl.maximum((p.to(tl.int32, bitcast=True) >> 23) - 97, 0)
            p = (k << 2).to(tl.int8).to(tl.float8e5, bitcast=True)
        return tl.dot(p, v.to(tl.float8e4nv, bitcast=True))
    elif v.dtype == tl.int8:
        if KIND == "uniform":  # codes of 8 bits as signed bytes
            OFFSET: tl.constexpr = 128 if TOP == 255 else 0
            product = tl.dot((p - OFFSET).to(tl.int8), v, out_dtype=tl.int32)
            if OFFSET:
                product += OFFSET * tl.sum(v.to(tl.int32), axis=0)[None, :]
            return product
        else:
            return tl.dot(p.to(tl.float16), v.to(tl.float16))
    else:
        return tl.dot(p.to(v.dtype), v, input_precision="tf32x3")


@jit
def _total(p, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """sum_j P, [BLOCK_M]; 32 bytes and more are added by the tensor core."""
    if KIND == "code" and BLOCK_N >= 32:
        ones = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(tl.float8e5)
        return tl.sum(tl.dot(p, ones), axis=1) * 0.0625
    else:
        return tl.sum(p.to(tl.float32), axis=1)


@jit
def _load_v(
    v_ptr, offs_n, first, Tk, D, stride_vt, stride_vd, BLOCK_D: tl.constexpr,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    inside = _there(offs_n, first, Tk, SEQUENCES)[:, None] & (offs_d < D)[None, :]
    at = offs_n.to(tl.int64)[:, None] * stride_vt + offs_d[None, :] * stride_vd
    return tl.load(v_ptr + at, mask=inside, other=0)


@jit
def _power_of_two(n):
    """2**n of integers in float32, 0 below -126."""
    return ((tl.maximum(n, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@entry
def quantized_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, step_ptr,
    sequences_ptr, out_ptr,
    H, Tq, Tk, D, width,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_qsb, stride_qsh, stride_qst, stride_ksb, stride_ksh, stride_kst,
    stride_vsb, stride_vsh, stride_vsd, q_group, k_group, multiplier,
    KIND: tl.constexpr, STEPS: tl.constexpr, TOP: tl.constexpr, OFFSET: tl.constexpr,
    RENORMALIZE: tl.constexpr, ONE_TILE: tl.constexpr, GRID: tl.constexpr,
    CAUSAL: tl.constexpr, TAIL: tl.constexpr, KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr, V_FP8: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Tq, BLOCK_M)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_w = tl.arange(0, BLOCK_W)
    SEQUENCES: tl.constexpr = sequences_ptr is not None
    first, row = 0, b * Tq  # the first place that is a token, and the output's row of place 0
    if SEQUENCES:
        first, end = tl.load(sequences_ptr + 3 * b + 1), tl.load(sequences_ptr + 3 * b + 2)
        row = tl.load(sequences_ptr + 3 * b).to(tl.int64) - first
        Tq, Tk, b = end, end, b * 0
        if tile * BLOCK_M >= end:
            return
        if (tile + 1) * BLOCK_M <= first:
            return
        q_ptr += row * stride_qt
        k_ptr += row * stride_kt
        v_ptr += row * stride_vt
        if q_scale_ptr is not None:
            q_scale_ptr += row * stride_qst
        if k_scale_ptr is not None:
            k_scale_ptr += row * stride_kst
    here = _there(offs_m, first, Tq, SEQUENCES)
    at = offs_m.to(tl.int64)[:, None] * stride_qt + offs_w[None, :]
    inside = here[:, None] & (offs_w < width)[None, :]
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + at, mask=inside, other=0)
    q_high = q
    if PACKED:
        q = q.to(tl.int8, bitcast=True)
        q_high = q >> 4
        q = (q << 4) >> 4
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    if k_scale_ptr is not None:
        k_scale_ptr += b * stride_ksb + h * stride_ksh
    a = tl.zeros([BLOCK_M], tl.float32) + multiplier
    if q_scale_ptr is not None:
        qs_at = b * stride_qsb + h * stride_qsh + offs_m // q_group * stride_qst
        a = tl.load(q_scale_ptr + qs_at, mask=here, other=0.0) * a
    step = 1.0 / TOP
    if step_ptr is not None:
        step = tl.load(step_ptr + h)

    end = Tk
    if CAUSAL:
        end = tl.minimum(Tk, (tile + 1) * BLOCK_M + Tk - Tq)
    offs_n = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], -1e15, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros(
        [BLOCK_M, BLOCK_D],
        tl.int32
        if KIND == "uniform" and v_ptr.dtype.element_ty == tl.int8 and not V_FP8
        else tl.float32,
    )
    u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ONE_TILE:
        u = _scores(
            q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, offs_n, first, Tq, Tk, width,
            stride_kt, stride_kst, k_group, stride_mq, stride_mk,
            CAUSAL, TAIL, KEY_MASK, PACKED, BLOCK_W, SEQUENCES,
        )  # fmt: skip
        top = tl.maximum(tl.max(u, axis=1) * a, top)
        if KIND == "code":
            top = anchor_tile(top, STEPS, OFFSET)
        else:
            total = tl.sum(tl.exp2(u * a[:, None] - top[:, None]), axis=1)
            total = tl.where(total > 0, total, 1.0)
        p = _values(u, a, top, total, step, KIND, STEPS, TOP, EXACT)
        v = _load_v(v_ptr, offs_n, first, Tk, D, stride_vt, stride_vd, BLOCK_D, SEQUENCES)
        acc = _product(p, v, KIND, TOP, V_FP8)
        if KIND == "code" or RENORMALIZE:
            total = _total(p, KIND, BLOCK_N)
    elif KIND == "float" or GRID:  # one pass, earlier tiles rescaled
        for start in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
            u = _scores(
                q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, start + offs_n, first, Tq, Tk,
                width, stride_kt, stride_kst, k_group, stride_mq, stride_mk,
                CAUSAL, TAIL, KEY_MASK, PACKED, BLOCK_W, SEQUENCES,
            )  # fmt: skip
            new = tl.max(u, axis=1) * a
            if KIND == "code":
                new = tl.maximum(top, tl.ceil(new * (1.0 / STEPS)) * STEPS)
                alpha = _power_of_two((top - new) * (1.0 / STEPS))
                p = _values(
                    u, a, anchor_tile(new, STEPS, OFFSET), total, step, KIND, STEPS, TOP, EXACT
                )
            else:
                new = tl.maximum(top, new)
                alpha = tl.exp2(top - new)
                p = _values(u, a, new, total, step, KIND, STEPS, TOP, EXACT)
            v = _load_v(
                v_ptr, start + offs_n, first, Tk, D, stride_vt, stride_vd, BLOCK_D, SEQUENCES
            )
            # alpha is a power of two for codes: fused or not, the bits are the same
            product = _product(p, v, KIND, TOP, V_FP8)
            acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], acc.shape), product)
            total = tl.fma(total, alpha, _total(p, KIND, BLOCK_N))
            top = new
    else:  # one pass for the maximum and the float normaliser, one for the codes
        for start in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
            u = _scores(
                q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, start + offs_n, first, Tq, Tk,
                width, stride_kt, stride_kst, k_group, stride_mq, stride_mk,
                CAUSAL, TAIL, KEY_MASK, PACKED, BLOCK_W, SEQUENCES,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(u, axis=1) * a)
            if KIND != "code":
                total = total * tl.exp2(top - new)
                total += tl.sum(tl.exp2(u * a[:, None] - new[:, None]), axis=1)
            top = new
        if KIND == "code":
            top = anchor_tile(top, STEPS, OFFSET)
        total = tl.where(total > 0, total, 1.0)
        summed = tl.zeros([BLOCK_M], tl.float32)
        for start in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
            u = _scores(
                q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, start + offs_n, first, Tq, Tk,
                width, stride_kt, stride_kst, k_group, stride_mq, stride_mk,
                CAUSAL, TAIL, KEY_MASK, PACKED, BLOCK_W, SEQUENCES,
            )  # fmt: skip
            p = _values(u, a, top, total, step, KIND, STEPS, TOP, EXACT)
            v = _load_v(
                v_ptr, start + offs_n, first, Tk, D, stride_vt, stride_vd, BLOCK_D, SEQUENCES
            )
            acc += _product(p, v, KIND, TOP, V_FP8)
            if KIND == "code" or RENORMALIZE:
                summed += _total(p, KIND, BLOCK_N)
        if KIND == "code" or RENORMALIZE:
            total = summed

    if KIND == "uniform" and not RENORMALIZE:
        total = tl.zeros([BLOCK_M], tl.float32) + tl.div_rn(1.0, step)
    if KIND == "log2":
        if not RENORMALIZE:
            total = tl.full([BLOCK_M], 1.0, tl.float32)
        if V_FP8:
            total = total * 32768.0
    total = tl.where(total > 0, total, 1.0)
    y = acc.to(tl.float32) * tl.div_rn(total * 0.0 + 1.0, total)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    if v_scale_ptr is not None:
        vs_at = b * stride_vsb + h * stride_vsh + offs_d * stride_vsd
        y = y * tl.load(v_scale_ptr + vs_at, mask=offs_d < D, other=0.0)[None, :]
    at = ((row + offs_m).to(tl.int64) * H + h)[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + at, y, mask=here[:, None] & (offs_d < D)[None, :])
