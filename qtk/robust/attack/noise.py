"""Random noise at the budget: every pixel goes up or down by all of it. What no attack may fail to
beat."""

import torch
from torch import Generator, Tensor, nn

from qtk.robust.ball import into_linf, uniform

INPUT, NORM, GRADIENTS = "pixels", "linf", False


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    signs = torch.sign(uniform(x, generator) - 0.5)
    return into_linf(x + budget * signs, x, budget)
