"""PGD on the embeddings of a sentence's tokens, each moved by at most a share of their mean length.

A bound from below on what a text attack could do: no sentence need have these embeddings (Miyato et
al. 2017, arXiv 1605.07725, perturb embeddings likewise).
"""

from functools import partial

import torch
from torch import Generator, Tensor, nn

from qtk.robust.ball import cross_entropy, gradient, uniform

INPUT, NORM, GRADIENTS = "embeddings", "token", True


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    """x [B, T, H]: steps along each token's own gradient, made as long as the budget allows."""
    radius = budget * x.norm(dim=-1).mean()
    moved = project(x + radius * (2 * uniform(x, generator) - 1) / x.shape[-1] ** 0.5, x, radius)
    for _ in range(steps):
        _, _, grad = gradient(model, moved, partial(cross_entropy, y=y))
        step = grad / grad.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        moved = project(moved + 2.5 / steps * radius * step, x, radius)
    return moved


def project(x: Tensor, origin: Tensor, radius: Tensor) -> Tensor:
    """Each token back into its ball."""
    way = x - origin
    length = way.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return origin + way * torch.clamp(radius / length, max=1)
