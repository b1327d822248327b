"""How far a quantized model is from the float one, measured on data."""

from qtk.fidelity.compare import evaluate
from qtk.fidelity.result import Fidelity

__all__ = ["Fidelity", "evaluate"]
