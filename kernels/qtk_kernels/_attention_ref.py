"""The definition of `quantized_attention` in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._launch import cdiv
from ._softmax import MASKED, Softmax, anchored, bytes_of, fma, probabilities_ref

WHOLE = 512  # keys of a row that is anchored at its exact maximum


def unpack_heads(packed: Tensor, D: int) -> Tensor:
    """Inverts `quantized_attention.pack_heads`: [..., ceil(D / 2)] uint8 to [..., D] int8."""
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


def group(scale: Sequence[int], T: int) -> int:
    """Tokens that share a scale of that shape."""
    return max(cdiv(T, scale[-1]), 1)


def per_token(scale: Tensor, T: int, B: int, H: int) -> Tensor:
    """[B, H, G] to [B, H, T]."""
    if scale.shape[-1] == T:
        return scale.expand(B, H, T)
    index = torch.arange(T, device=scale.device) // group(scale.shape, T)
    return scale.expand(B, H, -1)[..., index]


def expanded(
    q: Tensor, k: Tensor, multiplier: float, q_scale: Tensor | None, k_scale: Tensor | None,
    mask: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """a [B, H, Tq], k_scale [B, H, Tk] and one mask, as the reference reads them."""
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    a = torch.full((B, H, Tq), multiplier, dtype=torch.float32, device=q.device)
    if q_scale is not None:
        a = per_token(q_scale, Tq, B, H) * a
    if causal:
        below = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
        mask = below if mask is None else mask & below
    return a, None if k_scale is None else per_token(k_scale, Tk, B, H), mask
