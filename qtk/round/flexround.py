"""FlexRound, Lee et al. 2023, https://arxiv.org/abs/2306.00317, one layer at a time.

    w_hat = s1 * clamp(round(w / (s1 * S2 * s3)))

The step s1 [N, G], a divisor S2 of every weight and s3 of every row are learned, stored as
logarithms (the sign of s1 stays), by straight-through gradients: large weights move more than small
ones (eq. 2). The error is the quadratic form of qtk/round/_least_squares.py.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qtk.grids import Steps
from qtk.round import Problem, Report, Rounded, best_steps
from qtk.round._least_squares import error, target

NEEDS_DATA = True


def find(problem: Problem, *, iterations: int = 300, rate: float = 3e-3) -> Rounded:
    """The best that the descent passes; it starts at rounding to nearest.

    Args:
        iterations: each on the whole calibration set at once.
        rate: of Adam, at the first step of a cosine.
    """
    weight, hessian = target(problem)
    steps = best_steps(weight, problem.fmt, hessian.diag())
    with torch.enable_grad():
        levels, scale = learned(weight, steps, hessian, iterations, rate, problem.report)
    return Rounded(steps.codes(levels), replace(steps, scale=scale))


def learned(
    weight: Tensor, steps: Steps, hessian: Tensor, iterations: int, rate: float, report: Report
) -> tuple[Tensor, Tensor]:
    """The levels [N, K] and scale [N, G] with the smallest error that the descent passes."""
    sign, log_s1 = steps.scale.sign(), steps.scale.abs().log().requires_grad_()
    log_S2 = torch.zeros_like(weight, requires_grad=True)
    log_s3 = torch.zeros_like(steps.scale[:, :1], requires_grad=True)
    optimizer = torch.optim.Adam([log_s1, log_S2, log_s3], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    grid = steps.grid(weight.shape[1])
    start = grid.nearest(weight)
    best = (error(start * grid.scale - weight, hessian), start, steps.scale)
    for step in range(iterations):
        report(step, iterations)
        s1 = log_s1.exp() * sign
        grid = replace(steps, scale=s1).grid(weight.shape[1])
        units = grid.clamp(weight / (grid.scale * (log_S2 + log_s3).exp()))
        levels = units.detach().round()
        w_hat = (units + (levels - units).detach()) * grid.scale
        errors = error(w_hat - weight, hessian)
        best = _keep_better(best, errors.detach(), levels, s1.detach())
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
        schedule.step()
    return best[1], best[2]


def _keep_better(
    best: tuple[Tensor, Tensor, Tensor], errors: Tensor, levels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row."""
    now = errors < best[0]
    rows = now[:, None]
    return (
        torch.where(now, errors, best[0]),
        torch.where(rows, levels, best[1]),
        torch.where(rows, scale, best[2]),
    )
