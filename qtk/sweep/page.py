"""A sweep as one HTML file: a Pareto plot a model, and the table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtk.report import page
from qtk.report.plots import pareto
from qtk.sweep.table import best

Row = dict[str, Any]
HEAD = ["model", "scheme", "SQNR, dB", "cosine", "MB", "ms", "float ms", "best", "remark"]


def write_page(rows: Sequence[Row], file: Path) -> None:
    """Writes the page, whole or not at all."""
    front = {row["key"] for row in best(rows)}
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and row["error"] is None]
        if own:
            drawn = pareto({row["scheme"]: _point(row, front) for row in own})
            caption = (
                "Up and to the left is better; filled: no other scheme is better in all three."
            )
            parts.append(page.section(Path(model).name, page.figure(drawn, caption)))
    cells = [_cells(row, row["key"] in front) for row in rows]
    first = rows[0]
    told = ", ".join(f"{name} {first[name]}" for name in ("qtk", "torch", "transformers", "cpu"))
    parts.append(page.section("All", page.table(HEAD, cells), page.paragraph(
        f"{told}, {first['threads']} threads, commit {first['commit'] or 'not known'}, "
        f"seed {first['seed']}."
    )))  # fmt: skip
    page.write(file, page.page("Sweep", f"{len(rows)} cells, {len(front)} on the front.", parts))


def _point(row: Row, front: set[str]) -> tuple[float, float, float, bool]:
    sqnr = 100.0 if row["sqnr"] is None else row["sqnr"]
    return row["bytes"] / 1e6, sqnr, row["ms"], row["key"] in front


def _cells(row: Row, on_front: bool) -> list[str]:
    figures = [(row["sqnr"], ".2f"), (row["cosine"], ".5f"), (row["bytes"] and row["bytes"] / 1e6,
               ".2f"), (row["ms"], ".2f"), (row["float_ms"], ".2f")]  # fmt: skip
    shown = ["-" if value is None else format(value, form) for value, form in figures]
    mark = "yes" if on_front else ""
    return [Path(row["model"]).name, row["scheme"], *shown, mark, row["error"] or ""]
