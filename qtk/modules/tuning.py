"""Measured tiles for the GPU at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qtk.errors import BackendError


def tune(
    folder: Path | None = None, minutes: float = 8.0, log: Callable[[str], Any] = print
) -> Path:
    """Measures the matrix products on this GPU and writes the table that they then follow.

    Raises:
        BackendError: there is no GPU or no Triton to measure with.
    """
    if not torch.cuda.is_available():
        raise BackendError("tune measures kernels on a GPU, and there is none on this machine")
    from qtk_kernels._lang import triton

    if triton is None:
        raise BackendError("tune needs the package triton, which is not installed")
    from qtk_kernels import _tune

    return _tune.tune(folder, minutes, log)
