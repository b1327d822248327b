"""FlexRound, Lee et al. 2023, https://arxiv.org/abs/2306.00317, one layer at a time.

    w_hat = s1 * clamp(round(w / (s1 * S2 * s3)))

The step s1 [N, G], a divisor S2 of every weight and s3 of every row are learned, stored as
logarithms, by straight-through gradients: large weights move more than small ones (eq. 2). The
error is the quadratic form of qtk/round/_least_squares.py.
"""

import torch
from torch import Tensor

from qtk.numerics import expand_groups, quantize
from qtk.round import Problem, Rounded, best_scale, to_nearest
from qtk.round._least_squares import error, target
from qtk.scheme import Format

STEPS = 300
RATE = 3e-3


def find(problem: Problem) -> Rounded:
    """Codes and scale of the best step, the first of which is rounding to nearest."""
    if problem.inputs is None:
        return to_nearest(problem.weight, problem.fmt)
    fmt = problem.fmt
    weight, hessian = target(problem)
    scale = best_scale(weight, fmt, hessian.diag())
    with torch.enable_grad():
        return learned(weight, scale, hessian, fmt)


def learned(weight: Tensor, scale: Tensor, hessian: Tensor, fmt: Format) -> Rounded:
    """The codes [N, K] and scale [N, G] with the smallest error that the descent passes."""
    log_s1, log_S2 = scale.log().requires_grad_(), torch.zeros_like(weight, requires_grad=True)
    log_s3 = torch.zeros_like(scale[:, :1], requires_grad=True)
    optimizer = torch.optim.Adam([log_s1, log_S2, log_s3], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best = (torch.full_like(scale[:, 0], torch.inf), torch.empty_like(weight), scale)
    for _ in range(STEPS):
        s1 = log_s1.exp()
        full = expand_groups(s1, weight.shape[1], fmt.group_size)
        units = weight / (full * (log_S2 + log_s3).exp())
        with torch.no_grad():
            codes = quantize(units, torch.ones(()), 0, fmt)
        inside = units.clamp(fmt.qmin, fmt.qmax)
        w_hat = (inside + (codes - inside).detach()) * full
        errors = error(w_hat - weight, hessian)
        best = _keep_better(best, errors.detach(), codes, s1.detach())
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
        schedule.step()
    return best[1], best[2]


def _keep_better(
    best: tuple[Tensor, Tensor, Tensor], errors: Tensor, codes: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row."""
    now = errors < best[0]
    rows = now[:, None]
    return (
        torch.where(now, errors, best[0]),
        torch.where(rows, codes, best[1]),
        torch.where(rows, scale, best[2]),
    )
