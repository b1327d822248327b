"""What was found sample by sample, kept so that an interrupted study goes on where it was."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtk import integrity
from qtk.errors import CheckpointError

RIGHT, WRONG, UNSEEN = 1, 0, -1  # of a sample that was not judged
Bits = np.ndarray  # [N] int8 of these
Found = dict[str, Bits]  # by which model answered


class Cells:
    """Results by what they depend on: in a folder, or in memory where there is none."""

    def __init__(self, folder: Path | None, facts: Mapping[str, object]) -> None:
        self.folder, self.facts = folder, dict(facts)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, part: Mapping[str, object], compute: Callable[[], Found]) -> Found:
        """What an earlier run found about `part`, or what `compute` finds now.

        Raises:
            CheckpointError: a kept result cannot be read.
        """
        if self.folder is None:
            return compute()
        file = self.folder / f"{integrity.digest(self.facts, dict(part))[:24]}.json"
        if file.exists():
            return _read(file)
        found = compute()
        text = json.dumps({name: bits.tolist() for name, bits in found.items()})
        integrity.write_text(file, text)
        return found

    def of(self, role: str) -> "Cells":
        """For what depends on one of the models alone."""
        models: Any = self.facts.get("models", {})
        return Cells(self.folder, {**self.facts, "models": models.get(role)})

    def within(self, name: str) -> "Cells":
        """For a study of its own, beside this one."""
        return Cells(self.folder, {**self.facts, "within": name})


def _read(file: Path) -> Found:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {name: np.array(bits, dtype=np.int8) for name, bits in kept.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; delete it") from None
