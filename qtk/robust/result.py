"""What a study of robustness found, as values, a table and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from qtk.intervals import wilson
from qtk.report import page
from qtk.robust.cells import RIGHT, UNSEEN, Bits
from qtk.robust.pairs import paired
from qtk.table import finite, listed, markdown, ruled

UNROUNDED = "unrounded "  # before a level whose images are no multiples of 1/255
NOISES = ("corruption", "system", "grid")
SUMMARY = ("mean drop", "float", "quantized", "amplified by", "worst, float", "worst, quantized")
CHECKS = ("check", "model", "result", "seen")
HEAD = ("row", "float", "quantized", "difference", "95 %", "lost", "gained", "p")


@dataclass(frozen=True)
class Row:
    """Float and quantized model under one attack, corruption or system noise.

    Attributes:
        name, kind, level: "pgd_linf", "attack", "mid"; kinds are "clean", "attack", "transfer",
            "noise", "worst", "corruption", "system" and "grid".
        budget: what `level` stands for, or a severity; None where there is none.
        samples: that were judged.
        accuracy_float, accuracy_quantized: shares that are right. Under an attack a sample that
            was wrong already stays wrong.
        float_interval, quantized_interval: Wilson's, 95 %.
        retained_float, retained_quantized: the same over the shares that are right on clean data.
        difference, low, high: quantized less float, and its paired bootstrap interval, 95 %.
        lost, gained: shares that only the float and only the quantized model has right.
        p: McNemar's exact test that both are as likely.
        floor: the largest difference, in any row of this kind, between two quantized models of
            different calibration seeds; None where there is no second one.
    """

    name: str
    kind: str
    level: str
    budget: float | None
    samples: int
    accuracy_float: float
    accuracy_quantized: float
    float_interval: tuple[float, float]
    quantized_interval: tuple[float, float]
    retained_float: float | None
    retained_quantized: float | None
    difference: float
    low: float
    high: float
    lost: float
    gained: float
    p: float
    floor: float | None = None

    @property
    def says_nothing(self) -> bool:
        """Whether the difference is no larger than that of two calibration seeds."""
        return self.floor is not None and abs(self.difference) <= self.floor

    @property
    def title(self) -> str:
        return f"{self.name} {self.level}".strip()


@dataclass(frozen=True)
class Check:
    """One of the ways in which a weak attack gives itself away.

    Attributes:
        passed: None where what it compares was not run.
    """

    name: str
    model: str
    passed: bool | None
    told: str


@dataclass(frozen=True)
class Robustness:
    """Rows, checks, and what may be said of them.

    Attributes:
        samples, seed: how many, and of everything that is drawn.
        gradients: "straight-through" where quantized models were differentiated, else "none".
        floor: of the kinds of rows, the difference between two calibration seeds.
        notes: what was done to the data, in sentences.
        bits: of the quantized model's weights, mean over its linears; None where there is none.
        seconds: it took, without what was kept from an earlier run.
    """

    samples: int
    seed: int
    gradients: str
    suite: tuple[str, ...]
    rows: tuple[Row, ...]
    checks: tuple[Check, ...] = ()
    floor: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    bits: float | None = None
    title: ClassVar[str] = "Robustness"

    @property
    def is_conclusive(self) -> bool:
        """Whether no check failed and all could be made; without attacks there is none to make."""
        return all(check.passed for check in self.checks)

    @property
    def conclusion(self) -> str:
        """One sentence about adversarial robustness, or why there is none."""
        worst = [row for row in self.rows if row.kind == "worst"]
        if not worst:
            return "no attack was run: nothing is concluded about adversarial robustness"
        failed = [check for check in self.checks if check.passed is False]
        if failed:
            return f"gradients masked? No conclusion: {failed[0].model}, {failed[0].told}"
        missing = sorted({check.name for check in self.checks if check.passed is None})
        if missing:
            return f"no conclusion: not checked were {', '.join(missing)}"
        parts = [
            f"{row.level}: float {_percent(row.accuracy_float)}, "
            f"quantized {_percent(row.accuracy_quantized)}"
            + (", no difference beyond calibration seeds" if row.says_nothing else "")
            for row in worst
        ]
        return "strongest attack of each image, " + "; ".join(parts)

    def row(self, name: str, level: str = "") -> Row:
        """The row of that name and level.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.name, row.level) == (name, level):
                return row
        raise KeyError(f"no row {name!r} at {level!r}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {"is_conclusive": self.is_conclusive, "conclusion": self.conclusion}
        return finite({**asdict(self), **facts, "summary": self.summary()})

    def summary(self) -> dict[str, dict[str, Any]]:
        """Of corruptions, of system noise, of each cause and of the grid: means, and the worst.

        `drop_*` is clean accuracy less that under the noise, mean over the rows; `worst_*` the
        largest, `std_*` the spread of the rows; `amplification` how much larger the quantized
        model's mean drop is. `mce`, of corruptions: errors of the quantized model over those of the
        float one, summed over severities, mean over corruptions (mCE with the float model as
        reference).
        """
        found = {}
        kinds = {kind: [r for r in self.rows if r.kind == kind] for kind in NOISES}
        causes = dict.fromkeys(row.name for row in kinds["system"])
        kinds |= {f"system: {name}": [r for r in kinds["system"] if r.name == name]
                  for name in causes if len(causes) > 1}  # fmt: skip
        for name, rows in kinds.items():
            if rows:
                found[name] = _drops(self.row("clean"), rows)
        if kinds["corruption"]:
            found["corruption"]["mce"] = _mce(kinds["corruption"])
        return found

    def table(self, every: bool = False) -> str:
        """Plain text: rows, the summary of noises, checks, and the conclusion.

        Args:
            every: transfers and the grid too, and each attack before its images are rounded.
        """
        shown = [row for row in self.rows if every or _counts(row)]
        lines = ruled(HEAD, [cells(row) for row in shown])
        if summary := self.summary():
            lines += ["", *ruled(SUMMARY, [summed(*item) for item in summary.items()])]
        if self.checks:
            marks = {True: "ok", False: "FAILED", None: "not run"}
            lines += ["", *listed([(f"{c.model}, {c.name}", f"{marks[c.passed]}: {c.told}")
                                   for c in self.checks])]  # fmt: skip
        facts_told = [("samples", f"{self.samples}"), ("gradients", self.gradients),
                      ("floor", _floor(self.floor)), ("seconds", f"{self.seconds:.0f}"),
                      ("conclusion", self.conclusion)]  # fmt: skip
        return "\n".join([*lines, "", *listed(facts_told), *self.notes])

    def markdown(self) -> str:
        """The same in Markdown, without the rows of single attacks."""
        lines = [f"{self.conclusion}."]
        if summary := self.summary():
            lines += ["", *markdown(SUMMARY, [summed(*item) for item in summary.items()])]
        if self.checks:
            lines += ["", *markdown(CHECKS, self._checked())]
        return "\n".join([*lines, "", *self.notes])

    def html(self) -> str:
        """The same for a page (`qtk.trust_page`), all rows folded away."""
        parts = [page.paragraph(text) for text in (f"{self.conclusion}.", *self.notes)]
        if summary := self.summary():
            parts.append(page.table(SUMMARY, [summed(*item) for item in summary.items()]))
        if self.checks:
            parts.append(page.table(CHECKS, self._checked()))
        every = page.table(HEAD, [cells(row) for row in self.rows])
        return "\n".join([*parts, page.folded(f"all {len(self.rows)} rows", every)])

    def _checked(self) -> list[list[str]]:
        marks = {True: "passed", False: "failed", None: "not run"}
        return [[each.name, each.model, marks[each.passed], each.told] for each in self.checks]


def _drops(clean: Row, rows: Sequence[Row]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for side in ("float", "quantized"):
        at_best = getattr(clean, f"accuracy_{side}")
        drops = np.array([at_best - getattr(row, f"accuracy_{side}") for row in rows])
        worst = int(drops.argmax())
        facts |= {
            f"drop_{side}": float(drops.mean()), f"std_{side}": float(drops.std()),
            f"worst_{side}": float(drops[worst]), f"worst_row_{side}": rows[worst].title,
        }  # fmt: skip
    return {**facts, "amplification": facts["drop_quantized"] - facts["drop_float"]}


def _mce(rows: Sequence[Row]) -> float | None:
    """None where the float model makes no mistake under some corruption."""
    ratios = []
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        errors = sum(1 - row.accuracy_float for row in own)
        if not errors:
            return None
        ratios.append(sum(1 - row.accuracy_quantized for row in own) / errors)
    return float(np.mean(ratios))


def compare(
    name: str, kind: str, level: str, budget: float | None, bits: tuple[Bits, Bits],
    clean: tuple[Bits, Bits], seed: int,
) -> Row:  # fmt: skip
    """The row of two models' bits under something, with their bits on clean data."""
    seen = (bits[0] != UNSEEN) & (bits[1] != UNSEEN)
    first, second = (b[seen] == RIGHT for b in bits)
    n = int(seen.sum())
    shares = [float(b.mean()) for b in (first, second)]
    kept = [
        share / base if (base := float((c[seen] == RIGHT).mean())) else None
        for share, c in zip(shares, clean, strict=True)
    ]
    pair = paired(first, second, seed)
    intervals = [wilson(int(b.sum()), n) for b in (first, second)]
    return Row(
        name, kind, level, budget, n, shares[0], shares[1], intervals[0], intervals[1], kept[0],
        kept[1], pair.difference, pair.low, pair.high, pair.lost, pair.gained, pair.p,
    )  # fmt: skip


def cells(row: Row) -> list[str]:
    """The columns of HEAD."""
    if row.says_nothing:
        difference, interval = "no difference", "-"
    else:
        difference = f"{100 * row.difference:+.1f}"
        interval = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
    shares = (f"{100 * v:.1f}" for v in (row.accuracy_float, row.accuracy_quantized))
    churn = (f"{100 * v:.1f}" for v in (row.lost, row.gained))
    return [row.title, *shares, difference, interval, *churn, f"{row.p:.3f}"]


def worst_of(parts: Sequence[Bits]) -> Bits:
    """Right where every part is; unseen by one is not judged by it."""
    stacked = np.stack(parts)
    found: Bits = np.where((stacked == 0).any(0), 0, stacked.max(0)).astype(np.int8)
    return found


def _counts(row: Row) -> bool:
    if row.kind in ("transfer", "grid"):
        return False
    return row.kind == "worst" or not row.level.startswith(UNROUNDED)


def summed(name: str, facts: dict[str, Any]) -> list[str]:
    """The columns of SUMMARY."""
    drops = [f"{100 * facts[key]:.1f}" for key in ("drop_float", "drop_quantized")]
    worst = [f"{100 * facts[f'worst_{s}']:.1f}, {facts[f'worst_row_{s}']}"
             for s in ("float", "quantized")]  # fmt: skip
    return [name, *drops, f"{100 * facts['amplification']:+.1f}", *worst]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _floor(floor: dict[str, float]) -> str:
    if not floor:
        return "not measured: give second=, the same scheme with another calibration seed"
    return ", ".join(f"{kind} {100 * value:.1f}" for kind, value in floor.items())
