"""What took long to find, in a folder from which an interrupted run goes on, or nowhere."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qtk import integrity

Tensors = dict[str, Tensor]


class Kept:
    """Tensors by what they depend on."""

    def __init__(self, folder: str | Path | None, *facts: object) -> None:
        self.folder, self.facts = None if folder is None else Path(folder), facts
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, facts: object, make: Callable[[], Tensors]) -> Tensors:
        """What an earlier run made of `facts`, or what `make` makes now.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        if self.folder is None:
            return make()
        file = self.folder / f"{integrity.digest(*self.facts, facts)[:32]}.safetensors"
        if file.exists():
            return integrity.read(file)[0]
        made = make()
        integrity.write(file, made, {})
        return made
