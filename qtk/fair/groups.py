"""Group metrics, of counts: group 0 minus group 1, or group 0 over group 1.

Counts are [..., 2 groups, 2 labels, 2 decisions]; 1 is the favourable label. Rates: P(1) is the
share of favourable decisions, TPR and FPR that among rows of label 1 and 0.

SPD = P0(1) - P1(1);  DI = P0(1) / P1(1);  EOD = TPR0 - TPR1;
AOD = ((TPR0 - TPR1) + (FPR0 - FPR1)) / 2;  |AOD| = (|TPR0 - TPR1| + |FPR0 - FPR1|) / 2,
the mean of absolute values, not the absolute mean.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating]


def rate(counts: Array) -> Array:
    """[..., 2 groups, 2 decisions] -> [..., 2 groups], the favourable share; nan of nobody."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return counts[..., 1] / counts.sum(-1)


def spd(counts: Array) -> Array:
    return _minus(rate(counts.sum(-2)))


def di(counts: Array) -> Array:
    found = rate(counts.sum(-2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return found[..., 0] / found[..., 1]


def eod(counts: Array) -> Array:
    return _minus(rate(counts[..., 1, :]))


def aod(counts: Array) -> Array:
    return (_minus(rate(counts[..., 1, :])) + _minus(rate(counts[..., 0, :]))) / 2


def absolute_aod(counts: Array) -> Array:
    return (abs(_minus(rate(counts[..., 1, :]))) + abs(_minus(rate(counts[..., 0, :])))) / 2


METRICS: dict[str, Callable[[Array], Array]] = {
    "SPD": spd, "DI": di, "EOD": eod, "AOD": aod, "|AOD|": absolute_aod,
}  # fmt: skip
UNLABELLED = ("SPD", "DI")


def cells(*sides: Tensor) -> NDArray[np.int64]:
    """How often each combination of k yes-or-no values [N] occurs: an array of 2 x ... x 2."""
    index = np.zeros(len(sides[0]), dtype=np.int64)
    for side in sides:
        index = 2 * index + side.long().numpy()
    return np.bincount(index, minlength=2 ** len(sides)).reshape((2,) * len(sides))


def _minus(pair: Array) -> Array:
    return pair[..., 0] - pair[..., 1]
