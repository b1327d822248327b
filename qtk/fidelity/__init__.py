"""How far a quantized model is from the float one, measured on data."""

from qtk.fidelity.compare import Fidelity, evaluate

__all__ = ["Fidelity", "evaluate"]
