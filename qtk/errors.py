"""The errors a user can act on: one family, each message names the place and the remedy."""


class QtkError(Exception):
    """Base of every error that qtk raises on purpose.

    QtkError
    ├── SchemeError        bits, group sizes, names of methods
    ├── ModelError         an architecture or a module that does not fit
    ├── CalibrationError   calibration data that cannot be used
    ├── CheckpointError    a saved model that cannot be trusted
    └── BackendError       no kernel for what was asked
    """


class SchemeError(QtkError, ValueError):
    """What was asked for does not exist or makes no sense."""


class ModelError(QtkError):
    """The model is not one that qtk knows, or is in the wrong state."""


class CalibrationError(QtkError, ValueError):
    """The calibration data is empty, not finite, or not what the model reads."""


class CheckpointError(QtkError):
    """A saved model has missing, extra, truncated or wrongly shaped parts."""


class BackendError(QtkError):
    """No kernel can run what was asked on the device at hand."""
