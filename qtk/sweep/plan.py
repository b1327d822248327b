"""What a sweep runs, from a TOML file.

models = ["path/one", "path/two"]      # folders or hub names
calib = "train.txt"                    # as `quantize` takes it; leave it out for none
data = "test.txt"                      # what fidelity is measured on
samples = 256                          # of it; all if left out
seed = 0

[schemes.w8a8]                         # any name, and arguments of `quantize`
w = 8
a = 8
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtk import integrity
from qtk.errors import SchemeError
from qtk.pipeline.request import DEFAULTS

KNOWN = {"models": list, "schemes": dict, "calib": str, "data": str, "samples": int, "seed": int}
NEEDED = ("models", "schemes", "data")


@dataclass(frozen=True)
class Cell:
    """One model in one scheme.

    Attributes:
        options: arguments of `quantize`.
        about: sizes and times of the files it reads, so that a change of them makes it another.
    """

    model: str
    scheme: str
    options: Mapping[str, Any]
    calib: str | None
    data: str
    samples: int | None
    seed: int
    about: list[Any] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Tells it from all others, between sweeps too."""
        return integrity.digest({**asdict(self), "options": dict(self.options)})[:16]


def read(path: Path) -> list[Cell]:
    """The cells of a sweep, model after model.

    Raises:
        SchemeError: the file cannot be read, lacks something, or says what nobody knows.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SchemeError(f"{path} cannot be read: {error}") from None
    for name, value in found.items():
        if name not in KNOWN or not isinstance(value, KNOWN[name]):
            raise SchemeError(
                f"{path}: {name} = {value!r}; a sweep has {', '.join(KNOWN)}, each of its own type"
            )
    if missing := [name for name in NEEDED if not found.get(name)]:
        raise SchemeError(f"{path} has no {', '.join(missing)}")
    for name, options in found["schemes"].items():
        unknown = sorted(set(options) - {"w", "a", *DEFAULTS})
        if unknown:
            raise SchemeError(
                f"{path}: schemes.{name} has {', '.join(unknown)}, which is no option"
            )
    return [
        Cell(
            str(model), name, options, found.get("calib"), found["data"], found.get("samples"),
            found.get("seed", 0), _about(model, found.get("calib"), found["data"]),
        )
        for model in found["models"] for name, options in found["schemes"].items()
    ]  # fmt: skip


def _about(*names: str | None) -> list[Any]:
    """Size and time of files, and of what lies in folders."""
    found: list[Any] = []
    for name in names:
        path = Path(name or "")
        inside = sorted(path.iterdir()) if name and path.is_dir() else [path]
        files = [p.stat() for p in inside if name and p.is_file()]
        found.append([[stat.st_size, stat.st_mtime_ns] for stat in files])
    return found
