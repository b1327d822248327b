"""DDN (Rony et al. 2019, arXiv 1811.09600): direction and l2 norm found apart, the norm the least
that changes the answer; where that is more than the budget, the way there is cut at the budget.
"""

from torch import Generator, Tensor, nn

from qtk.robust.attack import _foolbox

INPUT, NORM, GRADIENTS = "pixels", "l2", True


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    return _foolbox.run(
        "DDNAttack", model, x, y, budget, generator, steps=steps, init_epsilon=budget
    )
