"""qtk: low-bit integer BERT, OPT and ViT.

    qmodel = qtk.quantize(model, w=4, a=4, calib=sentences)

Importing this package also teaches transformers to load what qtk has saved.
"""

from qtk.integrations import quiet as _quiet  # noqa: F401, before all that imports transformers

# isort: split
from qtk.api import quantize
from qtk.compiler import compile
from qtk.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    ModelError,
    QtkError,
    SchemeError,
)
from qtk.fair.compare import fairness
from qtk.fair.domain import Attribute
from qtk.fair.result import Fairness
from qtk.fidelity import Fidelity, evaluate
from qtk.formats import Exported, export
from qtk.integrations.transformers import load
from qtk.mixed_precision.latency import Latencies
from qtk.mixed_precision.result import Search
from qtk.mixed_precision.search import bench_ops, search
from qtk.physical.front import Naturalness
from qtk.physical.patches import naturalness
from qtk.physical.xray import XRay, xray
from qtk.pipeline.files import quantize_files
from qtk.report.results import trust_page
from qtk.report.summary import Summary, summary
from qtk.robust import Robustness, random_precision, random_precision_training, robustness
from qtk.security.audit import Audit, audit
from qtk.security.cloning import steal
from qtk.security.theft import Theft

__version__ = "0.1.0"

__all__ = [
    "Attribute",
    "Audit",
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "Exported",
    "Fairness",
    "Fidelity",
    "Latencies",
    "ModelError",
    "Naturalness",
    "QtkError",
    "Robustness",
    "SchemeError",
    "Search",
    "Summary",
    "Theft",
    "XRay",
    "audit",
    "bench_ops",
    "compile",
    "evaluate",
    "export",
    "fairness",
    "load",
    "naturalness",
    "quantize",
    "quantize_files",
    "random_precision",
    "random_precision_training",
    "robustness",
    "search",
    "steal",
    "summary",
    "trust_page",
    "xray",
]
