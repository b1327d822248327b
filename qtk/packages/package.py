"""One package: native code, weights included, for one size or for any."""

import hashlib
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtk.errors import BackendError, CheckpointError
from qtk.tracing import Quietly

ROWS, TOKENS = "rows", "tokens"
RUNNERS = 4  # calls that may be inside one package at a time; they share the weights

Axes = tuple[str | None, ...]  # of one tensor: which of its axes are rows or tokens
Size = tuple[int, int | None]  # rows and tokens; no tokens where there are pixels


@dataclass(frozen=True)
class Signature:
    """What packages of one kind read and write, in order.

    Attributes:
        inputs, outputs: axes by name.
        dtypes: of the inputs, "int64" or "float32".
        returns: the class of transformers that the outputs are fields of.
        caches: the model returns keys and values as well, where it is asked to.
    """

    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    dtypes: Mapping[str, str]
    returns: str
    caches: bool = False


class Package:
    """A .pt2 file that is ready to run; safe to call from several threads."""

    def __init__(self, path: Path, size: Size | None, home: Any = None) -> None:
        """
        Args:
            path: of the file, which must stay where it is.
            size: rows and tokens; None for any.
            home: keeps the file alive.

        Raises:
            BackendError: PyTorch cannot load it here.
        """
        self.path, self.size, self._home = path, size, home
        try:
            from torch._inductor.package import load_package  # as late as can be: it is slow

            with Quietly():
                loaded = load_package(str(path), num_runners=RUNNERS)
        except Exception as error:  # whatever a linker makes of a foreign file
            raise BackendError(f"{path} cannot be loaded: {str(error)[:300]}") from error
        self._run = loaded.loader.run

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, each a tensor of its own."""
        found: list[Tensor] = self._run(list(inputs))
        return found

    def copy_to(self, path: Path) -> None:
        """Raises CheckpointError where its file is gone."""
        try:
            shutil.copyfile(self.path, path)
        except OSError as error:
            raise CheckpointError(f"the package {self.path} is gone: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "content": self.path.read_bytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        home = tempfile.TemporaryDirectory(prefix="qtk-packages-")
        path = Path(home.name) / "model.pt2"
        path.write_bytes(state["content"])
        Package.__init__(self, path, state["size"], home)

    def __deepcopy__(self, memo: Any) -> "Package":
        return self


def here() -> dict[str, Any]:
    """What a package is bound to: it runs where all of these are the same."""
    found = torch.cpu.get_capabilities()
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": sorted(name for name, has in found.items() if has is True),
        "torch": torch.__version__,
    }


def key(of: Mapping[str, Any]) -> str:
    """The name of a folder of packages that are bound to `of`."""
    spelled = "-".join((of["machine"].replace(" ", "-"), *of["cpu"]))
    level = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    short = hashlib.sha256(spelled.encode()).hexdigest()[:8]
    return f"{level}-{short}-torch-{of['torch']}"


def fitted(inputs: Sequence[Tensor], signature: Signature, size: Size, pad_id: int) -> list[Tensor]:
    """Inputs of fewer rows and tokens, padded: tokens behind a mask, rows like the first one.

    Args:
        pad_id: the token to pad with.
    """
    filled = []
    for x, (name, axes) in zip(inputs, signature.inputs.items(), strict=True):
        wanted = _shape(x, axes, size)
        if list(x.shape) != wanted:
            y = x.new_full(wanted, pad_id if name == "input_ids" else 0)
            y[tuple(slice(n) for n in x.shape)] = x
            if wanted[0] > x.shape[0]:
                y[x.shape[0] :] = y[0]
            x = y
        filled.append(x)
    return filled


def cut(outputs: Sequence[Tensor], signature: Signature, size: Size) -> list[Tensor]:
    """Outputs without the rows and tokens that were padded."""
    found = []
    for y, axes in zip(outputs, signature.outputs.values(), strict=True):
        wanted = _shape(y, axes, size)
        found.append(y[tuple(slice(n) for n in wanted)].contiguous())
    return found


def _shape(x: Tensor, axes: Axes, size: Size) -> list[int]:
    sizes = {ROWS: size[0], TOKENS: size[1]}
    return [
        n if axis is None else int(sizes[axis] or n) for n, axis in zip(x.shape, axes, strict=True)
    ]
