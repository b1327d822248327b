"""APGD on the cross entropy (Croce and Hein 2020, arXiv 2003.01690)."""

from functools import partial

from torch import Generator, Tensor, nn

from qtk.robust.attack._apgd import ascend
from qtk.robust.ball import cross_entropy

INPUT, NORM, GRADIENTS = "pixels", "linf", True


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    return ascend(model, x, y, budget, generator, steps, partial(cross_entropy, y=y))
