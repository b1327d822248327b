"""The range with the smallest weighted squared error, both ends searched in turn."""

import torch
from torch import Tensor

from qtk import ranks
from qtk.numerics import fake_quantize, fake_quantize_token, scale_and_zero_point
from qtk.ranges import Question, Range

TOGETHER = [0.9**k for k in range(30)]  # shares of the full range, both ends at once
APART = [0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5]  # then one end after the other
CLIPS = [1.0 - 0.04 * k for k in range(14)]  # shares of a token's maximum, for dynamic grids
ROWS = 1024  # a search over all rows finds the same range


def smallest_error(question: Question, importance: Tensor) -> Range:
    """argmin over ranges of sum_tj importance_j (x_tj - x_hat_tj)^2."""
    if question.per_token:
        return _clip(question, importance)
    fmt, x = question.fmt, torch.cat(question.batches)
    full_lo, full_hi = x.min(), x.max()
    # rows with the extremes must stay in the sample, or clipping them would look free
    order = x.abs().amax(1).argsort(descending=True)
    x = torch.cat([x[order[: ROWS // 8]], x[order[ROWS // 8 :: max(len(x) // ROWS, 1)]]])

    def error(lo: Tensor, hi: Tensor) -> float:
        scale, zero_point = scale_and_zero_point(lo, hi, fmt)
        squares = (fake_quantize(x, scale, zero_point, fmt) - x).square().sum(0)
        return float(squares @ importance)

    share = ranks.least(TOGETHER, lambda c: error(full_lo * c, full_hi * c))
    low, high = full_lo * share, full_hi * share
    highs = [torch.minimum(high * c, full_hi) for c in APART]
    high = ranks.least(highs, lambda end: error(low, end))
    lows = [torch.maximum(low * c, full_lo) for c in APART]
    low = ranks.least(lows, lambda end: error(end, high))
    return Range(low, high)


def _clip(question: Question, importance: Tensor) -> Range:
    x = sampled(question)

    def error(clip: float) -> float:
        got = fake_quantize_token(x, question.fmt.bits, clip)
        return float((got - x).square().sum(0) @ importance)

    return Range(clip=ranks.least(CLIPS, error))


def sampled(question: Question) -> Tensor:
    """[M, K], about ROWS rows of all batches."""
    x = torch.cat(question.batches)
    return x[:: max(len(x) // ROWS, 1)]
