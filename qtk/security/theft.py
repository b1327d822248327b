"""What thieves got, as an object, a table, Markdown, HTML and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, ClassVar

from qtk.report import page
from qtk.table import finite, markdown, ruled

HEAD = ["thief", "asks with", "answers", "victim", "its accuracy", "clone", "from - to",
        "as victim", "as float", "classes", "queries"]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kind of theft, over all seeds.

    Attributes:
        thief: a file of qtk/security/thief; `pool` what it asks with; `answers` what it is told.
        victim: "float" or "quantized"; `victim_accuracy` on the test images.
        clone_accuracies: on the test images, one a seed, after the last epoch.
        agreement: share of test images on which clone and victim answer alike; `agreement_float`
            likewise with the float model, whoever was asked. Means over seeds.
        classes: different classes in the answers; `queries` that were asked. Of the first seed.
    """

    thief: str
    pool: str
    answers: str
    victim: str
    victim_accuracy: float
    clone_accuracies: tuple[float, ...]
    agreement: float
    agreement_float: float
    classes: int
    queries: int
    seconds: float

    @property
    def clone_accuracy(self) -> float:
        return mean(self.clone_accuracies)


@dataclass(frozen=True)
class Theft:
    """What a thief gets of the float model, and of the quantized one."""

    rows: tuple[Row, ...]
    samples: int
    seeds: tuple[int, ...]
    seconds: float
    gradients: str = "none"
    title: ClassVar[str] = "Stealing"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return finite(asdict(self))

    def table(self) -> str:
        """Plain text: a line a kind of theft, and what rounding changed."""
        return "\n".join([*ruled(HEAD, self._cells()), "", *self._remarks()])

    def markdown(self) -> str:
        """The same table in Markdown."""
        remarks = (f"{remark}\n" for remark in self._remarks())
        return "\n".join([*markdown(HEAD, self._cells()), "", *remarks])

    def html(self) -> str:
        """The same table for a page (`qtk.trust_page`)."""
        told = f"{self.samples} test images, {len(self.seeds)} seeds"
        remarks = map(page.paragraph, [*self._remarks(), told])
        return "\n".join([page.table(HEAD, self._cells()), *remarks])

    def _cells(self) -> list[list[str]]:
        return [
            [row.thief, row.pool, row.answers, row.victim, _percent(row.victim_accuracy),
             _percent(row.clone_accuracy), _spread(row.clone_accuracies), _percent(row.agreement),
             _percent(row.agreement_float), f"{row.classes}", f"{row.queries}"]
            for row in self.rows
        ]  # fmt: skip

    def _remarks(self) -> list[str]:
        """Where the clones of the two victims lie apart, and where the seeds alone explain it."""
        found = []
        for one in (row for row in self.rows if row.victim == "float"):
            for other in self.rows:
                same = (one.thief, one.pool, one.answers) == (
                    other.thief,
                    other.pool,
                    other.answers,
                )
                if same and other.victim == "quantized":
                    found.append(f"{one.thief}, {one.pool}, {one.answers}: {_apart(one, other)}")
        return [*found, "accuracy and agreement in %, clones after their last epoch"]


def _apart(one: Row, other: Row) -> str:
    """The difference, or that it is no larger than what the seeds make of either."""
    spread = max(max(row.clone_accuracies) - min(row.clone_accuracies) for row in (one, other))
    difference = other.clone_accuracy - one.clone_accuracy
    if len(one.clone_accuracies) > 1 and abs(difference) <= spread:
        return "no difference beyond that of seeds"
    return f"the clone of the quantized model has {100 * difference:+.2f} points"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _spread(values: Sequence[float]) -> str:
    return f"{100 * min(values):.1f} - {100 * max(values):.1f}"
