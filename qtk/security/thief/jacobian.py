"""Jacobian-based augmentation (Papernot et al., 2017, https://arxiv.org/abs/1602.02697).

Each round teaches a clone S with what was asked so far, and then asks as much again:

    x' = clip(x + lambda sign(d S_c / d x)),    c the class that the victim gave x
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SEEDS = 150
STEP = 0.1  # lambda, in the units of the victim's inputs


def queries(
    answer: Callable[[Tensor], Tensor], pool: Tensor, budget: int, generator: torch.Generator,
    learn: Callable[[Tensor, Tensor], nn.Module], *, seeds: int = SEEDS, step: float = STEP,
) -> Tensor:  # fmt: skip
    """150 images of the pool, and their augmentations, doubled until the budget is used."""
    low, high = float(pool.min()), float(pool.max())
    asked = pool[torch.randperm(len(pool), generator=generator)[: min(seeds, budget)]]
    while len(asked) < budget:
        answers = answer(asked)
        clone = learn(asked, answers)
        x = asked[: budget - len(asked)].clone().requires_grad_()
        with torch.enable_grad():
            chosen = answers[: len(x)].argmax(1)
            score = clone(x).gather(1, chosen[:, None]).sum()
            (slope,) = torch.autograd.grad(score, x)
        asked = torch.cat([asked, (x.detach() + step * slope.sign()).clamp(low, high)])
    return asked
