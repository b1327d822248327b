"""What every choice costs, in each of the metrics that a budget may limit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qtk.errors import SchemeError
from qtk.mixed_precision.allocate import total
from qtk.mixed_precision.budget import Budget
from qtk.mixed_precision.latency import Latencies
from qtk.mixed_precision.result import Point
from qtk.mixed_precision.sensitivity import Sensitivity
from qtk.mixed_precision.space import FLOATS, W8A8, Chosen, Matrix, Space, name_of


@dataclass(frozen=True)
class Costs:
    """What every choice costs, and what budgets are relative to."""

    space: Space
    sensitivity: Sensitivity
    latencies: Latencies

    def matrix(self, metric: str) -> Matrix:
        """[U, S] of "latency" (without the rest), "bytes" or "loss"."""
        if metric == "latency":
            return self.latencies.seconds
        return self.space.bytes() if metric == "bytes" else self.sensitivity.effects

    def limit(self, budget: Budget) -> float:
        """Of the sum over units."""
        rest = self.latencies.rest if budget.metric == "latency" else 0.0
        if budget.of is None:
            return budget.limit - rest
        pair = W8A8 if budget.of == "w8a8" else FLOATS
        if pair not in self.space.schemes:
            raise SchemeError(f"budget {budget.text!r}: {name_of(pair)} is not among schemes")
        whole = total(self.matrix(budget.metric), self.space.uniform(pair)) + rest
        return budget.limit * whole - rest

    def point(self, name: str, chosen: Chosen) -> Point:
        seconds = total(self.latencies.seconds, chosen) + self.latencies.rest
        size = round(total(self.space.bytes(), chosen))
        return Point(name, chosen, self.sensitivity.predict(chosen), size, seconds)

    def check(self, limits: Mapping[Budget, float]) -> None:
        """Raises SchemeError for a budget that nothing keeps, with the range that is feasible."""
        for budget, limit in limits.items():
            least, most = self._range(budget)
            if limit < least[1] * (1 - 1e-9):
                raise SchemeError(
                    f"budget {budget.text!r} cannot be kept: feasible are {least[0]} to {most[0]}"
                )

    def _range(self, budget: Budget) -> tuple[tuple[str, float], tuple[str, float]]:
        """The ends of what a budget may be, in its own words and as a sum over units."""
        cost = self.matrix(budget.metric)
        rest = self.latencies.rest if budget.metric == "latency" else 0.0
        whole = None if budget.of is None else (self.limit(replace(budget, limit=1.0)) + rest)

        def words(value: float) -> tuple[str, float]:
            if whole is not None:
                return f"{(value + rest) / whole:.3g}x", value
            unit = "ms" if budget.metric == "latency" else "MB"
            return f"{(value + rest) * (1e3 if unit == 'ms' else 1e-6):.3g} {unit}", value

        return words(float(cost.min(1).sum())), words(float(cost.max(1).sum()))
