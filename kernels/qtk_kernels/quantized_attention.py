"""Attention whose two matrix products and softmax are quantized, in one kernel.

    score_ij = sum_d q_id k_jd                            int32 for codes, else float32
    u_ij     = score_ij * k_scale_j                       where k_scale is given
    t_ij     = u_ij * a_i,   a_i = q_scale_i * (scale * log2(e))
    P_ij, L_i = values and their divisor                  see `_softmax.py`; 0 where hidden
    out_id   = v_scale_d * (sum_j P_ij v_jd) * (1 / L_i)  0 for a row that sees nothing
    codes    = clamp(round(out * multiplier + offset))    where an epilogue is asked for

operands of the first product: floats, int8 codes, or packed int4 codes (`pack_heads`); q_scale and
k_scale are per token, per group of tokens, or per head.

operands of the second: P times v, by v's dtype
    float          P rounded to that dtype
    int8           "uniform", "matthew": P's codes as int8, sums in int32; others: P rounded to
                   float16, which "code" and "log2" with one step need not be, and v in it exactly
    float8_e4m3fn  "code", "log2" with one step and up to 4 bits: P as e5m2 bytes

"code": up to WHOLE keys M is the row's exact maximum (one tile holds the row, or its scores are
computed twice), beyond its ceiling, so that one pass over k and v suffices and tiles of any size, in any order, give the same codes; only
float32 additions depend on the order, and those of 2**n (1 + f / 4) that span less than 24 bits do
not. m t + K is one rounding of u_ij * (m a_i) + K. A code that a later maximum pushes below 2**-15
keeps its share, less than 2**-30 of the row's largest.

B batch, H heads, T tokens, D head size. Source of the idea: FQ-ViT, arXiv 2111.13824, for codes
in the logarithm; that their bytes are fp8 operands, and need no exponential, is this project's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import INTERPRETED, backend_of, on_device
from ._lang import jit, round_codes, tl
from ._launch import cdiv, next_power_of_2
from ._softmax import (
    LOG2_E,
    MASKED,
    OFFSET,
    Softmax,
    anchor_tile,
    anchored,
    bytes_of,
    code_tile,
    fma,
    fma_tile,
    probabilities_ref,
)

WHOLE = 512  # keys of a row that is anchored at its exact maximum
ONE_TILE = 256  # keys of a row that a program holds: 128 scores a thread


@dataclass(frozen=True)
class Epilogue:
    """How the output becomes the codes that the next linear reads.

    Attributes:
        multiplier, offset: [H * D], float32.
        bits: 2 to 8; signed codes on a static grid.
    """

    multiplier: Tensor
    offset: Tensor
    bits: int = 8


def pack_heads(q: Tensor) -> Tensor:
    """Two 4-bit codes a byte: [..., D] int8 in [-8, 7] to [..., ceil(D / 2)] uint8.

    The first half of the channels lies in the low nibbles, the second in the high ones.
    """
    low, high = F.pad(q, (0, q.shape[-1] % 2)).view(torch.uint8).chunk(2, -1)
    return low & 15 | high << 4


def unpack_heads(packed: Tensor, D: int) -> Tensor:
    """Inverts `pack_heads`."""
    signed = packed.view(torch.int8)
    return torch.cat([(signed << 4) >> 4, signed >> 4], -1)[..., :D]


def operand_dtype(v: Tensor, softmax: Softmax) -> torch.dtype:
    """The dtype that P is multiplied with v in, but for float8."""
    if v.dtype == torch.int8:
        return torch.int32 if softmax.uniform else torch.float16
    return v.dtype


def scores_ref(
    q: Tensor, k: Tensor, D: int, k_scale: Tensor | None, allowed: Tensor | None
) -> Tensor:
    """u, [B, H, Tq, Tk] float32, MASKED where hidden. Codes are exact: D * 127**2 < 2**24."""
    if q.dtype == torch.uint8:
        q, k = unpack_heads(q, D), unpack_heads(k, D)
    u = q.float() @ k.float().transpose(-1, -2)
    if k_scale is not None:
        u = u * k_scale[..., None, :]
    return u if allowed is None else u.masked_fill(~allowed, MASKED)


def weights_ref(
    q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, a: Tensor, k_scale: Tensor | None,
    allowed: Tensor | None, step: Tensor | None, grid: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """P [B, H, Tq, Tk] and L [B, H, Tq, 1], float32; arguments as `quantized_attention_ref`."""
    u = scores_ref(q, k, v.shape[-1], k_scale, allowed)
    if softmax.kind == "code":
        top = u.amax(-1, keepdim=True) * a[..., None]
        x = fma(u, a[..., None].double(), anchored(top, softmax.steps, grid))
        P = bytes_of(x, softmax.steps).view(torch.float8_e5m2).float()
        return P, P.sum(-1, keepdim=True)
    step = None if step is None else step[:, None, None]
    P, L = probabilities_ref(u * a[..., None], softmax, step)
    return (P if v.dtype == torch.float8_e4m3fn else P.to(operand_dtype(v, softmax)).float()), L


def quantized_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, a: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, allowed: Tensor | None, step: Tensor | None, grid: bool,
) -> Tensor:  # fmt: skip
    """The definition, float32 [B, Tq, H * D]; sums of codes in float32, or float64 when long.

    Args:
        a: [B, H, Tq], softmax.units times the a_i above.
        k_scale: [B, H, Tk]; v_scale: broadcast against [B, H, D].
        allowed: broadcast against [B, H, Tq, Tk], False where hidden.
        step: [H], of "matthew".
        grid: anchor "code" at the ceiling of the maximum.
    """
    P, L = weights_ref(q, k, v, softmax, a, k_scale, allowed, step, grid)
    wide = torch.float64 if P.shape[-1] > WHOLE and not v.is_floating_point() else torch.float32
    y = (P.to(wide) @ v.to(wide)).float() * (1 / torch.where(L > 0, L, 1.0))
    if v_scale is not None:
        y = y * v_scale[..., None, :]
    return y.transpose(1, 2).flatten(2)


@jit
def _dot(a, b):
    """a @ b in float32, or int32 for bytes."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, out_dtype=tl.int32)
    else:
        return tl.dot(a, b, input_precision="ieee")


@jit
def _scores(
    q_low, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, offs_n, Tq, Tk, D,
    stride_kt, stride_kst, k_group, stride_mq, stride_mk,
    CAUSAL: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u, [BLOCK_M, BLOCK_N]."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_n < Tk)[:, None] & (offs_d < D)[None, :]
    at = offs_n.to(tl.int64)[:, None] * stride_kt + offs_d[None, :]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    if PACKED:
        k = k.to(tl.int8, bitcast=True)
        u = _dot(q_low, tl.trans((k << 4) >> 4)) + _dot(q_high, tl.trans(k >> 4))
    else:
        u = _dot(q_low, tl.trans(k))
    u = u.to(tl.float32)
    if k_scale_ptr is not None:
        k_scale = tl.load(k_scale_ptr + offs_n // k_group * stride_kst, mask=offs_n < Tk, other=0.0)
        u = u * k_scale[None, :]
    if TAIL:
        allowed = (offs_n < Tk)[None, :]
        if CAUSAL:
            allowed = allowed & (offs_n[None, :] <= offs_m[:, None] + (Tk - Tq))
        if mask_ptr is not None:
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
            LIFT: tl.constexpr = 128 if TOP == 255 else 0
            lifted = tl.dot((p - LIFT).to(tl.int8), v, out_dtype=tl.int32)
            if LIFT:
                lifted += LIFT * tl.sum(v.to(tl.int32), axis=0)[None, :]
            return lifted
        else:
            return tl.dot(p.to(tl.float16), v.to(tl.float16))
    else:
        return tl.dot(p.to(v.dtype), v, input_precision="ieee")


@jit
def _total(p, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """sum_j P, [BLOCK_M]; bytes are added by the tensor core."""
    if KIND == "code":
        ones = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(tl.float8e5)
        return tl.sum(tl.dot(p, ones), axis=1) * 0.0625
    else:
        return tl.sum(p, axis=1)


@jit
def _load_v(v_ptr, offs_n, Tk, D, stride_vt, stride_vd, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_n < Tk)[:, None] & (offs_d < D)[None, :]
    at = offs_n.to(tl.int64)[:, None] * stride_vt + offs_d[None, :] * stride_vd
    return tl.load(v_ptr + at, mask=inside, other=0)


@jit
def _power_of_two(n):
    """2**n of integers in float32, 0 below -126."""
    return ((tl.maximum(n, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@jit
def _store(
    y, out_ptr, multiplier_ptr, offset_ptr, b, h, offs_m, H, Tq, D,
    QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes [BLOCK_M, BLOCK_D] to out [B, Tq, H * D], as floats or as codes."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_m < Tq)[:, None] & (offs_d < D)[None, :]
    at = ((b * Tq + offs_m).to(tl.int64) * H + h)[:, None] * D + offs_d[None, :]
    if QMAX > QMIN:
        multiplier = tl.load(multiplier_ptr + h * D + offs_d, mask=offs_d < D, other=0.0)
        offset = tl.load(offset_ptr + h * D + offs_d, mask=offs_d < D, other=0.0)
        codes = round_codes(y * multiplier[None, :] + offset[None, :], QMIN * 1.0, QMAX * 1.0)
        tl.store(out_ptr + at, codes.to(tl.int8), mask=inside)
    else:
        tl.store(out_ptr + at, y, mask=inside)


@jit
def _quantized_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, step_ptr,
    multiplier_ptr, offset_ptr, out_ptr,
    H, Tq, Tk, D, width,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_mb, stride_mh, stride_mq, stride_mk,
    stride_qsb, stride_qsh, stride_qst, stride_ksb, stride_ksh, stride_kst,
    stride_vsb, stride_vsh, stride_vsd, q_group, k_group, multiplier,
    KIND: tl.constexpr, STEPS: tl.constexpr, TOP: tl.constexpr, OFFSET: tl.constexpr,
    RENORMALIZE: tl.constexpr, ONE_TILE: tl.constexpr, GRID: tl.constexpr, CAUSAL: tl.constexpr, TAIL: tl.constexpr,
    PACKED: tl.constexpr, V_FP8: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Tq, BLOCK_M)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_w = tl.arange(0, BLOCK_W)
    at = offs_m.to(tl.int64)[:, None] * stride_qt + offs_w[None, :]
    inside = (offs_m < Tq)[:, None] & (offs_w < width)[None, :]
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
        a = tl.load(q_scale_ptr + qs_at, mask=offs_m < Tq, other=0.0) * a
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
            q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, offs_n, Tq, Tk, width,
            stride_kt, stride_kst, k_group, stride_mq, stride_mk, CAUSAL, TAIL, PACKED, BLOCK_W,
        )  # fmt: skip
        top = tl.maximum(tl.max(u, axis=1) * a, top)
        if KIND == "code":
            top = anchor_tile(top, STEPS, OFFSET)
        else:
            total = tl.sum(tl.exp2(u * a[:, None] - top[:, None]), axis=1)
            total = tl.where(total > 0, total, 1.0)
        p = _values(u, a, top, total, step, KIND, STEPS, TOP, EXACT)
        v = _load_v(v_ptr, offs_n, Tk, D, stride_vt, stride_vd, BLOCK_D)
        acc = _product(p, v, KIND, TOP, V_FP8)
        if KIND == "code" or RENORMALIZE:
            total = _total(p, KIND, BLOCK_N)
    elif KIND == "float" or GRID:  # one pass, earlier tiles rescaled
        for start in range(0, end, BLOCK_N):
            u = _scores(
                q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, start + offs_n, Tq, Tk, width,
                stride_kt, stride_kst, k_group, stride_mq, stride_mk,
                CAUSAL, TAIL, PACKED, BLOCK_W,
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
            v = _load_v(v_ptr, start + offs_n, Tk, D, stride_vt, stride_vd, BLOCK_D)
            acc = acc * alpha[:, None] + _product(p, v, KIND, TOP, V_FP8)
            total = total * alpha + _total(p, KIND, BLOCK_N)
            top = new
    else:  # one pass for the maximum and the float normaliser, one for the codes
        for start in range(0, end, BLOCK_N):
            u = _scores(
                q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, start + offs_n, Tq, Tk, width,
                stride_kt, stride_kst, k_group, stride_mq, stride_mk,
                CAUSAL, TAIL, PACKED, BLOCK_W,
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
        for start in range(0, end, BLOCK_N):
            u = _scores(
                q, q_high, k_ptr, k_scale_ptr, mask_ptr, offs_m, start + offs_n, Tq, Tk, width,
                stride_kt, stride_kst, k_group, stride_mq, stride_mk,
                CAUSAL, TAIL, PACKED, BLOCK_W,
            )  # fmt: skip
            p = _values(u, a, top, total, step, KIND, STEPS, TOP, EXACT)
            v = _load_v(v_ptr, start + offs_n, Tk, D, stride_vt, stride_vd, BLOCK_D)
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
    if v_scale_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        vs_at = b * stride_vsb + h * stride_vsh + offs_d * stride_vsd
        y = y * tl.load(v_scale_ptr + vs_at, mask=offs_d < D, other=0.0)[None, :]
    _store(
        y, out_ptr, multiplier_ptr, offset_ptr, b, h, offs_m, H, Tq, D, QMIN, QMAX, BLOCK_D
    )  # fmt: skip


def attention_tile(Tq: int, Tk: int, one_pass: bool, fp8: bool) -> dict[str, int]:
    """Rows, keys and warps of a program: a rule, not tuned on a GPU.

    Args:
        one_pass: nothing about a whole row has to be known before its codes are.
        fp8: the second product's operands are float8, which are native from 64 rows on.
    """
    rows, warps = 128, 8  # four warps for each 64 rows, or scores would be held twice
    if Tk <= ONE_TILE:
        BLOCK_N = max(next_power_of_2(Tk), 32)
    else:
        BLOCK_N = 128 if fp8 and one_pass else 64
    if Tq <= 64 or Tk <= ONE_TILE // 2:
        rows, warps = 64, 4
    if Tq <= 16 and not fp8:
        rows = 16
    return {"BLOCK_M": rows, "BLOCK_N": BLOCK_N, "num_warps": warps, "num_stages": 2}


def _launch(
    q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, multiplier: float,
    q_scale: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, allowed: Tensor | None,
    step: Tensor | None, causal: bool, grid: bool, epilogue: Epilogue | None,
    out_dtype: torch.dtype, block_n: int | None,
) -> Tensor:  # fmt: skip
    (B, H, Tq, width), Tk, D = q.shape, k.shape[2], v.shape[3]
    fp8 = v.dtype == torch.float8_e4m3fn
    tile = attention_tile(Tq, Tk, grid or softmax.kind == "float", fp8)
    tile["BLOCK_N"] = block_n or tile["BLOCK_N"]
    one_tile = not grid and Tk <= tile["BLOCK_N"]
    out = torch.empty(B, Tq, H * D, dtype=torch.int8 if epilogue else out_dtype, device=q.device)
    mask = None if allowed is None else allowed.expand(B, H, Tq, Tk).view(torch.uint8)
    scale_strides = [_strides(s, (B, H)) for s in (q_scale, k_scale, v_scale)]
    top = 2 ** (epilogue.bits - 1) if epilogue else 0
    with on_device(q):
        _quantized_attention_kernel[(cdiv(Tq, tile["BLOCK_M"]) * B * H,)](
            q, k, v.view(torch.int8) if fp8 else v, mask, q_scale, k_scale, v_scale, step,
            epilogue.multiplier if epilogue else None, epilogue.offset if epilogue else None, out,
            H, Tq, Tk, D, width,
            *q.stride()[:3], *k.stride()[:3], *v.stride(),
            *((0,) * 4 if mask is None else mask.stride()),
            *scale_strides[0], *scale_strides[1], *scale_strides[2],
            _group(q_scale, Tq), _group(k_scale, Tk), multiplier,
            KIND="uniform" if softmax.uniform else softmax.kind, STEPS=softmax.steps,
            TOP=softmax.top, OFFSET=OFFSET.get(softmax.steps, 0.0),
            RENORMALIZE=softmax.renormalize, ONE_TILE=one_tile, GRID=grid, CAUSAL=causal,
            TAIL=causal or mask is not None or Tk % tile["BLOCK_N"] > 0,
            PACKED=q.dtype == torch.uint8, V_FP8=fp8, QMIN=-top, QMAX=max(top - 1, 0),
            EXACT=INTERPRETED, BLOCK_W=max(next_power_of_2(width), 32),
            BLOCK_D=max(next_power_of_2(D), 16), **tile,
            enable_fp_fusion=False,  # the definition says where a product and a sum are one
        )  # fmt: skip
    return out


def _strides(scale: Tensor | None, leading: tuple[int, int]) -> tuple[int, int, int]:
    """Steps from batch to batch, head to head and along the last axis; 0 where one serves all."""
    if scale is None:
        return 0, 0, 0
    wide = scale.expand(*leading, scale.shape[-1]) if scale.shape[-1] > 1 else scale
    strides = scale.expand(*leading, wide.shape[-1]).stride()
    return strides[0], strides[1], strides[2] if scale.shape[-1] > 1 else 0


def _group(scale: Tensor | None, T: int) -> int:
    """Tokens that share a scale."""
    return 1 if scale is None else max(cdiv(T, scale.shape[-1]), 1)


def _per_token(scale: Tensor, T: int, B: int, H: int) -> Tensor:
    """[B, H, G] to [B, H, T]."""
    if scale.shape[-1] == T:
        return scale.expand(B, H, T)
    index = torch.arange(T, device=scale.device) // _group(scale, T)
    return scale.expand(B, H, -1)[..., index]


def _check(
    q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, q_scale: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, step: Tensor | None,
) -> None:  # fmt: skip
    B, H, Tq, width = q.shape
    Tk, D = v.shape[2:]
    packed = q.dtype == torch.uint8
    if packed != (k.dtype == torch.uint8) or (q.dtype == torch.int8) != (k.dtype == torch.int8):
        raise ValueError(f"q and k must be of one kind, got {q.dtype} and {k.dtype}")
    if (
        k.shape != (B, H, Tk, width)
        or v.shape[:2] != (B, H)
        or width != (-(-D // 2) if packed else D)
    ):
        raise ValueError(
            f"q [B, H, Tq, D], k and v [B, H, Tk, D] (q and k ceil(D / 2) wide if packed) do not "
            f"fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if D > 256:
        raise ValueError(f"heads are at most 256 wide, got {D}")
    for name, x, scale, T in (("q_scale", q, q_scale, Tq), ("k_scale", k, k_scale, Tk)):
        if not x.is_floating_point() and scale is None:
            raise ValueError(f"codes need a scale: give {name} [B, H, G]")
        if scale is not None and (scale.dim() != 3 or cdiv(T, _group(scale, T)) != scale.shape[2]):
            raise ValueError(
                f"{name} must be [B, H, G], G groups of {T} tokens, got {list(scale.shape)}"
            )
    if v_scale is not None and (v_scale.dim() != 3 or v_scale.shape[-1] not in (1, D)):
        raise ValueError(f"v_scale must be [B, H, {D}] or [B, H, 1], got {list(v_scale.shape)}")
    if (softmax.kind == "matthew") != (step is not None):
        raise ValueError("step [H] goes with softmax='matthew', and only with it")
    if step is not None and step.shape != (H,):
        raise ValueError(f"step must be [{H}], got {list(step.shape)}")
    if v.dtype == torch.float8_e4m3fn and not (
        softmax.kind == "code"
        or (softmax.kind == "log2" and softmax.steps == 1 and softmax.bits <= 4)
    ):
        raise ValueError(
            "v in float8_e4m3fn goes with softmax 'code', or 'log2' of one step and up to 4 bits"
        )


def quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax: str = "float", bits: int = 8, steps: int = 1,
    renormalize: bool = False, step: Tensor | None = None, q_scale: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, scale: float | None = None,
    mask: Tensor | None = None, causal: bool = False, grid: bool | None = None,
    epilogue: Epilogue | None = None, out_dtype: torch.dtype = torch.float32,
    block_n: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T * scale) v, with each of the three quantized as asked.

    Args:
        q, k: [B, H, T, D], floats, int8 codes, or `pack_heads` of 4-bit codes.
        v: [B, H, Tk, D], floats, int8 codes, or float8_e4m3fn; any strides: stored transposed it
            feeds byte-wide tensor cores without a shuffle.
        softmax: "float", "uniform", "matthew", "log2" or "code"; see `_softmax.py`.
        bits: 2 to 8, of "uniform", "matthew" and "log2".
        steps: an octave, 1, 2 or 4 of "code", 1 or 2 of "log2".
        renormalize: divide by the sum of the quantized probabilities, not by the exact one.
        step: [H], the steps of "matthew".
        q_scale, k_scale: [B, H, G] float32 (B and H may be 1), one scale for each of G equal groups
            of tokens: T, 1, or between.
        v_scale: [B, H, D] or [B, H, 1], as those.
        scale: of the logits, D ** -0.5 if not given.
        mask: bool, broadcast against [B, H, Tq, Tk], True where a key may be seen.
        causal: hide keys behind the query, the last query seeing the last key.
        grid: anchor "code" at the maximum's ceiling; None: only beyond WHOLE keys.
        epilogue: shift, scale and quantize the output.
        out_dtype: of floats out.
        block_n: keys of a tile, for tests.

    Returns:
        [B, Tq, H * D] in out_dtype, or int8.

    Raises:
        ValueError: shapes, scales or kinds that do not fit.
    """
    kind = Softmax(softmax, bits, steps, renormalize)
    _check(q, k, v, kind, q_scale, k_scale, v_scale, step)
    Tk, D = v.shape[2:]
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a key may be seen, got {mask.dtype}")
    grid = softmax == "code" and (Tk > WHOLE if grid is None else grid)
    multiplier = (D**-0.5 if scale is None else scale) * LOG2_E * kind.units
    if backend_of(q, backend) == "triton" and q.numel() and Tk:
        return _launch(
            q, k, v, kind, multiplier, q_scale, k_scale, v_scale, mask, step, causal, grid,
            epilogue, out_dtype, block_n,
        )  # fmt: skip
    a, k_scale, mask = _expanded(q, k, multiplier, q_scale, k_scale, mask, causal)
    y = quantized_attention_ref(q, k, v, kind, a, k_scale, v_scale, mask, step, grid)
    if epilogue is None:
        return y.to(out_dtype)
    top = 2 ** (epilogue.bits - 1)
    return (y * epilogue.multiplier + epilogue.offset).round().clamp(-top, top - 1).to(torch.int8)


def attention_weights(
    q: Tensor, k: Tensor, v: Tensor, *, softmax: str = "float", bits: int = 8, steps: int = 1,
    renormalize: bool = False, step: Tensor | None = None, q_scale: Tensor | None = None,
    k_scale: Tensor | None = None, scale: float | None = None, mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """What `quantized_attention` multiplies v with, [B, H, Tq, Tk] float32, by the definition."""
    kind = Softmax(softmax, bits, steps, renormalize)
    _check(q, k, v, kind, q_scale, k_scale, None, step)
    multiplier = (v.shape[3] ** -0.5 if scale is None else scale) * LOG2_E * kind.units
    a, k_scale, mask = _expanded(q, k, multiplier, q_scale, k_scale, mask, causal)
    P, L = weights_ref(q, k, v, kind, a, k_scale, mask, step, k.shape[2] > WHOLE)
    return P / torch.where(L > 0, L, 1.0)


def _expanded(
    q: Tensor, k: Tensor, multiplier: float, q_scale: Tensor | None, k_scale: Tensor | None,
    mask: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """a [B, H, Tq], k_scale [B, H, Tk] and one mask, as the reference reads them."""
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    a = torch.full((B, H, Tq), multiplier, dtype=torch.float32, device=q.device)
    if q_scale is not None:
        a = _per_token(q_scale, Tq, B, H) * a
    if causal:
        below = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
        mask = below if mask is None else mask & below
    return a, None if k_scale is None else _per_token(k_scale, Tk, B, H), mask
