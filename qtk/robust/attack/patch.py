"""A universal patch (Brown et al. 2017, arXiv 1712.09665), learned over places (EOT, Athalye et al.
2018, arXiv 1707.07397).

Pixels of one square are moved by Adam to raise the mean cross entropy over images and random
places; the same square is then shown on other images, at other places.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from qtk.robust.ball import cross_entropy

INPUT, NORM, GRADIENTS, UNIVERSAL = "pixels", "side", True, True
RATE = 0.05  # Adam's, in pixels
PLACES = 8  # of a step's expectation
ROWS = 64  # images of a step
SMOOTH = 1e-3  # weight of the total variation


def learn(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int,
    penalty: Callable[[Tensor], Tensor] | None = None, rows: int = ROWS,
) -> Tensor:  # fmt: skip
    """The patch, [C, side, side] in [0, 1].

    Args:
        x: [B, C, H, W], what it is learned on.
        budget: the patch's side as a share of H.
        penalty: images [b, C, H, W] -> scalar that is to stay small as well.
        rows: images of a step, each at one of the places.
    """
    side = side_of(x, budget)
    patch = torch.rand(x.shape[1], side, side, generator=generator).to(x).requires_grad_()
    adam = torch.optim.Adam([patch], lr=RATE)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (min(rows, len(x) * PLACES),), generator=generator)
        chosen = chosen.to(x.device)
        with torch.enable_grad():
            shown = paste(patch, x[chosen], generator)
            loss = -cross_entropy(model(shown), y[chosen]).mean() + SMOOTH * variation(patch)
            loss = loss if penalty is None else loss + penalty(shown)
            (grad,) = torch.autograd.grad(loss, patch)
        patch.grad = grad
        adam.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    return patch.detach()


def apply(patch: Tensor, x: Tensor, generator: Generator) -> Tensor:
    """The images with the patch, each at a place of its own."""
    return paste(patch, x, generator)


def paste(patch: Tensor, x: Tensor, generator: Generator) -> Tensor:
    """[B, C, H, W] with the patch [C, s, s] at up to PLACES places, drawn, by turns."""
    return paste_at(patch, x, corners(x, patch.shape[-1], generator))


def corners(x: Tensor, side: int, generator: Generator) -> Tensor:
    """[B, 2]: left and top of each image's patch, at up to PLACES places, drawn, by turns."""
    B, _, H, W = x.shape
    tops, lefts = (
        torch.randint(0, n - side + 1, (min(PLACES, B),), generator=generator) for n in (H, W)
    )
    return torch.stack([lefts, tops], 1)[torch.arange(B) % len(tops)]


def paste_at(patch: Tensor, x: Tensor, corners: Tensor) -> Tensor:
    """[B, C, H, W] with the patch [C, s, s], its corner at [B, 2]."""
    side, shown = patch.shape[-1], x.clone()
    for left, top in corners.unique(dim=0).tolist():
        own = (corners == torch.tensor([left, top])).all(1).to(x.device)
        shown[own, :, top : top + side, left : left + side] = patch
    return shown


def side_of(x: Tensor, budget: float) -> int:
    """The side in pixels, one at least, and never the whole image."""
    return max(1, min(min(x.shape[2:]) - 1, round(budget * x.shape[2])))


def variation(patch: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels."""
    if patch.shape[-1] < 2:
        return patch.sum() * 0
    return patch.diff(dim=-1).abs().mean() + patch.diff(dim=-2).abs().mean()
