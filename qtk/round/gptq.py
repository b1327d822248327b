"""GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1.

    H = X^T X / T + damp * mean(diag) * I,    U = upper Cholesky factor of H^-1
    for each column i, largest diag(H) first:
        q_i = round(w_i);  e = (w_i - q_i) / U_ii;  w_j -= e U_ij  for the columns j not yet done

Groups are static: their grids are found before any column is rounded. The weight that is rounded
is fitted to the float model's output where that is known (qtk/round/_least_squares.py). Beyond the
paper, coordinate descent then takes off what is left to take off (qtk/round/_coordinates.py).
"""

from functools import partial

import torch
from torch import Tensor

from qtk.grids import WeightGrid
from qtk.round import Problem, Rounded, best_steps
from qtk.round._coordinates import ROUNDS, SWEEPS, descended
from qtk.round._least_squares import DAMP, FIT_DAMP, better, target

NEEDS_DATA = True
ROWS_APART = True
BLOCK = 128  # columns whose errors are carried on together


def find(
    problem: Problem, *, damp: float = DAMP, fit_damp: float = FIT_DAMP, rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
) -> Rounded:  # fmt: skip
    """Codes and steps; nearest rounding where a row is better so.

    Args:
        damp: of the Hessian, a share of its mean diagonal.
        fit_damp: ridge of the fit to the float output, likewise; 1e12 is no fit.
        rounds, sweeps: of the coordinate descent; 0 rounds are none.
    """
    weight, hessian = target(problem, damp, fit_damp)
    steps = best_steps(weight, problem.fmt, hessian.diag())
    grid = steps.grid(weight.shape[1])
    levels = compensated(weight, grid, hessian)
    levels = better(levels, grid.nearest(weight), grid.scale, weight, hessian)
    levels, steps = descended(levels, steps, weight, hessian, rounds, sweeps)
    return Rounded(steps.codes(levels), steps)


def compensated(weight: Tensor, grid: WeightGrid, hessian: Tensor) -> Tensor:
    """Levels [N, K] of the blocked algorithm; the grid is fixed beforehand."""
    order = hessian.diag().argsort(descending=True)
    U = hessian[order][:, order].double()  # one [K, K] float64 at a time: K may be 8192
    for step in (
        torch.linalg.cholesky,
        torch.cholesky_inverse,
        partial(torch.linalg.cholesky, upper=True),
    ):
        U = step(U)
    U = U.float()
    w, grid = weight[:, order], grid.columns(order)
    levels = torch.empty_like(w)
    K = w.shape[1]
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        errors = torch.zeros_like(w[:, start:stop])
        for i in range(start, stop):
            column = grid.columns(i)
            levels[:, i] = column.nearest(w[:, i])
            e = (w[:, i] - levels[:, i] * column.scale) / U[i, i]
            w[:, i:stop] -= e[:, None] * U[i, i:stop]
            errors[:, i - start] = e
        w[:, stop:] -= errors @ U[start:stop, stop:]
    return levels[:, order.argsort()]
