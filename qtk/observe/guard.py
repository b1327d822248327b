"""A batch that a model cannot read is a mistake in the data, and is reported as one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qtk.errors import CalibrationError, QtkError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Names the batch in what a model or processor raises on it.

    Args:
        what: the batch in words, such as "calibration batch 3".

    Raises:
        CalibrationError: in place of any error that wrong input leads to.
    """
    try:
        yield
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, (QtkError, torch.OutOfMemoryError)):
            raise
        raise CalibrationError(f"the model cannot read {what}: {error}") from error
