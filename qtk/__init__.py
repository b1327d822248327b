"""qtk: low-bit integer BERT, OPT and ViT.

    qmodel = qtk.quantize(model, w=4, a=4, calib=sentences)

Importing this package also teaches transformers to load what qtk has saved.
"""

from qtk.integrations import quiet as _quiet  # noqa: F401, before all that imports transformers

# isort: split
from qtk.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    ModelError,
    QtkError,
    SchemeError,
)
from qtk.export import Exported, export
from qtk.fidelity import Fidelity, evaluate
from qtk.integrations.transformers import load
from qtk.pipeline import quantize
from qtk.report.summary import Summary, summary

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "Exported",
    "Fidelity",
    "ModelError",
    "QtkError",
    "SchemeError",
    "Summary",
    "evaluate",
    "export",
    "load",
    "quantize",
    "summary",
]
