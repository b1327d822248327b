"""The grid of each row or group of a weight with the smallest error of rounding to nearest."""

import torch
from torch import Tensor

from qtk.grids import Steps
from qtk.numerics import EPS, in_groups
from qtk.scheme import Format

CLIPS = torch.linspace(1.0, 0.4, 31).tolist()  # shares of the whole range that are tried


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
