"""What a search found, as an object, a table, a plot and JSON."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtk.mixed_precision.latency import Latencies
from qtk.mixed_precision.sensitivity import Sensitivity
from qtk.mixed_precision.space import Chosen, Pair, Space, name_of
from qtk.observe import Batch
from qtk.report import plots
from qtk.table import finite, ruled

SHOWN = 3  # interactions


@dataclass(frozen=True)
class Measured:
    """A model as it was really quantized.

    Attributes:
        loss: mean on held-back data, of the model's own metric; None without data.
        bound: what the budget's metric exceeds in one of a hundred draws of such data; None
            without an accuracy budget.
        seconds: of a forward pass, measured beside the float model and in its time.
    """

    loss: float | None
    bound: float | None
    seconds: float


@dataclass(frozen=True)
class Point:
    """An assignment, what it should cost, and what it did.

    Attributes:
        chosen: the index of a scheme for each unit.
        loss: as predicted: 1 - cosine of embeddings, or KL of predictions in nats.
        bytes: of the searched layers as stored.
        seconds: of a forward pass, as predicted.
    """

    name: str
    chosen: Chosen
    loss: float
    bytes: int
    seconds: float
    measured: Measured | None = None


@dataclass(frozen=True)
class Search:
    """Bits chosen under a budget.

    Attributes:
        budget: as it was given.
        metric: of the losses: "cosine" (1 - cosine) or "kl".
        point: the assignment that was chosen.
        pareto: from few bytes to many, the smallest predicted loss for each.
        references: whole models at one scheme each.
        checked: assignments that were quantized and measured on the way, the chosen one last.
        batch_size: rows of the batch that latencies are of.
        calib: the half of the data that models were calibrated on; None without data.
    """

    budget: tuple[str, ...]
    metric: str
    space: Space
    point: Point
    pareto: tuple[Point, ...]
    references: tuple[Point, ...]
    checked: tuple[Point, ...]
    sensitivity: Sensitivity
    latencies: Latencies
    batch_size: int
    calib: list[Batch] | None = field(repr=False)

    @property
    def bits(self) -> dict[str, Pair]:
        """As `quantize(bits=...)` takes them."""
        return self.space.bits(self.point.chosen)

    def table(self) -> str:
        """Plain text: the units, what was chosen for them and why; then whole models."""
        head = ["unit", "bits", "loss alone", "+-", "us", "kB"]
        sizes = self.space.bytes()
        rows = [
            [unit.name, name_of(self.space.schemes[s]), f"{self.sensitivity.effects[u, s]:.6f}",
             f"{self.sensitivity.errors[u, s]:.6f}", f"{1e6 * self.latencies.seconds[u, s]:.0f}",
             f"{sizes[u, s] / 1e3:.1f}"]
            for u, (unit, s) in enumerate(zip(self.space.units, self.point.chosen, strict=True))
        ]  # fmt: skip
        together = [
            f"{i.first} and {i.second} together at {name_of(self.space.schemes[i.scheme])}: "
            f"{i.excess:+.6f} beyond their sum"
            for i in self.sensitivity.interactions[:SHOWN]
        ]
        loss = "1 - cosine" if self.metric == "cosine" else "KL, nats"
        return "\n".join([
            *ruled(head, rows), "", *together, "", *self._models(), "",
            f"budget: {', '.join(self.budget)}; loss is {loss}; a batch of {self.batch_size}",
            self.latencies.verdict(),
        ])  # fmt: skip

    def _models(self) -> list[str]:
        head = ["model", "loss", "measured", "MB", "ms", "measured ms"]
        points = [*self.references, *self.checked]
        if self.point not in points:
            points.append(self.point)
        return ruled(head, [_row(point) for point in points])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return finite({
            "budget": list(self.budget),
            "metric": self.metric,
            "bits": {name: list(pair) for name, pair in self.bits.items()},
            "chosen": _told(self.point),
            "pareto": [_told(point) for point in self.pareto],
            "references": [_told(point) for point in self.references],
            "checked": [_told(point) for point in self.checked],
            "effects": {
                unit.name: {
                    name_of(pair): [self.sensitivity.effects[u, s], self.sensitivity.errors[u, s]]
                    for s, pair in enumerate(self.space.schemes)
                }
                for u, unit in enumerate(self.space.units)
            },
            "latency": self.latencies.to_dict(),
            "batch_size": self.batch_size,
        })  # fmt: skip

    def plot(self, path: str | Path | None = None) -> str:
        """The predicted front and what was measured, as SVG; written to `path`, if given."""
        front = [(p.bytes / 1e6, p.loss) for p in self.pareto]
        measured = [
            (p.name, p.bytes / 1e6, p.measured.loss)
            for p in self.checked
            if p.measured is not None and p.measured.loss is not None
        ]
        whole = [(p.name, p.bytes / 1e6, p.loss) for p in self.references]
        loss = "1 - cosine" if self.metric == "cosine" else "KL, nats"
        svg = plots.front(front, measured, whole, "MB of the searched layers", loss)
        if path is not None:
            Path(path).write_text(svg, encoding="utf-8")
        return svg


def _row(point: Point) -> list[str]:
    found = point.measured
    return [
        point.name, f"{point.loss:.5f}",
        "-" if found is None or found.loss is None else f"{found.loss:.5f}",
        f"{point.bytes / 1e6:.2f}", f"{1e3 * point.seconds:.2f}",
        "-" if found is None else f"{1e3 * found.seconds:.2f}",
    ]  # fmt: skip


def _told(point: Point) -> dict[str, Any]:
    found = point.measured
    return {
        "name": point.name, "loss": point.loss, "bytes": point.bytes, "seconds": point.seconds,
        "measured": None if found is None else {
            "loss": found.loss, "bound": found.bound, "seconds": found.seconds,
        },
    }  # fmt: skip
