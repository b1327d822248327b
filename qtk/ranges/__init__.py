"""Where a static activation grid begins and ends; one file a rule.

A rule is a function `find(batches, fmt, importance) -> (lo, hi)`, two scalars:

    batches: list of [M, K] float32, the transformed input of one site, a tensor a batch
    fmt: the grid
    importance: [K] float32, what an error of each channel costs at the output (sum of W'^2)
"""

from torch import Tensor

Range = tuple[Tensor, Tensor]
