"""What a search chooses from: the groups of linears that share a scheme, and the schemes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qtk.errors import SchemeError
from qtk.models import Block, Group
from qtk.modules.storage import stored_shape
from qtk.pipeline.assign import Assignment, assign
from qtk.pipeline.request import Request
from qtk.scheme import FLOAT, FP8, Format

Pair = tuple[int | str, int | str]  # (w, a), as quantize(bits=...) takes them
Chosen = tuple[int, ...]  # the index of a scheme for each unit
Matrix = np.ndarray[Any, np.dtype[np.float64]]  # [units, schemes]

W8A8: Pair = (8, 8)
FLOATS: Pair = (FLOAT, FLOAT)
SCHEMES: tuple[Pair, ...] = (W8A8, (6, 8), (5, 8), (4, 8), (4, 4), (4, FLOAT), FLOATS)
FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply e4m3


@dataclass(frozen=True)
class Unit:
    """Linears that read one tensor, and so share one input quantizer and one scheme.

    Attributes:
        linears: full names.
        shapes: (N, K) of each.
    """

    block: Block
    group: Group
    linears: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return f"{self.block.name}.{self.group.name}"

    @property
    def weights(self) -> int:
        return sum(N * K for N, K in self.shapes)


@dataclass(frozen=True)
class Space:
    """U units, each of which takes one of S schemes.

    Attributes:
        assignments: what every linear becomes where all take a scheme, by scheme.
    """

    units: tuple[Unit, ...]
    schemes: tuple[Pair, ...]
    assignments: tuple[Assignment, ...]

    @classmethod
    def of(
        cls, model: nn.Module, blocks: Sequence[Block], schemes: Sequence[Pair], calib: object,
        options: Mapping[str, Any],
    ) -> "Space":  # fmt: skip
        """All linears of the blocks but those that options["skip"] leaves out.

        Args:
            calib: None where there is no data.
            options: of `Request.of`, but for w, a and bits.

        Raises:
            SchemeError: a scheme that does not exist, or nothing to choose.
        """
        schemes = tuple(dict.fromkeys(schemes))
        requests = [Request.of(w, a, calib, bits=None, **options) for w, a in schemes]
        found = tuple(assign(model, blocks, r.default, r.overrides) for r in requests)
        searched = {name for assignment in found for name in assignment.quantized}
        units = []
        for block in blocks:
            for group in block.groups:
                names = tuple(name for name in group.linears if name in searched)
                linears: list[Any] = [model.get_submodule(name) for name in names]
                shapes = tuple((m.out_features, m.in_features) for m in linears)
                if names:
                    units.append(Unit(block, group, names, shapes))
        if not units or len(schemes) < 2:
            raise SchemeError(
                "nothing to choose: skip matches every linear, or there is one scheme"
            )
        return cls(tuple(units), schemes, found)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.units), len(self.schemes)

    def uniform(self, scheme: Pair) -> Chosen:
        return (self.schemes.index(scheme),) * len(self.units)

    def bits(self, chosen: Chosen) -> dict[str, Pair]:
        """As `quantize(bits=...)` takes them."""
        pairs = zip(self.units, chosen, strict=True)
        return {name: self.schemes[s] for unit, s in pairs for name in unit.linears}

    def bytes(self) -> Matrix:
        """[U, S]: the units' weights with scales and zero points, as they are stored."""
        return np.array([
            [sum(_size(found.inside[name].scheme.w, *shape)
                 for name, shape in zip(unit.linears, unit.shapes, strict=True))
             for found in self.assignments]
            for unit in self.units
        ], dtype=float)  # fmt: skip


def name_of(pair: Pair) -> str:
    """(4, 8) -> "W4A8"."""
    w, a = pair
    return "float" if pair == FLOATS else "FP8" if w == FP8 else f"W{w}A{a}"


def default_schemes(device: torch.device) -> tuple[Pair, ...]:
    """Those that this device is asked about."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return SCHEMES
    return (*SCHEMES, (FP8, FP8))


def _size(w: Format | None, N: int, K: int) -> int:
    if w is None:
        return 4 * N * K
    groups = 1 if w.group_size is None else -(-K // w.group_size)
    _, (width, _) = stored_shape(K, w.bits)
    return N * (width + groups * (4 if w.symmetric else 5))
