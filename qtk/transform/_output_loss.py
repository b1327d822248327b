"""What a change of variable is judged by: the error of what a site's linears compute.

Attention's output for q, k and v, the plain output otherwise: Outlier Suppression+, Wei et al.
2023, https://arxiv.org/abs/2304.09145, eq. 6 and 7.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from qtk.grids import Change
from qtk.models import QKV, Attention
from qtk.numerics import (
    expand_groups,
    fake_quantize,
    fake_quantize_token,
    in_groups,
    scale_and_zero_point,
)
from qtk.observe import Site
from qtk.scheme import Format, Scheme

SMALLEST = 0.02  # threshold, relative to the full range: LayerNorm outputs are often below 1
TOKENS = 512  # rows that the loss is measured on


def channel_scales(reach: Tensor, candidates: int) -> list[Tensor]:
    """[K] each, eq. 8 for thresholds from the full range downward."""
    shares = [SMALLEST ** (k / (candidates - 1)) for k in range(candidates)]
    thresholds = [(reach.max() * share).clamp(min=1e-8) for share in shares]
    return [(reach / threshold).clamp(min=1.0) for threshold in thresholds]


def output_loss(site: Site, scheme: Scheme) -> Callable[[Change], float]:
    """The squared error of the site's output as a function of the change on `scheme`'s grids."""
    w, a = scheme.w, scheme.a
    assert w is not None and a is not None
    weight = site.weight()
    x, mask = _sample(site)
    anatomy = site.block.anatomy
    whole = anatomy is not None and site.group.name == QKV and len(site.linears) == 3
    output = partial(_attention, anatomy.attention, mask) if anatomy and whole else _plain
    rows = x[mask]  # [T, K]
    wanted = output(rows @ weight.T + site.bias())

    def loss(change: Change) -> float:
        w_hat = _fake_quantize_weight(change.weight(weight), w)
        x_hat = _fake_quantize_input(change.inputs(rows), a)
        y, bias = x_hat @ w_hat.T, change.bias(weight, site.bias())
        return float((output(y if bias is None else y + bias) - wanted).square().sum())

    return loss


def _sample(site: Site) -> tuple[Tensor, Tensor]:
    """[S, T, K] and mask [S, T]: whole sequences of all lengths, about TOKENS rows in all."""
    every = [(x[i], mask[i]) for x, mask in site.sequences for i in range(len(x)) if mask[i].any()]
    step = max(1, sum(int(mask.sum()) for _, mask in every) // TOKENS)
    chosen = every[step // 2 :: step]
    xs, masks = zip(*chosen, strict=True)
    return pad_sequence(list(xs), batch_first=True), pad_sequence(list(masks), batch_first=True)


def _plain(y: Tensor) -> Tensor:
    return y


def _attention(attention: Attention, mask: Tensor, y: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of stacked q, k, v: [rows, 3 H] -> [rows, H]."""
    heads, (B, T) = attention.heads, mask.shape
    qkv = y.new_zeros(B, T, y.shape[-1])
    qkv[mask] = y
    q, k, v = qkv.view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
    allowed = mask[:, None, None, :]
    if attention.causal:
        allowed = allowed & torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return context.transpose(1, 2).reshape(B, T, -1)[mask]


def _fake_quantize_input(rows: Tensor, fmt: Format) -> Tensor:
    """x' on its grid: min-max over the sample, or a row's own maximum for dynamic formats."""
    if fmt.granularity == "token":
        return fake_quantize_token(rows, fmt.bits)
    scale, zero_point = scale_and_zero_point(rows.min(), rows.max(), fmt)
    return fake_quantize(rows, scale, zero_point, fmt)


def _fake_quantize_weight(weight: Tensor, fmt: Format) -> Tensor:
    groups = in_groups(weight, fmt.group_size)
    scale, _ = scale_and_zero_point(groups.amin(-1), groups.amax(-1), fmt)
    return fake_quantize(weight, expand_groups(scale, weight.shape[1], fmt.group_size), 0, fmt)
