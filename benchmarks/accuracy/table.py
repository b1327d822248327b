"""A table of accuracies that is filled case by case, and loses nothing when it is stopped."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import qtk
from benchmarks.result import Row, read, result, write

SEEDS = (0, 1, 2)
Options = dict[str, Any]
Cases = Sequence[tuple[str, Options]]  # name of the row, options of `qtk.quantize`
Measure = Callable[[Options, int], list[float]]  # options and a seed -> figures
Draws = dict[str, list[float]]  # seed -> figures


def all_seeds(options: Options) -> tuple[int, ...]:
    return SEEDS


def one_seed(options: Options) -> tuple[int, ...]:
    return SEEDS[:1]


def seeds_where_calibrated(options: Options) -> tuple[int, ...]:
    """All seeds where calibration data is drawn, else one."""
    drawn = options.get("w", 8) < 16 or options.get("softmax") == "matthew"
    return SEEDS if drawn else SEEDS[:1]


@dataclass(frozen=True)
class Table:
    """A row per case, a column per figure; a row is the mean over its calibration draws.

    Attributes:
        name: the result is `results/<name>.json`.
        columns: heads of the columns, that of the cases' names first.
        formats: how each figure is shown.
        base: the float model's row.
        seeds: the calibration draws of a case.
    """

    name: str
    title: str
    columns: list[str]
    formats: list[str]
    cases: Cases
    measure: Measure
    notes: str
    base: Row | None = None
    seeds: Callable[[Options], tuple[int, ...]] = all_seeds

    def fill(self, only: Sequence[str] = (), resume: bool = False) -> None:
        """Measures and writes the file, again after every figure.

        Args:
            only: cases to measure, the file's other rows are kept; empty is all of them.
            resume: figures that the file holds are not measured again.
        """
        old = read(self.name) if only or resume else {}
        measured: dict[str, Draws] = old.get("figures", {})
        figures = {name: measured.get(name, {}) for name, _ in self.cases}
        for name, options in self.cases:
            if only and name not in only:
                continue
            draws = figures[name]
            if not resume:
                draws.clear()
            for seed in self.seeds(options):
                if str(seed) not in draws:
                    draws[str(seed)] = self.measure(options, seed)
                    self._write(old, figures)
            print("  ".join(self._row(name, draws)), file=sys.stderr, flush=True)

    def _write(self, old: dict[str, Any], figures: dict[str, Draws]) -> None:
        shown: dict[str, Row] = {row[0]: row for row in old.get("rows", ())}
        shown |= {
            name: self._row(name, figures[name])
            for name, options in self.cases
            if len(figures[name]) == len(self.seeds(options))
        }
        rows = [self.base] if self.base else []
        rows += [shown[name] for name, _ in self.cases if name in shown]
        notes = f"{self.notes}. {self._drawn()}"
        made = result(self.title, self.columns, rows, notes, kept=old)
        write(self.name, {**made, "figures": figures})

    def _row(self, name: str, draws: Draws) -> Row:
        means = [mean(column) for column in zip(*draws.values(), strict=True)]
        return [name, *(f.format(x) for f, x in zip(self.formats, means, strict=True))]

    def _drawn(self) -> str:
        numbers = {len(self.seeds(options)) for _, options in self.cases}
        if numbers == {1}:
            return "Seed 0."
        means = f"Means over calibration seeds {', '.join(map(str, SEEDS))}"
        return means + ("." if 1 not in numbers else "; rows without calibration data have one.")


def quantize(model: Any, calib: Any, options: Options, seed: int, **more: Any) -> Any:
    """`qtk.quantize` by the options of a case."""
    return qtk.quantize(model, calib=calib, seed=seed, progress=False, **options, **more)
