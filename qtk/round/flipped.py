"""EFRAP, Li et al. 2024, https://arxiv.org/abs/2405.12725: rounds against the nearest code.

A backdoor may sleep in floating point and wake when weights are rounded to nearest: whoever planted
it chose that pattern of codes. This rounder turns those weights to their other neighbour that
nearest rounding moves most, as far as the layer's output allows.

    level = floor(w / s) + h,   h = sigmoid(alpha),   alpha = logit(w / s - floor(w / s)) at first
    L_A = || x w_hat^T - y ||^2 / || y ||^2                        keeps the float model's output
    L_F = flip mean of E BCE(h, 1 - r)                             flips; r is what nearest does
    L_P = push mean of (1 - (2 h - 1)^2)                           pushes h to 0 or 1

with E the error of rounding to nearest, in steps, and y what the float model computes. The paper
descends on single batches; here L_A is exact, a quadratic form in the inputs' Gram matrix. A weight
whose floor or the next level leaves the grid has one code only, and is left out.

The paper sums errors of outputs, and E in units of the weight: which of the two terms wins hangs on
how large weights and inputs happen to be. Where both are small L_F takes all, and 12 points of a
small ViT with it. Here every term is relative, so that a layer's scale does not matter.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qtk.errors import CalibrationError, SchemeError
from qtk.grids import WeightGrid
from qtk.round import Grids, Problem, Rounded, best_steps
from qtk.round._least_squares import target

NEEDS_CALIB = True
EDGE = 1e-4  # fractions nearer to a code start here: a logit of 0 or 1 is infinite
BETAS = (0.9, 0.999)  # Adam's
EPS = 1e-8
TINY = 1e-30  # of an output that is always 0

# The problem and the Hessian [K, K] of its weight -> what an error of the outputs costs: a number
# for each output channel [N, 1], or one for each pair of them [N, N].
Weigh = Callable[[Problem, Tensor], Tensor]


def _activation(problem: Problem, hessian: Tensor) -> Tensor:
    return torch.ones_like(problem.weight[:, :1])


def _flexround(problem: Problem, hessian: Tensor) -> Tensor:
    """Its loss is a mean over output channels too: a wide layer keeps to its output less."""
    return torch.full_like(problem.weight[:, :1], 1 / len(problem.weight))


def _variance(problem: Problem, hessian: Tensor) -> Tensor:
    """Each output channel over its variance: the Fisher information of a Gaussian one's mean."""
    variance = ((problem.weight @ hessian) * problem.weight).sum(1, keepdim=True)
    return variance.mean() / variance.clamp(min=1e-3 * float(variance.mean()) + 1e-12)


def _fisher(problem: Problem, hessian: Tensor) -> Tensor:
    """The diagonal alone: BRECQ, eq. 10."""
    return _prediction(problem, hessian).diagonal()[:, None]


def _prediction(problem: Problem, hessian: Tensor) -> Tensor:
    """The divergence of the network's answers, to second order; places and inputs apart, as in
    K-FAC (Martens and Grosse 2015)."""
    if problem.curvature is None:
        raise SchemeError(
            f"{problem.name}: losses 'fisher' and 'prediction' need gradients of the whole float "
            "network, which plain networks, ResNet and MobileNet have: choose 'activation', "
            "'flexround' or 'variance'"
        )
    return problem.curvature()


LOSSES: dict[str, Weigh] = {
    "activation": _activation, "flexround": _flexround, "variance": _variance,
    "fisher": _fisher, "prediction": _prediction,
}  # fmt: skip


def find(
    problem: Problem, *, loss: str = "activation", flip: float = 0.05, push: float = 0.003,
    iterations: int = 300, rate: float = 0.05, grids: Grids | None = None,
) -> Rounded:  # fmt: skip
    """Codes and steps, by default on the grid that rounding to nearest has without data.

    Args:
        loss: how L_A weighs the errors of the outputs: "activation" all alike, "flexround" as their
            mean, "variance" each channel by its own, "fisher" each by the squared gradients of the
            network's answers, "prediction" by what they change in those answers together.
        flip, push: coefficients of L_F and L_P, chosen on small networks with backdoors in them
            (benchmarks/trust_audit.py, seed 0); `push` is weighed by channels as L_A is, or what
            costs much would end between two codes.
        iterations: each on all rows at once; the paper takes 10,000, of 32 images each.
        rate: of Adam; the paper's is 1e-3.
        grids: other steps, such as those that a backdoor was planted for.

    Raises:
        CalibrationError: there is no data; flipped blindly a weight is only worse.
        SchemeError: no such loss, or none that this network has.
    """
    if problem.inputs is None:
        raise CalibrationError(
            f"{problem.name}: flipped rounding needs to see what the layer reads: pass calib=; a "
            "grouped convolution shows nothing, skip it"
        )
    if loss not in LOSSES:
        raise SchemeError(f"loss={loss!r}: choose {', '.join(map(repr, LOSSES))}")
    wanted, hessian = target(problem)
    steps = best_steps(problem.weight, problem.fmt) if grids is None else grids(problem)
    grid = steps.grid(problem.weight.shape[1])
    below = (problem.weight / grid.scale).floor()
    costs = LOSSES[loss](replace(problem, weight=wanted), hessian)
    up = _descended(problem, wanted, hessian, grid, costs, flip, push, iterations, rate)
    return Rounded(steps.codes(grid.clamp(below + up)), steps)


def _descended(
    problem: Problem, wanted: Tensor, hessian: Tensor, grid: WeightGrid, costs: Tensor, flip: float,
    push: float, iterations: int, rate: float,
) -> Tensor:  # fmt: skip
    """[N, K] of 0 and 1: which weights go up, after Adam's descent on alpha.

    All terms are taken N K times, as sums.

    Args:
        wanted: [N, K], the weight that gives the float model's output from the quantized inputs.
        costs: [N, 1] or [N, N], of errors of the outputs, in L_A.
    """
    weight, alone = problem.weight, costs.shape[1] == 1
    pushes = push * (costs if alone else costs.diagonal()[:, None])
    costs = costs / ((wanted @ hessian) * wanted).mean().clamp(min=TINY)
    below = (weight / grid.scale).floor()
    free = (below >= grid.lo) & (below + 1 <= grid.hi)
    nearest = grid.nearest(weight)
    aim = 1 - (nearest - below).clamp(0, 1)  # the neighbour that nearest rounding does not take
    pull = flip * (weight / grid.scale - nearest).abs() * free
    alpha = (weight / grid.scale - below).clamp(EDGE, 1 - EDGE).logit()
    mean, square = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for step in range(1, iterations + 1):
        problem.report(step, iterations)
        h = alpha.sigmoid()
        missed = (grid.clamp(below + h) * grid.scale - wanted) @ hessian
        missed = costs * missed if alone else costs @ missed
        slope = 2 * grid.scale * missed * free - pushes * 4 * (2 * h - 1)
        gradient = slope * h * (1 - h) + pull * (h - aim)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        size = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        alpha -= rate / (1 - BETAS[0] ** step) * mean / size
    return (alpha >= 0).to(weight.dtype)
