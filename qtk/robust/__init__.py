"""How robust a quantized model is beside the float one, measured so that weak attacks show."""

from qtk.robust.measure import robustness
from qtk.robust.result import Check, Robustness, Row

__all__ = ["Check", "Robustness", "Row", "robustness"]
