"""The file in which learning keeps its state, so that an interruption costs little.

The last state, of a run that ended, stays too: a second run turns it into the model at once. So the
file is deleted by whoever has saved the model.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtk.errors import CheckpointError, SchemeError


def check(resume: object) -> Path | None:
    """The path, once it is known that a state can be written there.

    Raises:
        SchemeError: not a path, or in a folder that is not there or cannot be written to.
        CheckpointError: a file that holds no state.
    """
    if resume is None:
        return None
    if not isinstance(resume, (str, os.PathLike)) or not str(resume):
        raise SchemeError(f"resume={resume!r}: give the path of a file to keep the state in")
    path = Path(resume)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"lies in {str(path.parent)!r}, which is none"
        raise SchemeError(f"resume={str(path)!r} {what}; give a file in a folder that is there")
    if not os.access(path.parent, os.W_OK):
        raise SchemeError(f"resume={str(path)!r}: its folder cannot be written to; give another")
    if path.exists():
        _open(path)
    return path


def identity_of(*facts: Any) -> str:
    """Tells one run from another: its layers and where they start, its data, seed and steps."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read(path: Path, identity: str) -> dict[str, Tensor]:
    """The state that was kept; empty where there is none yet.

    Raises:
        CheckpointError: it cannot be read, or is another run's.
    """
    if not path.exists():
        return {}
    found, state = _open(path)
    if found != identity:
        raise CheckpointError(
            f"resume={str(path)!r} is of another model, data, seed or scheme; delete it, or name "
            "another file"
        )
    return state


def write(path: Path, state: dict[str, Tensor], identity: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    save_file(state, part, metadata={"identity": identity})
    os.replace(part, path)


def _open(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            names: Sequence[str] = file.keys()
            state = {name: file.get_tensor(name) for name in names}
            return (file.metadata() or {}).get("identity"), state
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"resume={str(path)!r} cannot be read: {error}; delete it") from None
