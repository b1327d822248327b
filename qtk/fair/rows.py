"""A table as sentences of tokens: [CLS], and one token for each feature and value.

Token 0 is [CLS]; feature f with value v is the token 1 + (values of the features before f) + v. The
edges of numeric columns are those of the training rows and stay as they are: binned anew, a table
would be quantized twice.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from qtk import integrity
from qtk.errors import CalibrationError, SchemeError
from qtk.fair.domain import Attribute

FILE = "columns.json"
BINS = 16


@dataclass(frozen=True)
class Columns:
    """The features of a table.

    Attributes:
        names: of the features, in order.
        sizes: how many values each has.
        edges: by name, the inner edges of numeric features: value k is from edge k - 1 (included)
            to edge k. Other features hold 0 to size - 1 as they come.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    edges: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(
        cls, table: ArrayLike, names: Sequence[str], numeric: Sequence[str] = (), bins: int = BINS
    ) -> "Columns":
        """Of training rows [N, F]; numeric features get `bins` quantile bins, fewer where they tie.

        Raises:
            CalibrationError: not F columns, or a categorical one with values that are no codes.
        """
        values = np.asarray(table)
        if values.ndim != 2 or values.shape[1] != len(names) or not len(values):
            raise CalibrationError(
                f"the table has shape {list(values.shape)} for {len(names)} names; give [N, F]"
            )
        if unknown := set(numeric) - set(names):
            raise SchemeError(f"numeric names {sorted(unknown)}; there is: {', '.join(names)}")
        edges, sizes = {}, []
        for name, column in zip(names, values.T, strict=True):
            if name in numeric:
                cuts = np.unique(np.quantile(column, np.arange(1, bins) / bins))
                edges[name] = tuple(float(cut) for cut in cuts if cut > column.min())
                sizes.append(len(edges[name]) + 1)
            else:
                if (column != np.round(column)).any() or column.min() < 0:
                    raise CalibrationError(
                        f"column {name!r} holds {column.min()} to {column.max()}; give codes 0, 1, "
                        "2, ... or name it in numeric="
                    )
                sizes.append(int(column.max()) + 1)
        return cls(tuple(names), tuple(sizes), edges)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return 1 + sum(self.sizes)

    @property
    def domain(self) -> list[list[int]]:
        """The valid token ids of each of the F + 1 positions."""
        starts = self._starts()
        return [[0], *([*range(s, s + n)] for s, n in zip(starts, self.sizes, strict=True))]

    def attribute(self, name: str) -> Attribute:
        """A feature as a protected attribute, with all its values.

        Raises:
            SchemeError: there is no such feature.
        """
        if name not in self.names:
            raise SchemeError(f"no feature {name!r}; there is: {', '.join(self.names)}")
        position = 1 + self.names.index(name)
        values = self.domain[position]
        return Attribute(name, position, values, [str(value) for value in range(len(values))])

    def encode(self, table: ArrayLike) -> Tensor:
        """A table [N, F] as token ids [N, F + 1] int64.

        Raises:
            CalibrationError: another number of columns, or a code that no training row could have.
        """
        values = np.asarray(table)
        if values.ndim != 2 or values.shape[1] != len(self.names):
            raise CalibrationError(
                f"the table has shape {list(values.shape)}; its features are {len(self.names)}"
            )
        found = [torch.zeros(len(values), dtype=torch.long)]
        for name, start, size, column in zip(
            self.names, self._starts(), self.sizes, values.T, strict=True
        ):
            if name in self.edges:
                column = np.searchsorted(self.edges[name], column, side="right")
            elif len(column) and not (column.min() >= 0 and column.max() < size):
                raise CalibrationError(
                    f"column {name!r} holds {column.min()} to {column.max()}; it was made for 0 to "
                    f"{size - 1}"
                )
            found.append(start + torch.from_numpy(np.asarray(column).astype(np.int64)))
        return torch.stack(found, 1)

    def decode(self, rows: Tensor) -> Tensor:
        """Token ids [N, F + 1] -> values [N, F]; of numeric features, the numbers of bins."""
        return rows[:, 1:] - torch.tensor(self._starts())

    def read(self, file: str | Path, label: str) -> tuple[Tensor, Tensor | None]:
        """A CSV file with a head: token ids [N, F + 1], and labels [N] if it has that column.

        Raises:
            CalibrationError: not such a file, or without one of the features.
        """
        try:
            with Path(file).open(encoding="utf-8", newline="") as lines:
                held = list(csv.DictReader(lines))
            table = np.array([[float(row[name]) for name in self.names] for row in held])
            named = [int(row[label]) for row in held if row.get(label) is not None]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{file} is no table of {', '.join(self.names)}: {type(error).__name__} {error}"
            ) from None
        if not held:
            raise CalibrationError(f"{file} holds no row")
        return self.encode(table), torch.tensor(named) if len(named) == len(held) else None

    def save(self, folder: str | Path) -> None:
        """Writes columns.json, beside a model."""
        integrity.write_text(Path(folder) / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "Columns":
        """Reads columns.json, or the one in a folder.

        Raises:
            CalibrationError: there is none, or it is none of ours.
        """
        path = Path(file) / FILE if Path(file).is_dir() else Path(file)
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            edges = {name: tuple(map(float, cuts)) for name, cuts in held["edges"].items()}
            return cls(tuple(map(str, held["names"])), tuple(map(int, held["sizes"])), edges)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"{path} holds no columns ({error}); write it with Columns.save"
            ) from None

    def _starts(self) -> list[int]:
        return [1 + sum(self.sizes[:f]) for f in range(len(self.sizes))]
