"""Float weights to codes; one file a paper.

A rounder is a function `find(problem) -> (codes, steps)`:

    codes: [N, K] float32 holding integers in [qmin, qmax]
    steps: the scale and zero point of each row or group

Inside, it works with levels, which are codes less their zero point: w_hat = level * scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.numerics import EPS, dequantize, expand_groups, in_groups
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


@dataclass(frozen=True)
class Grid:
    """What each weight may become: level * scale, for the integer levels from lo to hi.

    Attributes:
        scale, lo, hi: [N, K] float32, or some columns of that.
    """

    scale: Tensor
    lo: Tensor
    hi: Tensor

    def nearest(self, weight: Tensor) -> Tensor:
        """Levels of a weight of the same shape."""
        return self.clamp((weight / self.scale).round())

    def clamp(self, levels: Tensor) -> Tensor:
        return levels.clamp(self.lo, self.hi)

    def columns(self, which: Tensor | slice | int) -> "Grid":
        return Grid(self.scale[:, which], self.lo[:, which], self.hi[:, which])


@dataclass(frozen=True)
class Steps:
    """How the codes of one weight [N, K] are read: w_hat = (code - zero_point) * scale.

    Attributes:
        fmt: the grid.
        scale: [N, G] float32, G = 1 without groups. Without a zero point it has the sign that lays
            the longer side of the codes, down to -2**(bits - 1), on the longer side of the weights.
        zero_point: [N, G] float32 holding integers, or None for 0.
    """

    fmt: Format
    scale: Tensor
    zero_point: Tensor | None = None

    def grid(self, K: int) -> Grid:
        """For each weight."""
        offset = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        parts = (self.scale, self.fmt.qmin - offset, self.fmt.qmax - offset)
        return Grid(*(self._expanded(part, K).expand(-1, K) for part in parts))

    def codes(self, levels: Tensor) -> Tensor:
        """[N, K] levels -> codes."""
        if self.zero_point is None:
            return levels
        return levels + self._expanded(self.zero_point, levels.shape[1])

    def dequantize(self, codes: Tensor) -> Tensor:
        """[N, K] codes -> w_hat."""
        K = codes.shape[1]
        zero_point = 0 if self.zero_point is None else self._expanded(self.zero_point, K)
        return dequantize(codes, self._expanded(self.scale, K), zero_point)

    def _expanded(self, x: Tensor, K: int) -> Tensor:
        return expand_groups(x, K, self.fmt.group_size)


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
