"""The folder in which `quantize` keeps every finished block, so that an interruption costs one.

state.json                  which run it is of
block-3.safetensors         a finished block: its tensors, and in the metadata how it was made
learning.safetensors        what learn="model" goes on from
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qtk import integrity, ranks
from qtk.errors import CheckpointError, SchemeError
from qtk.learn import resume
from qtk.learn.descent import Learned
from qtk.observe import Batch
from qtk.pipeline.request import Request
from qtk.record import Layer

RUN, LEARNING = "state.json", "learning.safetensors"
OURS = (RUN, LEARNING, "block-*.safetensors", "*.part")


@dataclass(frozen=True)
class Finished:
    """A block that is done.

    Attributes:
        tensors: its state_dict.
        layers: how its linears were made, by full name.
        learned: what learning it came to, where it was learned.
    """

    tensors: dict[str, Tensor]
    layers: dict[str, Layer]
    learned: Learned | None = None


@dataclass(frozen=True)
class State:
    """A folder of finished blocks of one run."""

    folder: Path
    run: str

    @classmethod
    def open(cls, folder: Path, run: str) -> "State":
        """The folder's state, begun where there is none.

        Raises:
            CheckpointError: it is of another run, or holds something else.
        """
        ranks.from_first(lambda: _claim(folder, run))
        return cls(folder, run)

    @property
    def learning(self) -> Path:
        return self.folder / LEARNING

    def block(self, index: int) -> Finished | None:
        """A block that was finished before; what rank 0 has counts."""
        return ranks.from_first(lambda: self._read(index))

    def keep(self, index: int, block: Finished) -> None:
        """Keeps a finished block, whole or not at all."""
        if ranks.rank() == 0:
            learned = block.learned and [block.learned.before, block.learned.after]
            told = {"layers": {n: x.to_dict() for n, x in block.layers.items()}, "learned": learned}
            tensors = {name: x.contiguous().clone() for name, x in block.tensors.items()}
            made = {resume.RUN: self.run, "made": json.dumps(told)}
            integrity.write(self.file(index), tensors, made)

    def file(self, index: int) -> Path:
        return self.folder / f"block-{index}.safetensors"

    def _read(self, index: int) -> Finished | None:
        file = self.file(index)
        if not file.exists():
            return None
        try:
            tensors, metadata = integrity.read(file)
            told = json.loads(metadata["made"])
        except (CheckpointError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file}: {error}; delete it, and its block is made again"
            ) from None
        layers = {name: Layer.from_dict(layer, name) for name, layer in told["layers"].items()}
        return Finished(tensors, layers, told["learned"] and Learned(*told["learned"]))


def check(given: object) -> Path | None:
    """The folder, once it is known that a state can be kept there.

    Raises:
        SchemeError: not a path, a file, or in a folder that is not there or cannot be written to.
    """
    if given is None:
        return None
    if not isinstance(given, (str, os.PathLike)) or not str(given):
        raise SchemeError(f"resume={given!r}: give the path of a folder to keep the state in")
    path = Path(given)
    if path.exists() and not path.is_dir():
        raise SchemeError(f"resume={str(path)!r} is a file; give a folder to keep the state in")
    if not path.exists() and not path.parent.is_dir():
        raise SchemeError(f"resume={str(path)!r} lies in {str(path.parent)!r}, which is no folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SchemeError(f"resume={str(path)!r} cannot be written to; give another folder")
    return path


def discard(folder: Path) -> None:
    """Deletes a state, once the model is saved; what else lies in the folder stays."""
    for pattern in OURS:
        for file in folder.glob(pattern):
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def identity(weights: Any, request: Request, batches: Sequence[Batch] | None, backend: str) -> str:
    """Tells one run from another: model, data, everything that was asked for, and the seed.

    A part of the caller's own counts by its name and settings.

    Args:
        weights: what stands for the float model's weights.
    """
    data = [{n: integrity.checksum(v) for n, v in batch.items()} for batch in batches or ()]
    attention = request.attention and request.attention.to_dict()
    return integrity.digest(weights, data, request.facts(), attention, request.seed, backend)


def _claim(folder: Path, run: str) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / RUN
    if file.exists():
        if _json(file) != {"run": run}:
            raise CheckpointError(
                f"resume={str(folder)!r} is of another model, data, seed or scheme; delete it, or "
                "name another folder"
            )
        return
    if any(not path.name.endswith(".part") for path in folder.iterdir()):
        raise CheckpointError(f"resume={str(folder)!r} holds other files: name a folder of its own")
    integrity.write_text(file, json.dumps({"run": run}))


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; delete its folder") from None
