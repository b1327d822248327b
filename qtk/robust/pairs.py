"""Two models on one sample: what was lost and gained, and how sure that is."""

from dataclasses import dataclass

import numpy as np

from qtk.intervals import DRAWS, mcnemar


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
