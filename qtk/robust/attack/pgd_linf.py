"""PGD (Madry et al. 2018, arXiv 1706.06083) in the linf ball: a random start, then projected steps.

Steps of 2.5 budget / steps, so that the way is longer than the ball is wide. No early stop.
"""

from torch import Generator, Tensor, nn

from qtk.robust.attack import _foolbox

INPUT, NORM, GRADIENTS = "pixels", "linf", True


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    return _foolbox.run(
        "LinfProjectedGradientDescentAttack", model, x, y, budget, generator, steps=steps,
        rel_stepsize=2.5 / steps,
    )  # fmt: skip
