"""Distances from an image, and the way back into the budget."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


def distance(x: Tensor, y: Tensor, norm: str) -> Tensor:
    """[B], in the norm "linf", "l2" or "l1"."""
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    return torch.linalg.vector_norm((x - y).flatten(1), order, dim=1)


def into_linf(x: Tensor, origin: Tensor, budget: float) -> Tensor:
    """The nearest image inside [0, 1] and the cube around the origin."""
    return torch.minimum(torch.maximum(x, origin - budget), origin + budget).clamp(0, 1)


def scaled_into(x: Tensor, origin: Tensor, budget: float, norm: str) -> Tensor:
    """The point on the way from the origin to x that lies inside the budget, clipped to [0, 1]."""
    reach = distance(x, origin, norm).clamp(min=1e-12)
    share = (budget / reach).clamp(max=1).view(-1, *[1] * (x.dim() - 1))
    return (origin + (x - origin) * share).clamp(0, 1)


def gradient(
    model: nn.Module, x: Tensor, loss_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], logits [B, classes] and the gradient of the sum of losses, [B, ...]."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits = model(leaf)
        losses = loss_of(logits)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), logits.detach(), grad


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """[B], in float32."""
    return F.cross_entropy(logits.float(), y, reduction="none")


def uniform(like: Tensor, generator: Generator) -> Tensor:
    """In [0, 1), of the shape of `like` and where it is."""
    return torch.rand(like.shape, generator=generator).to(like)
