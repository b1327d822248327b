"""The range with the smallest squared error, both ends searched in turn."""

import torch
from torch import Tensor

from qtk.numerics import fake_quantize, scale_and_zero_point
from qtk.ranges import Range
from qtk.scheme import Format

COARSE = torch.linspace(1.0, 0.1, 16).tolist()  # shares of the full range tried first
FINE = torch.linspace(-0.05, 0.05, 7).tolist()  # and then around the best of those
ROWS = 1024  # a search over all rows finds the same range


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

    low, high = 1.0, 1.0  # shares of the two ends
    for centred, steps in ((False, COARSE), (True, FINE)):
        tried = [high + step if centred else step for step in steps]
        high = min(tried, key=lambda share: error(full_lo * low, full_hi * share))
        tried = [low + step if centred else step for step in steps]
        low = min(tried, key=lambda share: error(full_lo * share, full_hi * high))
    return full_lo * low, full_hi * high
