"""Linear layer on float activations with integer weights: W4A16 and W8A16.

    w_hat[n, k] = (w_q[n, k] - w_zero_point[n, g]) * w_scale[n, g]          g = k // group_size
    y[m, n]     = sum_k x[m, k] * w_hat[n, k] + bias[n]

M tokens, K input channels, N output channels, G groups of group_size channels (1 unless given).
Weights of up to 4 bits are packed in the layout of `_int4.py`, wider ones are int8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import backend_of
from ._int4 import packed_width, unpack_int4


def dequantize_ref(
    w_q: Tensor, w_scale: Tensor, w_zero_point: Tensor | None, group_size: int | None
) -> Tensor:
    """w_hat [N, K], float32."""
    K, G = w_q.shape[1], w_scale.shape[1]
    size = group_size if G > 1 and group_size is not None else max(K, 1)
    w = F.pad(w_q.float(), (0, G * size - K)).unflatten(1, (G, size))  # [N, G, g]
    if w_zero_point is not None:
        w -= w_zero_point.unsqueeze(-1)
    return (w * w_scale.unsqueeze(-1)).flatten(1)[:, :K]


def weight_only_linear_ref(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """The definition, in float32 and returned in x's dtype."""
    y = x.float() @ dequantize_ref(w_q, w_scale, w_zero_point, group_size).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def prepare_weight_only(
    w: Tensor, *, bits: int, in_features: int, backend: str | None = None
) -> Tensor:
    """The weights in the form that the backend reads. Done once.

    Args:
        w: [N, ceil(K / 128) * 64], uint8, if bits <= 4, else [N, K], int8.
    """
    width = packed_width(in_features) if bits <= 4 else in_features
    dtype = torch.uint8 if bits <= 4 else torch.int8
    if w.dtype != dtype or w.ndim != 2 or w.shape[1] != width:
        raise ValueError(
            f"{bits}-bit weights over {in_features} channels need {dtype} [N, {width}], "
            f"got {w.dtype} {list(w.shape)}"
        )
    backend_of(w, backend)
    return w.contiguous()


def restore_weight_only(operand: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Inverts `prepare_weight_only`."""
    return operand


def weight_only_kernel_name(
    operand: Tensor, *, bits: int, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> str:
    """Which kernel `weight_only_linear` really runs for this operand and activations of `dtype`."""
    name = backend_of(operand, backend)
    if name == "cpu":
        return "dequantize, then float linear"
    return "triton weight_only_linear" if name == "triton" else "reference"


def weight_only_linear(
    x: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    w_zero_point: Tensor | None = None,
    bits: int,
    in_features: int,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiplies activations by weights that are dequantized on the way.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        operand: the weights, from `prepare_weight_only` with the same backend.
        w_scale: [N, 1] or [N, G], float32.
        bias: [N], or None.
        w_zero_point: as w_scale, or None for 0; need not be whole.
        bits: 2 to 8, of the weights.
        in_features: K.
        group_size: channels in a group, if there is more than one.

    Returns:
        y: [..., N], in x's dtype.
    """
    name = backend_of(x, backend)
    K, G = in_features, w_scale.shape[1]
    if x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}], got {list(x.shape)}")
    if G > 1 and (group_size is None or -(-K // group_size) != G):
        raise ValueError(
            f"scales with {G} groups over {K} channels need group_size with "
            f"ceil({K} / group_size) = {G}, got {group_size}"
        )
    w_q = unpack_int4(operand, K) if bits <= 4 else operand
    if name == "cpu":
        w = dequantize_ref(w_q, w_scale, w_zero_point, group_size).to(x.dtype)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype))
    return weight_only_linear_ref(x, w_q, w_scale, bias, w_zero_point, group_size)
