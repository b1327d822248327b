"""Float weights to codes; one file a paper.

A rounder is a function `find(problem) -> (codes, scale)`:

    codes: [N, K] float32 holding integers in [-qmax, qmax]
    scale: [N, G] float32, G = 1 without groups
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.numerics import EPS, expand_groups, in_groups, quantize
from qtk.scheme import Format

CLIPS = torch.linspace(1.0, 0.4, 31).tolist()  # shares of the whole range that are tried


@dataclass(frozen=True)
class Problem:
    """One linear to be rounded.

    Attributes:
        weight: [N, K] float32, after the transform.
        fmt: the grid.
        inputs: [T, K] float32, the transformed and quantized rows that the linear will read;
            None without data.
        wanted: [T, N] float32, what the float model computes for those rows, without the bias;
            None without data.
    """

    weight: Tensor
    fmt: Format
    inputs: Tensor | None = None
    wanted: Tensor | None = None


Rounded = tuple[Tensor, Tensor]


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


def to_nearest(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Rounded:
    """Rounded to nearest, on the scales of `best_scale`. Not called as its file: importing that
    would put the module in the function's place."""
    scale = best_scale(weight, fmt, importance)
    full = expand_groups(scale, weight.shape[1], fmt.group_size)
    return quantize(weight, full, 0, fmt), scale
