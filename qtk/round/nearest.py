"""Round to nearest, on the grid with the smallest error.

    scale = argmin over clip ratios of  sum_k h_k (w_k - w_hat_k)^2,   h_k = mean_t x_tk^2

(h = 1 without data). At 8 bits the whole range nearly always wins; at 4 and less it does not.
"""

import torch
from torch import Tensor

from qtk.numerics import EPS, expand_groups, in_groups, quantize
from qtk.round import Problem, Rounded
from qtk.scheme import Format

CLIPS = torch.linspace(1.0, 0.4, 31).tolist()


def find(problem: Problem) -> Rounded:
    importance = None if problem.inputs is None else problem.inputs.square().mean(0)
    scale = best_scale(problem.weight, problem.fmt, importance)
    K = problem.weight.shape[1]
    full = expand_groups(scale, K, problem.fmt.group_size)
    return quantize(problem.weight, full, 0, problem.fmt), scale


def best_scale(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """[N, G]: each row's (or group's) scale with the smallest weighted error.

    Args:
        weight: [N, K].
        fmt: a symmetric grid.
        importance: [K], or None for all ones.
    """
    w = in_groups(weight.float(), fmt.group_size)  # [N, G, group]
    h = torch.ones_like(weight[:1]) if importance is None else importance[None].float()
    h = in_groups(h, fmt.group_size)  # [1, G, group]
    full = w.abs().amax(-1).clamp(min=EPS) / fmt.qmax  # [N, G]
    best, scale = torch.full_like(full, torch.inf), full.clone()
    for clip in CLIPS:
        candidate = full * clip
        step = candidate[..., None]
        w_hat = (w / step).round().clamp(fmt.qmin, fmt.qmax) * step
        error = ((w_hat - w).square() * h).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    return scale
