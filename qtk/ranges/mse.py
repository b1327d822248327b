"""The range with the smallest squared error, both ends searched in turn."""

import torch
from torch import Tensor

from qtk.numerics import fake_quantize, scale_and_zero_point
from qtk.ranges import Range
from qtk.scheme import Format

SHRINK = torch.linspace(1.0, 0.1, 46).tolist()
ROUNDS = 2  # each round searches one end with the other fixed, then the other
ROWS = 2048  # a search over all rows finds the same range


def find(batches: list[Tensor], fmt: Format, importance: Tensor) -> Range:
    return search(batches, fmt, torch.ones_like(importance))


def search(batches: list[Tensor], fmt: Format, importance: Tensor) -> Range:
    """argmin over (lo, hi) of sum_tj importance_j (x_tj - x_hat_tj)^2."""
    x = torch.cat(batches)
    full_lo, full_hi = x.min(), x.max()
    # rows with the extremes must stay in the sample, or clipping them would look free
    order = x.abs().amax(1).argsort(descending=True)
    x = torch.cat([x[order[: ROWS // 8]], x[order[ROWS // 8 :: max(len(x) // ROWS, 1)]]])

    def error(lo: Tensor, hi: Tensor) -> float:
        scale, zero_point = scale_and_zero_point(lo, hi, fmt)
        squares = (fake_quantize(x, scale, zero_point, fmt) - x).square().sum(0)
        return float(squares @ importance)

    lo, hi = full_lo, full_hi
    for _ in range(ROUNDS):
        hi = min((full_hi * c for c in SHRINK), key=lambda end: error(lo, end))
        lo = min((full_lo * c for c in SHRINK), key=lambda end: error(end, hi))
    return lo, hi
