"""Residual add, LayerNorm, shift, scale and quantize in one pass.

    h        = x + residual
    xhat     = (h - mean(h)) / sqrt(var(h) + eps)        per token
    y        = xhat * weight + bias                      per channel
    q, scale = codes of y                                see `_codes.py`
    emitted  = xhat * norm_weight + norm_bias  ("norm")  or  h  ("sum")

`weight` and `bias` already hold the layer's gamma and beta, the shift, the channel scale, the step
and the zero point, so quantizing costs nothing beyond LayerNorm itself. `emitted` feeds the
residual stream: "norm" in post-norm models (BERT), "sum" in pre-norm models (OPT, ViT).

M tokens, K channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._codes import Codes, Granularity, channels_of, check_channels, quantize_ref, rows_of
from ._dispatch import backend_of, on_device
from ._lang import (
    dynamic_divide,
    dynamic_limit,
    jit,
    lanes,
    round_codes,
    store_codes,
    store_scale,
    tl,
)
from ._launch import cdiv

EMIT = ("norm", "sum")


def layer_norm_quantize_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    emit: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    codes: Codes,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition, in float32.

    Another order of summation moves mean and variance by a few ulp, so codes of two
    implementations may differ by one where y is that close to a rounding boundary.
    """
    K = x.shape[-1:]
    h = x.float() if residual is None else x.float() + residual.float()  # [..., K]
    emitted = None
    if emit == "norm" and norm_weight is not None and norm_bias is not None:
        emitted = F.layer_norm(h, K, norm_weight.float(), norm_bias.float(), eps).to(x.dtype)
    if emit == "sum":
        emitted = h.to(x.dtype)
    q, scale = quantize_ref(F.layer_norm(h, K, weight.float(), bias.float(), eps), codes)
    return q, scale, emitted


@jit
def _load(at, mask, FULL: tl.constexpr):
    if FULL:  # a mask costs an instruction a register
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@jit
def _load_h(
    x_ptr, residual_ptr, offs_m, start, M, K, stride_xm, stride_rm,
    GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs_k, mask_k = lanes(start, K, GROUP, SPAN, BLOCK_K)
    mask = mask_k[None, :]
    h = _load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask, FULL)
    if residual_ptr is not None:
        h = h + _load(residual_ptr + offs_m[:, None] * stride_rm + offs_k[None, :], mask, FULL)
    return h  # [ROWS, BLOCK_K]


@jit
def _squares(
    h, mean, start, K, GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Sum of squared deviations, [ROWS, 1]; masked channels would add mean squared each."""
    d = h - mean
    if not FULL:
        _, inside = lanes(start, K, GROUP, SPAN, BLOCK_K)
        d = tl.where(inside[None, :], d, 0.0)
    return tl.sum(d * d, axis=1)[:, None]


@jit
def _affine(
    xhat, weight_ptr, bias_ptr, start, K,
    GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs_k, mask_k = lanes(start, K, GROUP, SPAN, BLOCK_K)
    # as [1, BLOCK_K] they share the layout of x, and need no way through shared memory
    at, mask = offs_k[None, :], mask_k[None, :]
    weight, bias = _load(weight_ptr + at, mask, FULL), _load(bias_ptr + at, mask, FULL)
    return xhat * weight + bias  # masked channels are 0


@jit
def _finish(
    h, mean, rstd, limit,
    weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, q_ptr, scale_ptr, emitted_ptr,
    offs_m, step, M, K, G, width, clip,
    GROUP: tl.constexpr, SPAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, KNOWN: tl.constexpr, CHANNELS: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes everything there is to write about one tile."""
    start = step * CHANNELS
    xhat = (h - mean) * rstd
    if emitted_ptr is not None:
        offs_k, mask_k = lanes(start, K, GROUP, SPAN, BLOCK_K)
        mask = (offs_m < M)[:, None] & mask_k[None, :]
        emitted = h
        if norm_weight_ptr is not None:
            emitted = _affine(
                xhat, norm_weight_ptr, norm_bias_ptr, start, K, GROUP, SPAN, BLOCK_K, FULL
            )
        tl.store(emitted_ptr + offs_m[:, None] * K + offs_k[None, :], emitted, mask=mask)
    y = _affine(xhat, weight_ptr, bias_ptr, start, K, GROUP, SPAN, BLOCK_K, FULL)
    if GROUP:
        if not KNOWN:
            limit = dynamic_limit(y, clip, ROWS, BLOCK_K, SPAN)
            first = step * (BLOCK_K // SPAN)
            store_scale(scale_ptr, limit, offs_m, M, G, first, BLOCK_K // SPAN, QMAX)
        y = dynamic_divide(y, limit, ROWS, BLOCK_K, SPAN, QMAX)
    codes = round_codes(y, QMIN * 1.0, QMAX * 1.0) + SHIFT
    store_codes(q_ptr, codes, offs_m, start, M, width, ROWS, BLOCK_K, PACKED, GROUP, SPAN)


@jit
def _layer_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr,
    q_ptr, scale_ptr, emitted_ptr,
    M, K, G, width, stride_xm, stride_rm, eps, clip,
    GROUP: tl.constexpr, SPAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, WALK: tl.constexpr, FULL: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_m = tl.minimum(offs_m, M - 1)  # the last row may be written several times, the same
    h = _load_h(
        x_ptr,
        residual_ptr,
        offs_m,
        0,
        M,
        K,
        stride_xm,
        stride_rm,
        GROUP,
        SPAN,
        BLOCK_K,
        FULL,
    )
    total = tl.sum(h, axis=1)[:, None]  # [ROWS, 1]
    if WALK:  # a row longer than a tile is read once for each of its sums
        for start in range(CHANNELS, K, CHANNELS):
            h = _load_h(
                x_ptr,
                residual_ptr,
                offs_m,
                start,
                M,
                K,
                stride_xm,
                stride_rm,
                GROUP,
                SPAN,
                BLOCK_K,
                FULL,
            )
            total += tl.sum(h, axis=1)[:, None]
    mean = total / K
    if WALK:
        squares = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, K, CHANNELS):
            h = _load_h(
                x_ptr,
                residual_ptr,
                offs_m,
                start,
                M,
                K,
                stride_xm,
                stride_rm,
                GROUP,
                SPAN,
                BLOCK_K,
                FULL,
            )
            squares += _squares(h, mean, start, K, GROUP, SPAN, BLOCK_K, FULL)
    else:
        squares = _squares(h, mean, 0, K, GROUP, SPAN, BLOCK_K, FULL)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))
    limit = tl.zeros([ROWS, 1], tl.float32)
    if WALK:
        if GROUP == BLOCK_K:  # one scale for the whole row
            for start in range(0, K, CHANNELS):
                h = _load_h(
                    x_ptr, residual_ptr, offs_m, start, M, K, stride_xm, stride_rm,
                GROUP, SPAN, BLOCK_K, FULL,
                )  # fmt: skip
                y = _affine(
                    (h - mean) * rstd, weight_ptr, bias_ptr, start, K, GROUP, SPAN, BLOCK_K, FULL
                )
                limit = tl.maximum(limit, dynamic_limit(y, clip, ROWS, BLOCK_K, BLOCK_K))
            store_scale(scale_ptr, limit, offs_m, M, G, 0, 1, QMAX)
        for step in range(0, tl.cdiv(K, CHANNELS)):
            h = _load_h(
                x_ptr, residual_ptr, offs_m, step * CHANNELS, M, K, stride_xm, stride_rm,
                GROUP, SPAN, BLOCK_K, FULL,
            )  # fmt: skip
            _finish(
                h, mean, rstd, limit,
                weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, q_ptr, scale_ptr, emitted_ptr,
                offs_m, step, M, K, G, width, clip,
                GROUP, SPAN, QMIN, QMAX, SHIFT, PACKED, GROUP == BLOCK_K, CHANNELS, FULL,
                ROWS, BLOCK_K,
            )  # fmt: skip
    else:
        _finish(
            h, mean, rstd, limit,
            weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, q_ptr, scale_ptr, emitted_ptr,
            offs_m, 0, M, K, G, width, clip,
            GROUP, SPAN, QMIN, QMAX, SHIFT, PACKED, False, CHANNELS, FULL, ROWS, BLOCK_K,
        )  # fmt: skip


def _launch_layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    emit: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    codes: Codes,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    K = x.shape[-1]
    x_2d = rows_of(x)
    r_2d = None if residual is None else rows_of(residual)
    norm: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if emit == "norm" and norm_weight is not None and norm_bias is not None:
        norm = (norm_weight.contiguous(), norm_bias.contiguous())
    M = x_2d.shape[0]
    q, scale = codes.empty(x)
    emitted = None if emit is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = codes.launch(M, K)
    channels = channels_of(tile)
    with on_device(x):
        _layer_norm_quantize_kernel[(cdiv(M, tile["ROWS"]),)](
            x_2d, r_2d, weight.contiguous(), bias.contiguous(), *norm, q, scale, emitted,
            M, K, 1 if scale is None else scale.shape[-1], q.shape[-1],
            x_2d.stride(0), 0 if r_2d is None else r_2d.stride(0), eps, codes.clip,
            WALK=channels < K, FULL=K % channels == 0 and channels == tile["BLOCK_K"],
            CHANNELS=channels, **tile,
            # a fused sum only moves y within the bound that another order of summation needs
        )  # fmt: skip
    return q, scale, emitted


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    emit: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bits: int,
    granularity: Granularity = "tensor",
    signed: bool = True,
    packed: bool = False,
    clip: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalizes x + residual and quantizes the result.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight, bias: [K], the affine map from the normalized value to the grid.
        eps: added to the variance.
        residual: [..., K], as x.
        emit: None, "norm" or "sum", what to return for the residual stream.
        norm_weight, norm_bias: [K], the affine map of "norm".
        bits: 2 to 8.
        granularity: "tensor" (static), "token", or the size of a group of channels.
        signed: int8 codes, else uint8.
        packed: two 4-bit codes a byte, in the layout of `pack_int4`.
        clip: the part of the dynamic range to keep, in (0, 1].

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32.
        emitted: None, or [..., K] in x's dtype.
    """
    check_channels(x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, got {list(residual.shape)}")
    if emit is not None and emit not in EMIT:
        raise ValueError(f"emit must be None or one of {EMIT}, got {emit!r}")
    if emit == "norm" and (norm_weight is None or norm_bias is None):
        raise ValueError("emit='norm' needs norm_weight and norm_bias, got None")
    codes = Codes(bits, granularity, signed, packed, clip)
    triton = backend_of(x, backend) == "triton" and x.numel()
    run = _launch_layer_norm_quantize if triton else layer_norm_quantize_ref
    return run(x, weight, bias, eps, residual, emit, norm_weight, norm_bias, codes)
