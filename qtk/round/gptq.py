"""GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1.

    H = X^T X / T + damp * mean(diag) * I,    U = upper Cholesky factor of H^-1
    for each column i, largest diag(H) first:
        q_i = round(w_i);  e = (w_i - q_i) / U_ii;  w_j -= e U_ij  for the columns j not yet done

X is what the quantized layer will read. Where the float model's output is known, the weight that
is rounded is the one that reproduces it from X (least squares with the same damping), so that the
errors of earlier layers are made good as well: asymmetric calibration, GPTAQ, Li et al. 2025,
https://arxiv.org/abs/2504.02692. X and the outputs are centred, as the bias takes the means.
"""

import torch
from torch import Tensor

from qtk.numerics import expand_groups, quantize
from qtk.round import Problem, Rounded, best_scale
from qtk.scheme import Format

DAMP = 0.01  # of the mean diagonal
# Ridge of the fit, of the mean diagonal: a few thousand rows would fit a weight to their own noise.
# W4A4 MiniLM embeddings, 256 sentences: 0.01 gives cosine .930, 0.5 .955, 2 .958, 4 and 10 .961.
FIT_DAMP = 5.0
BLOCK = 128  # columns whose errors are carried on together


def find(problem: Problem) -> Rounded:
    """Codes and scale; nearest rounding where there is no data."""
    fmt, weight = problem.fmt, problem.weight
    if problem.inputs is None:
        scale = best_scale(weight, fmt)
        return quantize(
            weight, expand_groups(scale, weight.shape[1], fmt.group_size), 0, fmt
        ), scale
    hessian = hessian_of(problem.inputs)
    if problem.wanted is not None:
        weight = fitted(weight, problem.inputs, problem.wanted, hessian)
    scale = best_scale(weight, fmt, hessian.diag())
    full = expand_groups(scale, weight.shape[1], fmt.group_size).expand_as(weight)
    codes = compensated(weight, full, hessian, fmt)
    nearest = quantize(weight, full, 0, fmt)
    worse = error(codes * full - weight, hessian) > error(nearest * full - weight, hessian)
    return torch.where(worse[:, None], nearest, codes), scale


def hessian_of(inputs: Tensor) -> Tensor:
    """[T, K] -> [K, K] float32, centred and damped; a channel that never moves gets 1."""
    x = (inputs - inputs.mean(0)).double()
    H = x.T @ x / max(len(x), 1)
    diag = H.diag()
    H = H + DAMP * diag.mean().clamp(min=1e-12) * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return H.float()


def fitted(weight: Tensor, inputs: Tensor, wanted: Tensor, hessian: Tensor) -> Tensor:
    """[N, K]: near `weight`, and giving `wanted` [T, N] from `inputs` [T, K] as well as it can."""
    x = inputs - inputs.mean(0)
    miss = wanted - wanted.mean(0) - x @ weight.T  # [T, N]
    H = hessian.double()
    H = H + FIT_DAMP * H.diag().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return weight + torch.linalg.solve(H, (x.T @ miss / len(x)).double()).T.float()


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


def error(delta: Tensor, hessian: Tensor) -> Tensor:
    """[N]: each row's share of the output error, delta H delta^T."""
    return ((delta @ hessian) * delta).sum(1)
