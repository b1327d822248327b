"""How robust a quantized model is beside the float one, measured so that weak attacks show."""

from qtk.robust.measure import robustness
from qtk.robust.page import write_report
from qtk.robust.precision import RandomPrecision, random_precision
from qtk.robust.result import Check, Robustness, Row
from qtk.robust.training import SwitchablePrecision, random_precision_training
from qtk.robust.transfer import Transfer, precision_transfer

__all__ = [
    "Check",
    "RandomPrecision",
    "Robustness",
    "Row",
    "SwitchablePrecision",
    "Transfer",
    "precision_transfer",
    "random_precision",
    "random_precision_training",
    "robustness",
    "write_report",
]
