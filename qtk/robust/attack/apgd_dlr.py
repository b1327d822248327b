"""APGD on the difference of logits ratio (Croce and Hein 2020, arXiv 2003.01690, equation 6).

    DLR = -(z_y - max_{i != y} z_i) / (z_1st - z_3rd)

It does not change when all logits are scaled, so that a confident model does not hide its gradient.
"""

from functools import partial

from torch import Generator, Tensor, nn

from qtk.errors import ModelError
from qtk.robust.attack._apgd import ascend

INPUT, NORM, GRADIENTS = "pixels", "linf", True


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    return ascend(model, x, y, budget, generator, steps, partial(ratio, y=y))


def ratio(logits: Tensor, y: Tensor) -> Tensor:
    """[B].

    Raises:
        ModelError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ModelError(
            f"apgd_dlr compares three logits, and the model has {logits.shape[1]}: use apgd_ce"
        )
    logits = logits.float()
    top = logits.topk(3, dim=1).values
    own = logits.gather(1, y[:, None])[:, 0]
    other = logits.scatter(1, y[:, None], -float("inf")).amax(1)
    return -(own - other) / (top[:, 0] - top[:, 2] + 1e-12)
