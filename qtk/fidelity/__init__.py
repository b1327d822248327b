"""How far a quantized model is from the float one, measured on data; and how fast each is."""

from qtk.fidelity.compare import Fidelity, evaluate

__all__ = ["Fidelity", "evaluate"]
