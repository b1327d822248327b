"""Auto-PGD in the linf ball (Croce and Hein 2020, arXiv 2003.01690, algorithm 1).

z = P(x_k + step sign g_k);  x_{k+1} = P(x_k + .75 (z - x_k) + .25 (x_k - x_{k-1}))

The step starts at twice the budget. At each checkpoint it is halved, and the best point gone back
to, where the loss rose in fewer than .75 of the steps since the last one, or where neither the step
nor the best loss has changed since then. Checkpoints lie at shares 0, .22 and so on, each distance
.03 shorter than the one before, .06 at least.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from qtk.robust.ball import gradient, into_linf, uniform

ALPHA, RHO = 0.75, 0.75


def ascend(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int,
    loss_of: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The best point seen: a wrong answer before a right one, then the greater loss.

    Args:
        loss_of: logits [B, classes] -> [B].
    """
    point = into_linf(x + budget * (2 * uniform(x, generator) - 1), x, budget)
    step = x.new_full((len(x), *[1] * (x.dim() - 1)), 2 * budget)
    last, checks = point, checkpoints(steps)
    loss, logits, grad = gradient(model, point, loss_of)
    best = Best(point, loss, logits.argmax(-1) != y, grad)
    rises, since, at_check = torch.zeros_like(loss), 0, (step.clone(), best.loss.clone())
    for k in range(1, steps + 1):
        z = into_linf(point + step * grad.sign(), x, budget)
        moved = point + ALPHA * (z - point) + (1 - ALPHA) * (point - last) if k > 1 else z
        last, point = point, into_linf(moved, x, budget)
        new, logits, grad = gradient(model, point, loss_of)
        rises, loss, since = rises + (new > loss), new, since + 1
        best.see(point, loss, logits.argmax(-1) != y, grad)
        if k in checks and k < steps:
            still = (at_check[0] == step).flatten() & (at_check[1] >= best.loss)
            stuck = (rises < RHO * since) | still
            at_check = step.clone(), best.loss.clone()
            step = torch.where(_wide(stuck, x), step / 2, step)
            point = torch.where(_wide(stuck, x), best.by_loss, point)
            last = torch.where(_wide(stuck, x), best.by_loss, last)
            grad = torch.where(_wide(stuck, x), best.grad, grad)
            loss = torch.where(stuck, best.loss, loss)
            rises, since = torch.zeros_like(rises), 0
    return best.answer


def checkpoints(steps: int) -> set[int]:
    """After which steps the step size is looked at."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(round(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06), 2))
    return {-int(-round(100 * share) * steps // 100) for share in shares[1:]}


class Best:
    """The point of greatest loss, where the ascent goes back to, and the one that is answered."""

    def __init__(self, point: Tensor, loss: Tensor, wrong: Tensor, grad: Tensor) -> None:
        self.by_loss, self.loss, self.grad = point.clone(), loss.clone(), grad.clone()
        self.answer, self.wrong, self.answer_loss = point.clone(), wrong.clone(), loss.clone()

    def see(self, point: Tensor, loss: Tensor, wrong: Tensor, grad: Tensor) -> None:
        more = loss > self.loss
        self.by_loss = torch.where(_wide(more, point), point, self.by_loss)
        self.grad = torch.where(_wide(more, point), grad, self.grad)
        self.loss = torch.where(more, loss, self.loss)
        better = (wrong & ~self.wrong) | ((wrong == self.wrong) & (loss > self.answer_loss))
        self.answer = torch.where(_wide(better, point), point, self.answer)
        self.answer_loss = torch.where(better, loss, self.answer_loss)
        self.wrong = self.wrong | wrong


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.dim() - 1))
