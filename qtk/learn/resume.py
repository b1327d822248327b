"""The file in which learning keeps its state, so that an interruption costs little.

The last state, of a run that ended, stays too: a second run turns it into the model at once.
"""

from pathlib import Path

from torch import Tensor

from qtk import integrity
from qtk.errors import CheckpointError

RUN = "identity"  # the key of the metadata


def read(path: Path, identity: str) -> dict[str, Tensor]:
    """The state that was kept; empty where there is none yet.

    Raises:
        CheckpointError: it cannot be read, or is another run's.
    """
    if not path.exists():
        return {}
    try:
        state, metadata = integrity.read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it") from None
    if metadata.get(RUN) != identity:
        raise CheckpointError(
            f"{path} is of another model, data, seed or scheme; delete it, or name another folder"
        )
    return state


def write(path: Path, state: dict[str, Tensor], identity: str) -> None:
    """Whole or not at all."""
    integrity.write(path, state, {RUN: identity})
