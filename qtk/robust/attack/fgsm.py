"""FGSM (Goodfellow et al. 2015, arXiv 1412.6572): x' = x + budget * sign(gradient)."""

from torch import Generator, Tensor, nn

from qtk.robust.attack import _foolbox

INPUT, NORM, GRADIENTS = "pixels", "linf", True


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    """One step; `steps` changes nothing."""
    return _foolbox.run("LinfFastGradientAttack", model, x, y, budget, generator)
