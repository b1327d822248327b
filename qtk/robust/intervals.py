"""Intervals of shares and of their differences, and the exact test of two models on one sample."""

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
Z = 1.959963984540054  # of 95 %


def wilson(hits: int, samples: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (0, 1) of no samples."""
    if not samples:
        return 0.0, 1.0
    share, room = hits / samples, Z * Z / samples
    centre = (share + room / 2) / (1 + room)
    half = Z / (1 + room) * math.sqrt(share * (1 - share) / samples + room / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """Two models on the same samples.

    Attributes:
        difference: of the shares that are right, second less first; `low` to `high` of 1,000 paired
            bootstrap draws, 95 %.
        lost, gained: shares that only the first, and only the second, has right.
        p: McNemar's exact test that both are as likely.
    """

    difference: float
    low: float
    high: float
    lost: float
    gained: float
    p: float


def paired(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Paired:
    """Compares [N] booleans with [N] booleans.

    A bootstrap draw of pairs is a draw of how many were lost, gained and neither: multinomial.
    """
    n = len(first)
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    draws = np.random.default_rng(seed).multinomial(
        n, [lost / n, gained / n, 1 - (lost + gained) / n], DRAWS
    )
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, [0.025, 0.975])
    return Paired((gained - lost) / n, float(low), float(high), lost / n, gained / n,
                  mcnemar(lost, gained))  # fmt: skip


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided binomial p of the pairs that differ, at one half."""
    n, few = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    return min(1.0, 2 * tail)
