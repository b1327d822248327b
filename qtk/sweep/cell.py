"""One model in one scheme: quantized, compared with the float model, timed."""

import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import qtk
from qtk.api import quantize
from qtk.errors import QtkError
from qtk.fidelity import evaluate
from qtk.integrations.transformers import load_float
from qtk.observe.batches import prepare
from qtk.report.summary import summary
from qtk.sweep.plan import Cell
from qtk.timing import hardware, race

TIMED = 16  # samples of the batch that is timed
ROOT = Path(qtk.__file__).resolve().parents[1]


def measure(cell: Cell) -> dict[str, Any]:
    """The row of a cell: plain values, None where something was not measured.

    A scheme that a model cannot have is a row too, with the error in it.
    """
    row = {
        "key": cell.key, "model": cell.model, "scheme": cell.scheme, "seed": cell.seed,
        "error": None, "cosine": None, "sqnr": None, "kl": None, "metric": None, "bytes": None,
        "float_bytes": None, "ms": None, "float_ms": None, "seconds": None, **_circumstances(),
    }  # fmt: skip
    try:
        return {**row, **_figures(cell)}
    except QtkError as error:
        return {**row, "error": f"{type(error).__name__}: {error}"}


def _figures(cell: Cell) -> dict[str, Any]:
    model = load_float(cell.model).eval()
    begun = time.perf_counter()
    qmodel: Any = quantize(
        model, calib=cell.calib, seed=cell.seed, progress=False, **dict(cell.options)
    )
    seconds = time.perf_counter() - begun
    found = evaluate(model, qmodel, cell.data, samples=cell.samples).to_dict()
    made = summary(qmodel)
    batch = prepare(model, cell.data, seed=cell.seed, samples=TIMED)[0]
    times = race({"float": lambda: model(**batch), "own": lambda: qmodel(**batch)}, rounds=7)
    return {
        "cosine": found["cosine"], "sqnr": found["sqnr"], "kl": found["kl"],
        "metric": found["metric_quantized"], "bytes": made.bytes + made.other_bytes,
        "float_bytes": made.float_bytes + made.other_bytes, "ms": 1000 * times["own"],
        "float_ms": 1000 * times["float"], "seconds": seconds,
    }  # fmt: skip


def _circumstances() -> dict[str, Any]:
    """Versions, commit and machine: what a figure is worth nothing without."""
    machine = hardware()
    return {
        "qtk": qtk.__version__, "torch": torch.__version__, "commit": _commit(),
        "transformers": transformers.__version__, "cpu": machine["cpu"],
        "threads": machine["threads"],
    }  # fmt: skip


def _commit() -> str | None:
    """Of the checkout that qtk runs from; None where it was installed from a wheel."""
    if not (ROOT / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
