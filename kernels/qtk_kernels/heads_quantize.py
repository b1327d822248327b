"""q, k and v to the codes that `quantized_attention` reads, in one pass over all three.

    q_q, q_scale = codes of q                  a scale per token and head, found here; k alike
    v_q          = clamp(round(v * v_multiplier))   a known scale per channel, v_multiplier = 1 / it

Reads them where the joined product wrote them, heads between tokens and channels, and writes
whole heads: with a pass for each there were three quantizers and two copies. v may be written
with its tokens side by side: what multiplies bytes by bytes on a tensor core wants it so.

B batch, H heads, Tq queries, Tk keys, D head size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._code_bytes import to_bytes
from ._lang import entry, jit, larger, largest_along, tl
from ._launch import cdiv, next_power_of_2
from ._plan import Plan, opaque, planned
from .codes import EPS, Codes, quantize_ref
from .dispatch import backend_of, on_device

VALUES = 2048  # of a program, four warps


class Heads(NamedTuple):
    """Codes [B, H, T, D] int8 of each, and scales [B, H, T] float32 of q and k."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor


def heads_quantize_ref(q: Tensor, k: Tensor, v: Tensor, v_multiplier: Tensor, bits: int) -> Heads:
    """The definition, in float32."""
    per_token = Codes(bits, "token")
    (q_q, q_scale), (k_q, k_scale) = (quantize_ref(x.float().clone(), per_token) for x in (q, k))
    v_q, _ = quantize_ref(v.float() * v_multiplier[:, None], Codes(bits))
    assert q_scale is not None and k_scale is not None
    return Heads(q_q, k_q, v_q, q_scale[..., 0], k_scale[..., 0])


@jit
def _tile(x_ptr, b, h, offs_t, offs_d, T, D, stride_b, stride_h, stride_t):
    """[ROWS, BLOCK_D] in float32."""
    at = b * stride_b + h * stride_h + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@jit
def _per_token(
    x_ptr, codes_ptr, scale_ptr, b, h, bh, offs_t, offs_d, T, D, stride_b, stride_h, stride_t,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    x = _tile(x_ptr, b, h, offs_t, offs_d, T, D, stride_b, stride_h, stride_t)
    limit = larger(largest_along(tl.abs(x), 1), LEAST)
    row = bh.to(tl.int64) * T + offs_t
    tl.store(scale_ptr + row, tl.div_rn(limit, limit * 0.0 + QMAX), mask=offs_t < T)
    codes = to_bytes(x * tl.div_rn(limit * 0.0 + QMAX, limit)[:, None], QMIN, QMAX, 0)
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    tl.store(codes_ptr + row[:, None] * D + offs_d[None, :], codes, mask=mask)


@entry
def heads_quantize_kernel(
    q_ptr, k_ptr, v_ptr, v_multiplier_ptr, q_codes_ptr, k_codes_ptr, v_codes_ptr, q_scale_ptr,
    k_scale_ptr,
    H, Tq, Tk, D, tiles, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_wh, stride_wt, stride_wd,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """stride_w*: of v's codes, from head to head, token to token and channel to channel."""
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    offs_t = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    _per_token(
        q_ptr, q_codes_ptr, q_scale_ptr, b, h, bh, offs_t, offs_d, Tq, D,
        stride_qb, stride_qh, stride_qt, QMIN, QMAX, LEAST,
    )  # fmt: skip
    _per_token(
        k_ptr, k_codes_ptr, k_scale_ptr, b, h, bh, offs_t, offs_d, Tk, D,
        stride_kb, stride_kh, stride_kt, QMIN, QMAX, LEAST,
    )  # fmt: skip
    multiplier = tl.load(v_multiplier_ptr + h * D + offs_d, mask=offs_d < D, other=0.0)
    v = _tile(v_ptr, b, h, offs_t, offs_d, Tk, D, stride_vb, stride_vh, stride_vt)
    codes = to_bytes(v * multiplier[None, :], QMIN, QMAX, 0)
    at = bh.to(tl.int64) * stride_wh + offs_t[:, None] * stride_wt + offs_d[None, :] * stride_wd
    tl.store(v_codes_ptr + at, codes, mask=(offs_t < Tk)[:, None] & (offs_d < D)[None, :])


def _check(q: torch.Size, k: torch.Size, v: torch.Size, multiplier: torch.Size) -> None:
    B, H, _, D = q
    if k != v or k[:2] != (B, H) or k[3] != D:
        raise ValueError(
            f"q must be [B, H, Tq, D], k and v [B, H, Tk, D], got {list(q)}, {list(k)}, {list(v)}"
        )
    if multiplier != (H, D):
        raise ValueError(f"v_multiplier must be [{H}, {D}], got {list(multiplier)}")


@planned
def _plan(
    shapes: tuple[torch.Size, ...], strides: tuple[tuple[int, ...], ...], multiplier: torch.Size,
    codes: Codes, transposed: bool,
) -> Plan:  # fmt: skip
    q, k, v = shapes
    _check(q, k, v, multiplier)
    (B, H, Tq, D), Tk = q, k[2]
    copy = any(stride[3] != 1 for stride in strides)
    if copy:
        strides = tuple((H * T * D, T * D, D, 1) for T in (Tq, Tk, Tk))
    block = max(next_power_of_2(D), 16)
    rows = max(VALUES // block, 1)
    tiles = cdiv(max(Tq, Tk), rows)
    written = (Tk * D, 1, Tk) if transposed else (Tk * D, D, 1)
    float32, int8 = torch.float32, torch.int8
    return Plan(
        copy,
        [((B, H, Tq, D), int8), ((B, H, Tk, D), int8),
         ((B, H, D, Tk) if transposed else (B, H, Tk, D), int8),
         ((B, H, Tq), float32), ((B, H, Tk), float32)],
        (tiles * B * H,),
        (H, Tq, Tk, D, tiles, *strides[0][:3], *strides[1][:3], *strides[2][:3], *written),
        {"QMIN": codes.qmin, "QMAX": codes.qmax, "LEAST": EPS, "ROWS": rows, "BLOCK_D": block,
         "num_warps": 4, "enable_fp_fusion": False},
    )  # fmt: skip


def _empty(q: Tensor, k: Tensor, v: Tensor, _m: Any, bits: int, transposed: bool) -> list[Tensor]:
    B, H, Tk, D = v.shape
    v_shape = (B, H, D, Tk) if transposed else (B, H, Tk, D)
    codes = [x.new_empty(shape, dtype=torch.int8) for x, shape in
             ((q, q.shape), (k, k.shape), (v, v_shape))]  # fmt: skip
    return codes + [x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k)]


@opaque(_empty)
def _launch_heads_quantize(
    q: Tensor, k: Tensor, v: Tensor, v_multiplier: Tensor, bits: int, transposed: bool
) -> list[Tensor]:
    """Codes of q, k and v, those of v as they lie in memory, then the scales of q and k."""
    plan = _plan(
        (q.shape, k.shape, v.shape), (q.stride(), k.stride(), v.stride()), v_multiplier.shape,
        Codes(bits, "token"), transposed,
    )  # fmt: skip
    if plan.copy:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    results = plan.empty(q.device)
    with on_device(q, k, v, v_multiplier):
        heads_quantize_kernel[plan.grid](
            q, k, v, v_multiplier.contiguous(), *results, *plan.numbers, **plan.options
        )
    return results


def heads_quantize(
    q: Tensor, k: Tensor, v: Tensor, v_multiplier: Tensor, bits: int, *,
    transposed: bool = False, backend: str | None = None,
) -> Heads:  # fmt: skip
    """Quantizes the operands of attention.

    Args:
        q, k, v: [B, H, Tq, D], [B, H, Tk, D] and [B, H, Tk, D], floats, any strides.
        v_multiplier: [H, D], float32.
        bits: 2 to 8, of all codes, which are int8.
        transposed: v's codes lie in memory as [B, H, D, Tk], where Tk is a multiple of 16.

    Returns:
        Codes, q_scale [B, H, Tq] and k_scale [B, H, Tk]; nan in the scale of a token that has one.

    Raises:
        ValueError: shapes that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be [B, H, T, D], got {q.ndim}, {k.ndim}, {v.ndim} axes")
    transposed = transposed and k.shape[2] % 16 == 0
    if backend_of(q, backend) == "triton" and q.numel() and k.numel():
        q_q, k_q, v_q, *scales = _launch_heads_quantize(q, k, v, v_multiplier, bits, transposed)
        return Heads(q_q, k_q, v_q.transpose(2, 3) if transposed else v_q, *scales)
    _check(q.shape, k.shape, v.shape, v_multiplier.shape)
    return heads_quantize_ref(q, k, v, v_multiplier, bits)
