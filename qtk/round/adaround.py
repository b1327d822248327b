"""AdaRound, Nagel et al. 2020, https://arxiv.org/abs/2004.10568, one layer at a time.

    level = floor(w / s) + h(V),   h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    minimise  error(level * s - w) + lambda sum(1 - |2 h - 1|^beta)

beta falls from 20 to 2 after a warm-up without the second term, which pushes every h to 0 or 1
(eq. 21 to 25). The error is exact: a quadratic form in the inputs' Gram matrix, so that a step
costs one small matrix product however many tokens there are.
"""

import torch
from torch import Tensor

from qtk.grids import WeightGrid
from qtk.round import Grids, Problem, Report, Rounded, best_steps
from qtk.round._least_squares import better, error, target

NEEDS_DATA = True
WARM_UP = 0.2  # share of the steps
ZETA, GAMMA = 1.1, -0.1
BETA = (20.0, 2.0)


def find(
    problem: Problem, *, iterations: int = 300, rate: float = 0.1, pull: float = 0.01,
    grids: Grids | None = None,
) -> Rounded:  # fmt: skip
    """Codes and steps; nearest rounding where a row is better so.

    Args:
        iterations: each on the whole calibration set at once; the paper takes 10,000 on samples.
        rate: of Adam.
        pull: lambda, relative to what rounding to nearest costs.
        grids: other steps than those that fit the inputs best.
    """
    weight, hessian = target(problem)
    steps = best_steps(weight, problem.fmt, hessian.diag()) if grids is None else grids(problem)
    grid = steps.grid(weight.shape[1])
    plain = grid.nearest(weight)
    cost = float(error(plain * grid.scale - weight, hessian).sum()) or 1.0
    below = (weight / grid.scale).floor()
    with torch.enable_grad():
        V = learned(weight, grid, below, hessian, cost, iterations, rate, pull, problem.report)
    levels = grid.clamp(below + (V >= 0))  # h(V) >= 1/2
    return Rounded(steps.codes(better(levels, plain, grid.scale, weight, hessian)), steps)


def learned(
    weight: Tensor, grid: WeightGrid, below: Tensor, hessian: Tensor, cost: float,
    iterations: int, rate: float, pull: float, report: Report,
) -> Tensor:  # fmt: skip
    """V [N, K] after the descent; its sign says up or down."""
    part = (weight / grid.scale - below).clamp(0.01, 0.99)
    V = -torch.log((ZETA - GAMMA) / (part - GAMMA) - 1)  # h(V) = the fraction: float weights
    V.requires_grad_(True)
    optimizer = torch.optim.Adam([V], lr=rate)
    for step in range(iterations):
        report(step, iterations)
        h = (V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        w_hat = grid.clamp(below + h) * grid.scale
        loss = error(w_hat - weight, hessian).sum() / cost
        progress = (step / iterations - WARM_UP) / (1 - WARM_UP)
        if progress > 0:
            beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - progress)
            loss = loss + pull * (1 - (2 * h - 1).abs().pow(beta)).mean() * len(hessian)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return V.detach()
