"""What rounding one layer is measured by: the squared error of its output, from the inputs' Gram.

    || (w_hat - w) X^T ||^2 = T (w_hat - w) H (w_hat - w)^T,      H = X^T X / T

X is what the quantized layer will read, centred, as the bias takes the means.
"""

import torch
from torch import Tensor

from qtk.round import Problem

DAMP = 0.01  # of the mean diagonal
# Ridge of the fit, of the mean diagonal: a few thousand rows would fit a weight to their own noise.
# W4A4 MiniLM embeddings, 256 sentences: 0.01 gives cosine .930, 0.5 .955, 2 .958, 4 and 10 .961.
FIT_DAMP = 5.0


def target(problem: Problem) -> tuple[Tensor, Tensor]:
    """The weight [N, K] that is to be rounded and the Hessian [K, K] of its error.

    Where the float model's output is known, it is the weight that reproduces that output from the
    quantized inputs, so that the errors of earlier layers are made good as well: asymmetric
    calibration, GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692.
    """
    assert problem.inputs is not None
    hessian = hessian_of(problem.inputs)
    if problem.wanted is None:
        return problem.weight, hessian
    return fitted(problem.weight, problem.inputs, problem.wanted, hessian), hessian


def hessian_of(inputs: Tensor) -> Tensor:
    """[T, K] -> [K, K] float32, centred, and damped for channels that never move."""
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


def error(delta: Tensor, hessian: Tensor) -> Tensor:
    """[N]: each row's share of the output error, delta H delta^T."""
    return ((delta @ hessian) * delta).sum(1)


def better(levels: Tensor, other: Tensor, scale: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """Row by row the levels with the smaller error; `scale` broadcasts against them."""
    mine, theirs = (error(q * scale - weight, hessian) for q in (levels, other))
    return torch.where((theirs < mine)[:, None], other, levels)
