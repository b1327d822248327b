"""How sure a figure is: intervals and exact tests for shares and for differences of shares."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # of 95 %
DRAWS = 1000
Counts = NDArray[np.int64]
Statistic = Callable[[NDArray[np.floating]], NDArray[np.floating]]


@dataclass(frozen=True)
class Figure:
    """One figure of float and quantized model, on the same samples.

    Attributes:
        name, attribute: "accuracy", "SROCC", "SPD", ...; the protected attribute it is about,
            "" for none.
        on_float, on_quantized: its values.
        difference: quantized less float; `low` and `high` are its 95 % interval, by a paired
            bootstrap over samples.
        floor: how far a second quantized model, with another calibration seed, is from this one;
            None where there is no second.
    """

    name: str
    on_float: float
    on_quantized: float
    low: float
    high: float
    floor: float | None = None
    attribute: str = ""

    @property
    def difference(self) -> float:
        return self.on_quantized - self.on_float

    @property
    def is_difference(self) -> bool:
        """More than the calibration seed alone makes, and more than chance in the samples."""
        above = self.floor is None or abs(self.difference) > self.floor
        return above and not self.low <= 0 <= self.high


def wilson(hits: int, samples: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927); (0, 1) where nothing was seen."""
    if not samples:
        return 0.0, 1.0
    share, n = hits / samples, samples
    center = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low = 0.0 if not hits else max(0.0, center - half)
    high = 1.0 if hits == samples else min(1.0, center + half)
    return low, high


def mcnemar(one_way: int, other_way: int) -> float:
    """Exact two-sided p of McNemar's test: are changes as frequent one way as the other?

    Of n = one_way + other_way changes, those of one way are binomial(n, 1/2) where rounding takes
    no side.
    """
    n, fewer = one_way + other_way, min(one_way, other_way)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)  # of integers: right for any n


def ratio(hits: int, samples: int, others: int, of: int) -> tuple[float, float, float]:
    """The ratio of two shares, and its 95 % interval on the logarithm (Walter, 1975).

    The interval adds half a row to each count, so that it is finite where nothing was hit, where
    resampling would give no width at all. nan for the ratio of nothing to nothing.
    """
    if not samples or not of:
        return math.nan, 0.0, math.inf
    share, other = hits / samples, others / of
    found = share / other if other else math.inf if share else math.nan
    center = math.log((hits + 0.5) / (samples + 0.5)) - math.log((others + 0.5) / (of + 0.5))
    variance = 1 / (hits + 0.5) - 1 / (samples + 0.5) + 1 / (others + 0.5) - 1 / (of + 0.5)
    half = Z * math.sqrt(variance)
    return found, math.exp(center - half), math.exp(center + half)


def bootstrap(counts: Counts, statistic: Statistic, seed: int) -> tuple[float, float]:
    """95 % interval of a statistic of cells, over 1,000 resamplings of what was counted.

    Rows of one cell are alike, so that drawing rows with replacement is drawing the cells' counts
    from one multinomial.

    Args:
        counts: of any shape; how many rows are in each cell.
        statistic: [draws, *shape] -> [draws].

    Returns:
        Percentiles 2.5 and 97.5 of the draws in which the statistic is defined; nan where none is.
    """
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(total, counts.reshape(-1) / max(total, 1), size=DRAWS)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(drawn.reshape(DRAWS, *counts.shape).astype(np.float64))
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low = np.quantile(values, 0.025, method="lower")  # no interpolation: a ratio may be infinite
    return float(low), float(np.quantile(values, 0.975, method="higher"))
