"""Finds what a block's quantized attention needs to know, on calibration data."""

import torch
from torch import Tensor, nn

from qtk.errors import ModelError
from qtk.models import QKV
from qtk.modules.attention import QuantAttention, install
from qtk.observe import Site
from qtk.round import best_steps
from qtk.scheme import AttentionScheme, Format

CANDIDATES = 24  # ends of a head's probability grid that are tried, geometric
SMALLEST = 0.02  # the last, as a share of the head's largest probability
SCORES = 4_000_000  # of all heads, that the search looks at


def quantize_attention(
    model: nn.Module, site: Site, scheme: AttentionScheme | None, backend: str
) -> None:
    """Gives the attention of the site's block quantized products, once q, k and v are quantized.

    Args:
        scheme: None for attention that stays in floating point.

    Raises:
        ModelError: the block's attention is not one that could be replaced.
    """
    if scheme is None or site.group.name != QKV:
        return
    if site.block.anatomy is None or site.block.attention is None:
        raise ModelError(
            f"{site.block.name}: attention of this family cannot be quantized; leave attention and "
            "softmax in floating point"
        )
    heads = site.block.anatomy.attention.heads
    linears = [model.get_submodule(name) for name in site.group.linears]
    install(
        model.get_submodule(site.block.attention), products(site, linears, heads, scheme, backend)
    )


@torch.no_grad()
def products(
    site: Site, linears: list[nn.Module], heads: int, scheme: AttentionScheme, backend: str
) -> QuantAttention:
    """The products of one block, from what its quantized q, k and v are on the site's sequences.

    Args:
        site: of the group `QKV`, with data where `scheme.needs_data`.
        linears: q, k and v as they will run.
    """
    width = len(next(iter(site.linears.values())).weight)
    attention = QuantAttention(
        heads, width // heads, scheme, backend=backend, device=site.weight().device
    )
    if not scheme.needs_data:
        return attention
    if scheme.bits is not None:
        value = torch.cat([linears[2](x)[mask].float() for x, mask in site.sequences])  # [T, H * D]
        steps = best_steps(value.T.contiguous(), Format(scheme.bits))
        attention.v_scale = steps.scale.view(heads, -1)
    if scheme.softmax == "matthew":
        attention.softmax_step = matthew_steps(site, linears, attention)
    return attention


def matthew_steps(site: Site, linears: list[nn.Module], attention: QuantAttention) -> Tensor:
    """[H]: each head's step with the smallest squared error of P v, APQ-ViT section 3.3.

    Both are the quantized model's own, but for the softmax; ends below the largest probability
    clip it, and sharpen the rest.
    """
    top = 2 ** (attention.scheme.softmax_bits or 8) - 1
    exact = QuantAttention(attention.heads, attention.head_size, AttentionScheme())
    parts = []
    seen = 0
    for x, mask in site.sequences:
        B, T, _ = x.shape
        q, k, v = (
            linear(x).float().view(B, T, attention.heads, -1).transpose(1, 2) for linear in linears
        )
        allowed = mask[:, None, None, :]
        if site.block.causal:
            allowed = allowed & torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        weights = exact.weights(q, k, v, mask=allowed) * mask[:, None, :, None]
        parts.append((weights, v))
        seen += weights.numel()
        if seen > SCORES:
            break
    largest = torch.stack([p.amax((0, 2, 3)) for p, _ in parts]).amax(0)  # [H]
    best = torch.full_like(largest, torch.inf)
    steps = largest / top
    for i in range(CANDIDATES):
        step = largest * SMALLEST ** (i / (CANDIDATES - 1)) / top
        error = sum((_context_error(p, v, step, top) for p, v in parts), torch.zeros_like(best))
        better = error < best
        best, steps = torch.where(better, error, best), torch.where(better, step, steps)
    return steps


def _context_error(weights: Tensor, v: Tensor, step: Tensor, top: int) -> Tensor:
    """[H]: squared error of the context with probabilities on a grid."""
    codes = (weights / step[:, None, None]).round().clamp(max=top)
    got = codes / codes.sum(-1, keepdim=True).clamp(min=1)
    return ((got - weights) @ v).square().sum((0, 2, 3))
