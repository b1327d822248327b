"""Outlier Suppression+, Wei et al. 2023, https://arxiv.org/abs/2304.09145.

    shift_j = (max_t X_tj + min_t X_tj) / 2                               eq. 2
    s_j     = max(1, max_t |X_tj - shift_j| / t)                          eq. 8

with one threshold t a site, searched for the smallest error of what the site's linears compute:
attention's output for q, k and v, the plain output otherwise (eq. 6 and 7). The paper treats the
outputs of LayerNorms; here the context and the activation before the second MLP linear are
treated too, because the fused quantizers make it free.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from qtk.numerics import (
    expand_groups,
    fake_quantize,
    fake_quantize_token,
    in_groups,
    scale_and_zero_point,
)
from qtk.observe import Site
from qtk.scheme import Format, Scheme
from qtk.transform import Change

CANDIDATES = 24  # thresholds tried, geometric from the full range downward
SMALLEST = 0.02  # the last one, relative to the full range: LayerNorm outputs are often below 1
TOKENS = 512  # rows that the loss is measured on


def find(site: Site, scheme: Scheme) -> Change:
    """shift and channel_scale of one site; none where there is no data or nothing to gain."""
    weight = site.weight()
    none = Change.none(weight.shape[1], weight.device)
    if not site.has_data or scheme.a is None or scheme.w is None:
        return none
    lo, hi = site.lo.amin(0), site.hi.amax(0)
    shift, reach = (hi + lo) / 2, (hi - lo) / 2  # [K]
    loss = _loss(site, weight, shift, scheme.w, scheme.a)
    best, channel_scale = float("inf"), none.channel_scale
    for k in range(CANDIDATES):
        threshold = reach.max() * SMALLEST ** (k / (CANDIDATES - 1))
        candidate = (reach / threshold.clamp(min=1e-8)).clamp(min=1.0)
        error = loss(candidate)
        if error < best:  # a tie keeps the larger threshold: less scaling
            best, channel_scale = error, candidate
    return Change(shift, channel_scale)


def _loss(
    site: Site, weight: Tensor, shift: Tensor, w: Format, a: Format
) -> Callable[[Tensor], float]:
    """The error of the site's output as a function of channel_scale."""
    x, mask = _sample(site)
    whole = site.group.name == "qkv" and len(site.linears) == 3
    output = partial(_attention, site, mask) if whole else _plain
    bias = site.bias() + weight @ shift
    rows = x[mask] - shift  # [T, K]
    wanted = output(rows @ weight.T + bias)

    def loss(channel_scale: Tensor) -> float:
        w_hat = _fake_quantize_weight(weight * channel_scale, w)
        x_hat = _fake_quantize_input(rows / channel_scale, a)
        return float((output(x_hat @ w_hat.T + bias) - wanted).square().sum())

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


def _attention(site: Site, mask: Tensor, y: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of stacked q, k, v: [rows, 3 H] -> [rows, H]."""
    heads, (B, T) = site.block.heads, mask.shape
    qkv = y.new_zeros(B, T, y.shape[-1])
    qkv[mask] = y
    q, k, v = qkv.view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
    allowed = mask[:, None, None, :]
    if site.block.causal:
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
