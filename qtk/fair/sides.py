"""Decisions of the float model, the quantized one and perhaps a second, on the same rows."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qtk import intervals
from qtk.fair.groups import METRICS, cells
from qtk.fair.result import Churn, Disparity
from qtk.intervals import Figure

Array = NDArray[np.floating]


class Sides:
    """What the models decided.

    Args:
        decisions: class numbers [N] of each model: float, quantized, second.
        favourable: the class that is good to get.
        seed: of bootstraps.
    """

    def __init__(self, decisions: Sequence[Tensor], favourable: int, seed: int) -> None:
        self.decisions, self.favourable, self.seed = decisions, favourable, seed
        self.good = [each == favourable for each in decisions]

    def accuracy(self, labels: Tensor) -> Figure:
        return self.share("", "accuracy", [each == labels for each in self.decisions])

    def wrong_p(self, labels: Tensor) -> float:
        """Of McNemar's exact test that as many rows became wrong as right."""
        right, right_q = (each == labels for each in self.decisions[:2])
        return intervals.mcnemar(int((right & ~right_q).sum()), int((~right & right_q).sum()))

    def share(self, attribute: str, name: str, sides: Sequence[Tensor]) -> Figure:
        """The share of yes among yes-or-no values [N] of each model."""
        values = [float(side.double().mean()) for side in sides]

        def difference(counts: Array) -> Array:  # [..., float, quantized]
            yes, yes_q = counts[..., 1, :].sum(-1), counts[..., :, 1].sum(-1)
            return (yes_q - yes) / counts.sum((-1, -2))

        low, high = intervals.bootstrap(cells(*sides[:2]), difference, self.seed)
        return Figure(name, values[0], values[1], low, high, floor_of(values), attribute)

    def metric(self, attribute: str, name: str, group: Tensor, labels: Tensor | None) -> Figure:
        """A group metric; without labels all rows count as of the unfavourable one."""
        formula = METRICS[name]
        good = group * 0 if labels is None else labels == self.favourable
        values = [float(formula(cells(group, good, own).astype(float))) for own in self.good]

        def difference(counts: Array) -> Array:  # [..., group, label, float, quantized]
            return formula(counts.sum(-2)) - formula(counts.sum(-1))

        counts = cells(group, good, *self.good[:2])
        low, high = intervals.bootstrap(counts, difference, self.seed)
        return Figure(name, values[0], values[1], low, high, floor_of(values), attribute)

    def churn(self, attribute: str, group: str, where: str, own: Tensor) -> Churn:
        """Of the rows for which `own` [N] is true."""
        first, quantized, *second = (each[own] for each in self.decisions)
        good, good_q = (each[own] for each in self.good[:2])
        samples, changed = len(first), int((first != quantized).sum())
        gained, lost = int((good_q & ~good).sum()), int((good & ~good_q).sum())
        return Churn(
            attribute, group, where, samples, changed, gained, lost,
            *intervals.wilson(changed, samples), intervals.mcnemar(gained, lost),
            *(int((each != other).sum()) for each in (first, quantized) for other in second),
        )  # fmt: skip

    def disparity(self, attribute: str, where: str, group: Tensor) -> Disparity:
        """Of groups [N]."""
        counts = cells(group, self.decisions[0] != self.decisions[1])
        (_, hits), (_, others) = counts.tolist()
        sizes = counts.sum(1).tolist()
        return Disparity(attribute, where, *intervals.ratio(hits, sizes[0], others, sizes[1]))


def floor_of(values: Sequence[float]) -> float | None:
    """How far the second quantized model is from the first, where there is one."""
    if len(values) < 3:
        return None
    return abs(values[2] - values[1]) if math.isfinite(values[2] - values[1]) else math.inf
