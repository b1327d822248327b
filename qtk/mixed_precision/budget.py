"""Budgets as users say them: "0.8x latency", "0.5x bytes of float", "cosine 0.99", "drop 0.5 %"."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qtk.errors import SchemeError

FORMS = (
    "'0.8x latency', '0.5x bytes' (of W8A8; 'of float' for the float model's), '12 ms', '6 MB', "
    "'cosine 0.99', 'kl 0.01' or 'drop 0.5 %'; several are joined by commas"
)
COSTS = ("latency", "bytes")
ACCURACIES = ("cosine", "kl", "drop")
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}
NUMBER = r"(\d+\.?\d*|\.\d+)"
RELATIVE = re.compile(rf"{NUMBER}\s*x\s+(latency|bytes)(?:\s+of\s+(w8a8|float))?", re.IGNORECASE)
ABSOLUTE = re.compile(rf"{NUMBER}\s*({'|'.join([*SECONDS, *BYTES])})(?:\s+(?:latency|bytes))?")
ACCURACY = re.compile(rf"(cosine|kl|drop)\s+{NUMBER}\s*(%|points?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What one figure may be at most.

    Attributes:
        metric: "latency" (seconds), "bytes" (of the searched layers), "cosine" (held as 1 -
            cosine), "kl" (nats) or "drop" (a share of the answers).
        limit: in these units, or as a multiple.
        of: "w8a8" or "float" where it is a multiple of theirs, None where it is absolute.
        text: as it was said.
    """

    metric: str
    limit: float
    of: str | None
    text: str

    @property
    def is_accuracy(self) -> bool:
        return self.metric in ACCURACIES


def read(budget: str | Sequence[str]) -> tuple[Budget, ...]:
    """All budgets that are to be kept.

    Raises:
        SchemeError: a text that is none; the message lists the forms.
    """
    texts = budget.split(",") if isinstance(budget, str) else budget
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts) or not texts:
        raise SchemeError(f"budget={budget!r}: give {FORMS}")
    found = tuple(_read(text.strip()) for text in texts)
    metrics = [each.metric for each in found]
    if twice := [m for m in metrics if metrics.count(m) > 1]:
        raise SchemeError(f"budget={budget!r} limits {twice[0]} twice: give the stricter one")
    return found


def _read(text: str) -> Budget:
    if match := RELATIVE.fullmatch(text):
        number, metric, of = match.groups()
        return _checked(Budget(metric.lower(), float(number), (of or "w8a8").lower(), text))
    if match := ABSOLUTE.fullmatch(text):
        number, unit = match.groups()
        metric = "latency" if unit in SECONDS else "bytes"
        return _checked(Budget(metric, float(number) * {**SECONDS, **BYTES}[unit], None, text))
    if match := ACCURACY.fullmatch(text):
        metric, number, percent = match.groups()
        metric, value = metric.lower(), float(number)
        if (metric == "drop") == bool(percent):
            limits = {"cosine": 1 - value, "kl": value, "drop": value / 100}
            return _checked(Budget(metric, limits[metric], None, text))
    raise SchemeError(f"budget {text!r} cannot be read: give {FORMS}")


def _checked(budget: Budget) -> Budget:
    inside = budget.limit > 0 and (budget.metric not in ("cosine", "drop") or budget.limit < 1)
    if not inside:
        ends = "between 0 and 1" if budget.metric == "cosine" else "above 0"
        raise SchemeError(f"budget {budget.text!r}: give a number {ends}")
    return budget
