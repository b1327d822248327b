"""Results as text: columns that line up; and as JSON, which knows no infinity."""

import math
from collections.abc import Sequence
from typing import Any


def ruled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns under a ruled head: text to the left, numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [bool(rows) and all(map(_is_number, column[1:])) for column in columns]
    rule = "  ".join("-" * width for width in widths)
    return [_line(head, widths, numeric), rule, *(_line(row, widths, numeric) for row in rows)]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def listed(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a name and what it stands for."""
    width = max((len(name) for name, _ in rows), default=0)
    return [_line(row, [width, 0], [False, False]) for row in rows]


def finite(data: Any) -> Any:
    """The same numbers, lists and dicts, with None for every number that is not finite."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    )
    return "  ".join(padded).rstrip()


def _is_number(cell: str) -> bool:
    return cell in ("-", "inf") or cell.lstrip("-").replace(".", "", 1).isdigit()
