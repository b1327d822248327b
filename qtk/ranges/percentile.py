"""All but the outermost share of the values.

Static grids lose half of that share on either side. Of a token's magnitudes the quantile is taken,
between the two largest where the share is less than one value, and divided by the largest; the clip
is the mean over the tokens.
"""

import torch
from torch import Tensor

from qtk.numerics import EPS
from qtk.ranges import Question, Range
from qtk.ranges._search import sampled

TOKENS = True
SMALLEST = 0.01  # clip, where nearly every value is zero


def find(question: Question, *, kept: float = 0.999) -> Range:
    """`kept` is the share of the values inside the range."""
    if question.per_token:
        return Range(clip=_share(sampled(question), kept))
    values = torch.cat([x.flatten() for x in question.batches])
    outside = max(int(len(values) * (1 - kept) / 2), 1)
    lo = values.kthvalue(outside).values
    hi = values.kthvalue(len(values) - outside + 1).values
    return Range(lo, hi)


def _share(x: Tensor, kept: float) -> float:
    """Mean over the rows of [M, K] of a quantile of the magnitudes over the largest."""
    sizes = x.abs().sort(-1).values
    place = kept * (x.shape[1] - 1)
    below, above = sizes[:, int(place)], sizes[:, min(int(place) + 1, x.shape[1] - 1)]
    quantile = torch.lerp(below, above, place - int(place))
    largest = sizes[:, -1]
    moving = largest > EPS  # a token of zeros has no quantile
    share = (quantile[moving] / largest[moving]).mean() if moving.any() else largest.new_ones(())
    return float(share.clamp(min=SMALLEST))
