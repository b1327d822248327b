"""GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1.

    H = X^T X / T + damp * mean(diag) * I,    U = upper Cholesky factor of H^-1
    for each column i, largest diag(H) first:
        q_i = round(w_i);  e = (w_i - q_i) / U_ii;  w_j -= e U_ij  for the columns j not yet done

Groups are static: their scales are found before any column is rounded. The weight that is rounded
is fitted to the float model's output where that is known (qtk/round/_least_squares.py). Beyond the
paper, coordinate descent then takes off what is left to take off (qtk/round/_coordinates.py).
"""

import torch
from torch import Tensor

from qtk.numerics import expand_groups, quantize
from qtk.round import Problem, Rounded, best_scale, to_nearest
from qtk.round._coordinates import descended
from qtk.round._least_squares import better, target
from qtk.scheme import Format

BLOCK = 128  # columns whose errors are carried on together


def find(problem: Problem) -> Rounded:
    """Codes and scale; nearest rounding where there is no data, or where a row is better so."""
    if problem.inputs is None:
        return to_nearest(problem.weight, problem.fmt)
    fmt = problem.fmt
    weight, hessian = target(problem)
    scale = best_scale(weight, fmt, hessian.diag())
    full = expand_groups(scale, weight.shape[1], fmt.group_size).expand_as(weight)
    codes = descended(compensated(weight, full, hessian, fmt), full, weight, hessian, fmt)
    return better(codes, quantize(weight, full, 0, fmt), full, weight, hessian), scale


def compensated(weight: Tensor, scale: Tensor, hessian: Tensor, fmt: Format) -> Tensor:
    """Codes [N, K] of the blocked algorithm; `scale` [N, K] is fixed beforehand."""
    order = hessian.diag().argsort(descending=True)
    H = hessian[order][:, order].double()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    w, step = weight[:, order].clone(), scale[:, order]
    codes = torch.empty_like(w)
    K = w.shape[1]
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        errors = torch.zeros_like(w[:, start:stop])
        for i in range(start, stop):
            codes[:, i] = quantize(w[:, i], step[:, i], 0, fmt)
            e = (w[:, i] - codes[:, i] * step[:, i]) / U[i, i]
            w[:, i:stop] -= e[:, None] * U[i, i:stop]
            errors[:, i - start] = e
        w[:, stop:] -= errors @ U[start:stop, stop:]
    return codes[:, order.argsort()]
