"""MIM (Dong et al. 2018, arXiv 1710.06081): PGD along a running mean of the gradients, decay 1."""

from torch import Generator, Tensor, nn

from qtk.robust.attack import _foolbox

INPUT, NORM, GRADIENTS = "pixels", "linf", True


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    return _foolbox.run(
        "LinfMomentumIterativeFastGradientMethod", model, x, y, budget, generator, steps=steps,
        rel_stepsize=2.5 / steps,
    )  # fmt: skip
