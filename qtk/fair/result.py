"""What rounding did to fairness, as an object, a table, Markdown, HTML and JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from qtk.intervals import Figure
from qtk.report import page
from qtk.table import finite, markdown, ruled

Rows = list[list[str]]


@dataclass(frozen=True)
class Instances:
    """Individual discriminatory instances that one probe found.

    Rows that differ in the protected attribute alone are one. A probe that follows the model looks
    for its own in each; the last three counts are of the rows tried on the float model.

    Attributes:
        tested, found: on the float model; `tested_quantized`, `found_quantized` on the quantized.
        became_unfair, became_fair: of the rows that were tried on the float model.
        second: what a second quantized model has of these two; None where there is none.
    """

    attribute: str
    probe: str
    tested: int
    found: int
    tested_quantized: int
    found_quantized: int
    became_unfair: int
    became_fair: int
    second: tuple[int, int] | None = None


@dataclass(frozen=True)
class Churn:
    """Decisions that rounding changed in one group.

    Attributes:
        group: "all", or the attribute and its values.
        where: "data", or "domain" for all valid rows.
        gained, lost: decisions that became favourable, and that no longer are.
        low, high: 95 % interval of the share that changed (Wilson).
        p: of McNemar's exact test that as many gain as lose.
        second: changes by a second quantized model; `between` it and this one. None without.
    """

    attribute: str
    group: str
    where: str
    samples: int
    changed: int
    gained: int
    lost: int
    low: float
    high: float
    p: float
    second: int | None = None
    between: int | None = None


@dataclass(frozen=True)
class Disparity:
    """Disparate churn: the share of decisions changed in group 0, over that in group 1.

    `low` and `high` are its 95 % interval, finite where a group has no change, in which case
    `ratio` is 0 or infinite.
    """

    attribute: str
    where: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Fairness:
    """What a person who ships the quantized model changes for whom.

    Attributes:
        samples: rows, or pairs of sentences.
        domain: rows that are valid; None where they were not enumerated.
        figures: metrics; `instances` found by probes; `churn` of decisions; `disparities` of it.
        wrong_p: of McNemar's exact test that as many rows became wrong as right; None without
            labels.
        ties: rows of the data whose two largest logits are equal, float and quantized.
    """

    samples: int
    domain: int | None
    seed: int
    figures: tuple[Figure, ...]
    instances: tuple[Instances, ...]
    churn: tuple[Churn, ...]
    disparities: tuple[Disparity, ...]
    wrong_p: float | None
    ties: tuple[int, int]
    seconds: float
    gradients: str = "none"
    title: ClassVar[str] = "Fairness"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a figure that is not finite becomes None."""
        return finite(asdict(self))

    def table(self) -> str:
        """Plain text: metrics, instances, churn."""
        parts = []
        for title, head, rows in self._tables():
            parts += [title, "", *ruled(head, rows), ""]
        return "\n".join([*parts, *self._remarks()])

    def markdown(self) -> str:
        """The same tables in Markdown."""
        parts = []
        for title, head, rows in self._tables():
            parts += [f"**{title}**", "", *markdown(head, rows), ""]
        return "\n".join([*parts, *(f"{remark}\n" for remark in self._remarks())])

    def html(self) -> str:
        """The same tables for a page (`qtk.trust_page`)."""
        parts = []
        for title, head, rows in self._tables():
            parts += [page.paragraph(title), page.table(head, rows)]
        told = f"{self.samples} samples, seed {self.seed}"
        return "\n".join([*parts, *map(page.paragraph, [*self._remarks(), told])])

    def _tables(self) -> list[tuple[str, list[str], Rows]]:
        found: list[tuple[str, list[str], Rows]] = []
        if self.figures:
            head = ["attribute", "metric", "float", "quantized", "difference", "95 %", "floor"]
            found.append(("Metrics", head, [_figure(figure) for figure in self.figures]))
        if self.instances:
            head = ["attribute", "probe", "float", "quantized", "became unfair", "became fair",
                    "second model"]  # fmt: skip
            rows = [_instances(row) for row in self.instances]
            found.append(("Discriminatory instances, of those tried", head, rows))
        head = ["group", "where", "changed", "95 %", "gained", "lost", "p", "second model"]
        found.append(("Decisions changed by rounding", head, [_churn(row) for row in self.churn]))
        return found

    def _remarks(self) -> list[str]:
        found = [
            f"disparate churn of {row.attribute}, {row.where}: {_number(row.ratio)} "
            f"({_number(row.low)} to {_number(row.high)})"
            for row in self.disparities
        ]
        if self.wrong_p is not None:
            found.append(f"McNemar, which model is wrong: p = {self.wrong_p:.3g}")
        found.append(f"rows with equal logits: float {self.ties[0]}, quantized {self.ties[1]}")
        if any(figure.floor is None for figure in self.figures):
            found.append("no floor: give second=, a model quantized with another calibration seed")
        return found


def _figure(row: Figure) -> list[str]:
    difference = f"{row.difference:+.4f}" if row.is_difference else "no difference"
    interval = "-" if math.isnan(row.low) else f"{row.low:+.4f} to {row.high:+.4f}"
    floor = "-" if row.floor is None else f"{row.floor:.4f}"
    figures = [f"{row.on_float:.4f}", f"{row.on_quantized:.4f}"]
    return [row.attribute or "-", row.name, *figures, difference, interval, floor]


def _instances(row: Instances) -> list[str]:
    return [
        row.attribute, row.probe, _share(row.found, row.tested),
        _share(row.found_quantized, row.tested_quantized), _share(row.became_unfair, row.tested),
        _share(row.became_fair, row.tested),
        "-" if row.second is None else f"{row.second[0]} + {row.second[1]}",
    ]  # fmt: skip


def _churn(row: Churn) -> list[str]:
    second = "-" if row.second is None else f"{row.second}, {row.between} from this"
    return [
        row.group, row.where, _share(row.changed, row.samples),
        f"{100 * row.low:.2f} to {100 * row.high:.2f}", f"{row.gained}", f"{row.lost}",
        f"{row.p:.3g}", second,
    ]  # fmt: skip


def _share(hits: int, samples: int) -> str:
    return f"{hits} of {samples}, {100 * hits / samples:.2f} %" if samples else "-"


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "unbounded" if value > 0 else "-"
