"""What was chosen, quantized as it will be and measured on data that nothing has seen yet."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qtk.errors import SchemeError
from qtk.mixed_precision.allocate import SLACK, allocate, total
from qtk.mixed_precision.budget import Budget
from qtk.mixed_precision.costs import Costs
from qtk.mixed_precision.data import Data, full_rows
from qtk.mixed_precision.loss import TRIES, Judge, bound
from qtk.mixed_precision.result import Measured, Point
from qtk.mixed_precision.space import FLOATS, W8A8, Chosen, Matrix, name_of
from qtk.observe import Batch
from qtk.pipeline import run
from qtk.pipeline.progress import Bar
from qtk.pipeline.request import Request
from qtk.timing import race

CHECKS = TRIES - 1  # models that are quantized to find what keeps an accuracy budget
AIM = 0.9  # of an accuracy budget, for the next try
NEAR = 0.75  # of an accuracy budget, from which on no smaller model is looked for
ROUNDS = 15


@dataclass
class Lab:
    """Quantizes models and measures them."""

    source: Any
    data: Data
    costs: Costs
    options: Mapping[str, Any]
    backend: str
    batch_size: int
    bar: Bar

    def __post_init__(self) -> None:
        self.judge = Judge.of(self.source, self.data.held)

    @property
    def calib(self) -> list[Batch] | None:
        return self.data.seen if self.data.given else None

    def measured(self, point: Point, metric: str | None = None) -> Point:
        """The point with what it really costs.

        Args:
            metric: of an accuracy budget.
        """
        self.bar.show(f"verifying {point.name}", 0, 1)
        bits = self.costs.space.bits(point.chosen)
        if set(bits.values()) == {FLOATS}:
            qmodel = self.source
        else:
            request = Request.of(*W8A8, self.calib, bits=bits, **self.options)
            qmodel = run(
                self.source, self.calib, None, request, backend=self.backend, resume=None,
                progress=False, inplace=False,
            )  # fmt: skip
        loss = float(self.judge.losses(qmodel).mean()) if self.data.given else None
        held = bound(self.judge.losses(qmodel, metric), metric) if metric else None
        batch = full_rows(self.data.seen[-1], self.batch_size)
        calls = {"float": lambda: self.source(**batch), "it": lambda: qmodel(**batch)}
        times = race(calls, ROUNDS, limit=4.0)
        # beside the float model, so that a machine that is slower now than it was is for both
        seconds = self.costs.latencies.float_seconds * times["it"] / times["float"]
        return replace(point, measured=Measured(loss, held, seconds))


def better_of(
    point: Point, costs: Costs, lab: Lab, within: list[tuple[Matrix, float]]
) -> tuple[Point, tuple[Point, ...]]:
    """What was found or one scheme for all, whichever loses less on held-back data.

    Losses that are predicted as a sum order mixtures well, but one scheme for all is at times
    better than the sum says; the most promising that is within the limits is measured as well.

    Returns:
        the better one, named "found", and all that were measured.
    """
    rivals = [replace(point, name="mixture")]
    single = [costs.point(name_of(p), costs.space.uniform(p)) for p in costs.space.schemes]
    fitting = [
        p for p in single
        if p.chosen != point.chosen
        and all(total(cost, p.chosen) <= limit * (1 + SLACK) for cost, limit in within)
    ]  # fmt: skip
    if fitting and lab.data.given:
        rivals.append(min(fitting, key=lambda p: p.loss))
    tried = [lab.measured(p) for p in rivals]
    best = min(tried, key=_held_loss)
    found = replace(best, name="found")
    return found, (*(p for p in tried if p is not best), found)


def within_accuracy(
    budget: Budget, costs: Costs, lab: Lab, within: list[tuple[Matrix, float]], verify: bool
) -> tuple[Point, tuple[Point, ...]]:
    """The fewest bytes whose held-back bound is within an accuracy budget.

    How a predicted loss becomes the budget's metric is learned on the way, from the models that
    were measured: between two of them along a power law, beyond them in proportion.
    """
    lab.judge.losses(lab.source, budget.metric)  # refuses a metric that the model does not have
    losses, sizes = costs.matrix("loss"), costs.matrix("bytes")
    best = allocate(losses, within)
    if best is None:
        raise SchemeError("the budgets of latency and bytes cannot be kept together")
    most, least = float(losses.max(1).sum()), total(losses, best)
    aim = min(budget.limit * AIM, most)
    tried: list[Point] = []
    seen: set[Chosen] = set()
    for _ in range(CHECKS if verify else 1):
        chosen = allocate(sizes, [*within, (losses, max(aim, least) * (1 + 1e-9))])
        point = costs.point(f"try {len(tried) + 1}", chosen or best)
        if point.chosen in seen:
            break
        seen.add(point.chosen)
        if not verify:
            return replace(point, name="found"), ()
        tried.append(lab.measured(point, budget.metric))
        if NEAR * budget.limit <= _bound(tried[-1]) <= budget.limit:
            break
        aim = _next_aim(tried, budget.limit)
    if not any(_bound(p) <= budget.limit for p in tried) and best not in seen:
        tried.append(lab.measured(costs.point("most accurate", best), budget.metric))
    kept = [p for p in tried if _bound(p) <= budget.limit]
    if not kept:
        found = min(map(_bound, tried))
        reach = f"cosine {1 - found:.4f}" if budget.metric == "cosine" else f"{found:.3g}"
        raise SchemeError(
            f"budget {budget.text!r} cannot be kept on held-back data: the best that is sure in 99 "
            f"of 100 draws is {reach}; allow more, add schemes such as (16, 16), or give more calib"
        )
    point = replace(min(kept, key=lambda p: p.bytes), name="found")
    return point, (*(p for p in tried if p.chosen != point.chosen), point)


def _held_loss(point: Point) -> float:
    assert point.measured is not None
    return math.inf if point.measured.loss is None else point.measured.loss


def _bound(point: Point) -> float:
    assert point.measured is not None and point.measured.bound is not None
    return point.measured.bound


def _next_aim(tried: Sequence[Point], limit: float) -> float:
    """The predicted loss at which the bound should be a little below its limit."""
    tiny = 1e-12
    pairs = sorted((max(p.loss, tiny), max(_bound(p), tiny)) for p in tried)
    below = [pair for pair in pairs if pair[1] <= limit]
    above = [pair for pair in pairs if pair[1] > limit]
    if below and above and below[-1][0] < above[0][0]:
        (x0, y0), (x1, y1) = below[-1], above[0]
        share = np.log(max(AIM * limit, y0) / y0) / np.log(y1 / y0)
        return float(x0 * (x1 / x0) ** max(share, 0.25))
    x, y = below[-1] if below else above[0]
    return x * AIM * limit / y
