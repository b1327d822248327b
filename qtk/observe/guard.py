"""A batch that a model cannot read is a mistake in the data, and is reported as one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qtk.errors import CalibrationError, QtkError

CANNOT_READ = (
    ValueError, TypeError, LookupError, RuntimeError, AttributeError, AssertionError,
)  # fmt: skip


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
    except (QtkError, torch.OutOfMemoryError):
        raise
    except CANNOT_READ as error:
        raise CalibrationError(f"the model cannot read {what}: {error}") from error
