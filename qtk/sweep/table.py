"""A sweep's rows as CSV and Parquet, and which of them no other beats."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtk import integrity
from qtk.errors import BackendError

Row = dict[str, Any]
SMALLER = ("bytes", "ms")  # the better the smaller; SQNR the larger


def best(rows: Sequence[Row]) -> list[Row]:
    """The Pareto front of each model: rows that no other is as good as in all, and better in one.

    Good is a high SQNR, few bytes and few milliseconds.
    """
    measured = [row for row in rows if row["error"] is None]
    return [
        row for row in measured
        if not any(_beats(other, row) for other in measured if other["model"] == row["model"])
    ]  # fmt: skip


def _beats(one: Row, other: Row) -> bool:
    a, b = ([-_or_infinite(row["sqnr"]), *(row[name] for name in SMALLER)] for row in (one, other))
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def _or_infinite(sqnr: float | None) -> float:
    return float("inf") if sqnr is None else sqnr  # nothing differs


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes results.csv and results.parquet, each whole or not at all.

    Raises:
        BackendError: pandas or pyarrow is not installed.
    """
    try:
        import pandas
        import pyarrow  # noqa: F401, what pandas writes Parquet with
    except ImportError:
        raise BackendError("a sweep's tables need pandas and pyarrow: install qtk[sweep]") from None
    front = {row["key"] for row in best(rows)}
    frame = pandas.DataFrame([{**row, "pareto": row["key"] in front} for row in rows])
    files = [folder / "results.csv", folder / "results.parquet"]
    for file in files:
        part = file.with_name(f"{file.name}.part")
        if file.suffix == ".csv":
            frame.to_csv(part, index=False)
        else:
            frame.to_parquet(part, index=False)
        os.chmod(part, 0o644)
        integrity.put(part, file)
    return files
