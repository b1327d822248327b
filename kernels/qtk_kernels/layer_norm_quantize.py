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

import torch.nn.functional as F
from torch import Tensor

from ._codes import Codes, Granularity, check_channels, quantize_ref
from ._dispatch import backend_of

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
        raise ValueError(
            f"residual must be {list(x.shape)} as x is, got {list(residual.shape)}"
        )
    if emit is not None and emit not in EMIT:
        raise ValueError(f"emit must be None or one of {EMIT}, got {emit!r}")
    if emit == "norm" and (norm_weight is None or norm_bias is None):
        raise ValueError("emit='norm' needs norm_weight and norm_bias, got None")
    codes = Codes(bits, granularity, signed, packed, clip)
    backend_of(x, backend)
    return layer_norm_quantize_ref(
        x, weight, bias, eps, residual, emit, norm_weight, norm_bias, codes
    )
