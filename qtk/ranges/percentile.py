"""All but the outermost share of the values, on both sides."""

import torch
from torch import Tensor

from qtk.ranges import Range
from qtk.scheme import Format

KEPT = 0.999  # share of the values inside the range


def find(batches: list[Tensor], fmt: Format, importance: Tensor) -> Range:
    values = torch.cat([x.flatten() for x in batches])
    outside = max(int(len(values) * (1 - KEPT) / 2), 1)
    lo = values.kthvalue(outside).values
    hi = values.kthvalue(len(values) - outside + 1).values
    return lo, hi
