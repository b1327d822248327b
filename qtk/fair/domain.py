"""What a row may be: the valid tokens of each position, and the one that must not matter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtk.errors import CalibrationError, SchemeError


@dataclass(frozen=True)
class Attribute:
    """A protected attribute of rows of tokens.

    Attributes:
        name: for tables: "sex".
        position: in a row, counted from 0, the first token included.
        values: token ids that it may have, two at least. The first is group 0; all others
            together are group 1.
        labels: what tables call the values; their ids if not given.

    Raises:
        SchemeError: fewer than two values, equal ones, or a negative position.
    """

    name: str
    position: int
    values: Sequence[int]
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(int(value) for value in self.values))
        object.__setattr__(self, "labels", tuple(self.labels) or tuple(map(str, self.values)))
        if len(self.labels) != len(self.values):
            raise SchemeError(
                f"attribute {self.name!r} has {len(self.values)} values and {len(self.labels)} "
                "labels; give one for each"
            )
        if len(self.values) < 2 or len(set(self.values)) < len(self.values):
            raise SchemeError(
                f"attribute {self.name!r} has the values {list(self.values)}; give two token ids "
                "at least, all different"
            )
        if self.position < 0:
            raise SchemeError(
                f"attribute {self.name!r} is at position {self.position}; count from 0"
            )

    def everyone(self, rows: Tensor) -> Tensor:
        """[N, T] -> [N, V, T]: each row once with every value."""
        found = rows[:, None, :].repeat(1, len(self.values), 1)
        found[:, :, self.position] = torch.tensor(self.values)
        return found

    def unique(self, rows: Tensor) -> Tensor:
        """[N, T] -> [M, T]: the different rows, the protected position set to the first value."""
        rows = rows.clone()
        rows[:, self.position] = self.values[0]
        return torch.unique(rows, dim=0)

    def group(self, rows: Tensor) -> Tensor:
        """[N, T] -> [N] int64: 0 for the first value, 1 for the others."""
        return (rows[:, self.position] != self.values[0]).long()


@dataclass(frozen=True)
class Domain:
    """All rows that are valid: any combination of the ids of each position.

    Attributes:
        ids: a tuple of token ids for each position.
    """

    ids: tuple[tuple[int, ...], ...]
    _places: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, rows: Tensor, attributes: Sequence[Attribute], given: Sequence[Sequence[int]] | None
    ) -> "Domain":
        """Of what was given, or of the ids that occur in the rows.

        Raises:
            SchemeError: an attribute beyond the rows, or with values that are not valid there.
            CalibrationError: a row that is not valid.
        """
        width = rows.shape[1]
        for attribute in attributes:
            if attribute.position >= width:
                raise SchemeError(
                    f"attribute {attribute.name!r} is at position {attribute.position}, but rows "
                    f"have {width} tokens: 0 to {width - 1}"
                )
        if given is None:
            seen = [set(column.unique().tolist()) for column in rows.T]
            for attribute in attributes:
                seen[attribute.position] |= set(attribute.values)
            given = [sorted(ids) for ids in seen]
        if len(given) != width:
            raise SchemeError(f"domain has {len(given)} positions, rows have {width} tokens")
        domain = cls(tuple(tuple(int(i) for i in ids) for ids in given))
        for attribute in attributes:
            if wrong := set(attribute.values) - set(domain.ids[attribute.position]):
                raise SchemeError(
                    f"attribute {attribute.name!r} has the values {sorted(wrong)}, which are not "
                    f"in the domain of position {attribute.position}"
                )
            if missing := set(domain.ids[attribute.position]) - set(attribute.values):
                raise SchemeError(
                    f"position {attribute.position} also has {sorted(missing)[:5]}, which are no "
                    f"values of attribute {attribute.name!r}: name them all"
                )
        domain.ordinals(rows)
        return domain

    @property
    def sizes(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    def without(self, attribute: Attribute) -> "Domain":
        """The rows that differ in more than the attribute: its position has the first value."""
        ids = list(self.ids)
        ids[attribute.position] = (attribute.values[0],)
        return Domain(tuple(ids))

    def ordinals(self, rows: Tensor) -> Tensor:
        """Token ids [N, T] -> places [N, T] in the lists of ids.

        Raises:
            CalibrationError: an id that is not valid where it stands.
        """
        found = torch.empty_like(rows)
        for position, ids in enumerate(self.ids):
            place = self._place(position, ids)
            column = rows[:, position]
            inside = (column >= 0) & (column < len(place))
            found[:, position] = torch.where(inside, place[column.clamp(0, len(place) - 1)], -1)
            if (wrong := found[:, position] < 0).any():
                row = int(wrong.nonzero()[0])
                raise CalibrationError(
                    f"row {row} has token {int(column[row])} at position {position}, where "
                    f"{list(ids)[:8]} are valid; give domain= or mend the row"
                )
        return found

    def tokens(self, ordinals: Tensor) -> Tensor:
        """The reverse of `ordinals`."""
        columns = [torch.tensor(ids)[ordinals[:, p]] for p, ids in enumerate(self.ids)]
        return torch.stack(columns, 1)

    def index(self, rows: Tensor) -> Tensor:
        """[N, T] -> [N], the number of each row among all rows."""
        found = torch.zeros(len(rows), dtype=torch.long)
        for ordinal, size in zip(self.ordinals(rows).T, self.sizes, strict=True):
            found = found * size + ordinal
        return found

    def rows(self, index: Tensor) -> Tensor:
        """The reverse of `index`."""
        columns = []
        for size in reversed(self.sizes):
            columns.append(index % size)
            index = index // size
        return self.tokens(torch.stack(columns[::-1], 1))

    def all(self) -> Tensor:
        """[size, T], in the order of their numbers."""
        return self.rows(torch.arange(self.size))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, T], each valid row as likely as any other."""
        columns = [torch.randint(size, (n,), generator=generator) for size in self.sizes]
        return self.tokens(torch.stack(columns, 1))

    def _place(self, position: int, ids: tuple[int, ...]) -> Tensor:
        if position not in self._places:
            place = torch.full((max(ids) + 1,), -1)
            place[list(ids)] = torch.arange(len(ids))
            self._places[position] = place
        return self._places[position]
