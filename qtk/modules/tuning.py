"""Measured tiles for the GPU at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qtk.errors import BackendError
from qtk_kernels.dispatch import has_triton


def tune(
    folder: Path | None = None, minutes: float = 8.0, log: Callable[[str], Any] = print
) -> Path:
    """Measures the matrix products on this GPU and writes the table that they then follow.

    Raises:
        BackendError: there is no GPU or no Triton to measure with.
    """
    if not torch.cuda.is_available():
        raise BackendError("tune measures kernels on a GPU, and there is none on this machine")
    if not has_triton():
        raise BackendError("tune needs the package triton: pip install 'qtk-torch[gpu]'")
    from qtk_kernels.tune import tune as tune_kernels

    return tune_kernels(folder, minutes, log)
