"""Coordinate descent: each code, then each scale, is set to the best while the rest stays.

    error(q, s) = (q s - w) H (q s - w)^T,      g = (q s - w) H
    q_i <- round(q_i - g_i / (H_ii s_i))
    s_a <- s_a - (g_a . q_a) / (q_a H_aa q_a^T)     for the columns a of a group

q are levels, codes less their zero point. No step raises the error: what comes out is never worse
than what goes in. Columns go by as in GPTQ, the largest H_ii first, groups from left to right.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qtk.grids import Steps, WeightGrid
from qtk.numerics import EPS

BLOCK = 64  # columns whose changes are carried on together
SWEEPS = 2  # over the codes; more lower the error on the calibration data alone
ROUNDS = 3  # of sweeps, each but the first behind a fit of the scales


def descended(
    levels: Tensor, steps: Steps, weight: Tensor, hessian: Tensor
) -> tuple[Tensor, Steps]:
    """Levels [N, K] and their steps after all rounds; `hessian` is [K, K]."""
    K = weight.shape[1]
    for i in range(ROUNDS):
        if i > 0:
            steps = rescaled(levels, steps, weight, hessian)
        levels = swept(levels, steps.grid(K), weight, hessian)
    return levels, steps


def swept(levels: Tensor, grid: WeightGrid, weight: Tensor, hessian: Tensor) -> Tensor:
    """Levels [N, K] after SWEEPS passes."""
    order = hessian.diag().argsort(descending=True)
    H, grid = hessian[order][:, order], grid.columns(order)
    q = levels[:, order]
    g = (q * grid.scale - weight[:, order]) @ H
    for _ in range(SWEEPS):
        for start in range(0, len(H), BLOCK):
            part = slice(start, start + BLOCK)
            change = _pass(q[:, part], g[:, part].clone(), grid.columns(part), H[part, part])
            g += change @ H[part]
    return q[:, order.argsort()]


def _pass(q: Tensor, g: Tensor, grid: WeightGrid, H: Tensor) -> Tensor:
    """Sets one block's levels `q` in place; returns by how much the weights changed."""
    change = torch.zeros_like(q)
    for i in range(len(H)):
        column = grid.columns(i)
        best = column.clamp((q[:, i] - g[:, i] / (H[i, i] * column.scale)).round())
        change[:, i] = (best - q[:, i]) * column.scale
        g += change[:, i, None] * H[i]
        q[:, i] = best
    return change


def rescaled(levels: Tensor, steps: Steps, weight: Tensor, hessian: Tensor) -> Steps:
    """The steps with every scale at its best in turn."""
    K, scale = weight.shape[1], steps.scale.clone()
    size = steps.fmt.group_size or max(K, 1)
    g = (levels * steps.grid(K).scale - weight) @ hessian
    for a in range(scale.shape[1]):
        part = slice(a * size, (a + 1) * size)
        q = levels[:, part]
        curvature = ((q @ hessian[part, part]) * q).sum(1)
        change = -(g[:, part] * q).sum(1) / curvature
        stays = (curvature <= 0) | ((scale[:, a] + change).abs() < EPS)
        change = torch.where(stays, 0, change)
        scale[:, a] += change
        g += (change[:, None] * q) @ hessian[part]
    return replace(steps, scale=scale)
