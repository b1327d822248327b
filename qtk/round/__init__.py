"""Float weights to codes; one file a paper.

A rounder is a function `find(problem) -> (codes, steps)`:

    codes: [N, K] float32 holding integers in [qmin, qmax]
    steps: the scale and zero point of each row or group

Inside, it works with levels, which are codes less their zero point: w_hat = level * scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.grids import Steps
from qtk.numerics import EPS, in_groups
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


Rounded = tuple[Tensor, Steps]


def best_steps(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Steps:
    """Each row's (or group's) grid with the smallest weighted error of rounding to nearest.

    Args:
        weight: [N, K].
        importance: [K], or None for all ones.
    """
    w = in_groups(weight.float(), fmt.group_size)  # [N, G, group]
    h = torch.ones_like(weight[:1]) if importance is None else importance[None].float()
    h = in_groups(h, fmt.group_size)  # [1, G, group]
    best = torch.full_like(w[..., 0], torch.inf)
    scale, offset = torch.ones_like(best), torch.zeros_like(best)
    for clip in CLIPS:
        step, zero = _covering(w, clip, fmt)
        lo, hi = ((q - zero)[..., None] for q in (fmt.qmin, fmt.qmax))
        w_hat = (w / step[..., None]).round().clamp(lo, hi) * step[..., None]
        error = ((w_hat - w).square() * h).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, step, scale)
        offset = torch.where(better, zero, offset)
    return Steps(fmt, scale, None if fmt.symmetric else offset)


def _covering(w: Tensor, clip: float, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, G] of the grids over `clip` of the range of w [N, G, group]."""
    lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if fmt.symmetric:
        scale = torch.maximum(-lo, hi).clamp(min=EPS) * clip / fmt.qmax
        # -qmax - 1 lies on the longer side
        return torch.where(hi > -lo, -scale, scale), torch.zeros_like(scale)
    scale = (hi - lo).clamp(min=EPS) * clip / (fmt.qmax - fmt.qmin)
    return scale, (fmt.qmin - lo * clip / scale).round().clamp(fmt.qmin, fmt.qmax)


def to_nearest(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Rounded:
    """Rounded to nearest, on the grids of `best_steps`. Not called as its file: importing that
    would put the module in the function's place."""
    steps = best_steps(weight, fmt, importance)
    return steps.codes(steps.grid(weight.shape[1]).nearest(weight)), steps
