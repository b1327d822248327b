"""How long each operation of a model takes on this device at each scheme, as it would really run.

After OHQ's on-chip quantization awareness (https://arxiv.org/abs/2309.01945): every operation is
timed on the device that the model is for, at its real shape, with the quantizer before it and the
activation after it. A width without a kernel of its own is timed as what runs in its place, and the
table has that kernel's name.

What the operations do not account for (norms, softmax, additions, Python) is the rest of one
measured forward pass of the float model:

    latency(assignment) = float latency - sum of float operations + sum of operations as assigned
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CheckpointError
from qtk.mixed_precision.space import FLOATS, W8A8, Matrix, Pair, Space, Unit, name_of
from qtk.modules.linear import QuantLinear
from qtk.modules.products import Operands, product_of
from qtk.modules.reader import Reader
from qtk.observe import Batch, Site
from qtk.pipeline.site import rounded_to_nearest
from qtk.table import ruled
from qtk.timing import hardware, race

ROWS = 128  # of the noise that grids are found on
ROUNDS = 30
LIMIT = 2.0  # seconds that one operation is timed at all schemes
FASTER = 0.95  # of W8A8's time, from which on fewer bits count as faster
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Operation:
    """Linears that read one tensor, with the activation after them: M tokens, K channels.

    Attributes:
        outputs: channels of each linear.
        joined: integer products are one product, as in a fused block.
        normed: what they read is a LayerNorm's output.
        dtype: of the floats around them.
    """

    tokens: int
    inputs: int
    outputs: tuple[int, ...]
    activation: str | None
    joined: bool
    normed: bool
    dtype: str

    @property
    def name(self) -> str:
        outputs = "+".join(map(str, self.outputs))
        after = f" {self.activation}" if self.activation else ""
        return f"{self.tokens}x{self.inputs}->{outputs}{after}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one operation at one scheme, and the name of what ran."""

    seconds: float
    kernel: str


@dataclass
class Table:
    """Timings of one device and one set of versions.

    Attributes:
        device: what they depend on.
        times: by a text that names operation and scheme.
    """

    device: dict[str, Any]
    times: dict[str, Timing] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, device: torch.device) -> "Table":
        """This device's part of a file; empty where there is none.

        Raises:
            CheckpointError: the file holds no such tables.
        """
        here = facts(device)
        found = [table for table in _tables(path) if table["device"] == here]
        times = found[0]["times"] if found else {}
        return cls(here, {key: Timing(**value) for key, value in times.items()})

    def write(self, path: Path) -> None:
        """Beside the tables of other devices; whole or not at all."""
        others = [table for table in _tables(path) if table["device"] != self.device]
        mine = {"device": self.device, "times": {k: asdict(v) for k, v in self.times.items()}}
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps([*others, mine], indent=1), encoding="utf-8")
        os.replace(part, path)


@dataclass(frozen=True)
class Latencies:
    """Times of U units at S schemes.

    Attributes:
        operations: of each unit.
        seconds: [U, S].
        kernels: of each unit and scheme, what ran.
        float_seconds: of a forward pass of the float model.
        rest: what is left of it without its units.
    """

    operations: tuple[Operation, ...]
    schemes: tuple[Pair, ...]
    seconds: Matrix
    kernels: tuple[tuple[str, ...], ...]
    float_seconds: float
    rest: float
    device: dict[str, Any]

    @property
    def faster(self) -> tuple[Pair, ...]:
        """Schemes of fewer bits than W8A8 whose operations together take less time."""
        sums = dict(zip(self.schemes, self.seconds.sum(0), strict=True))
        if W8A8 not in sums:
            return ()
        fewer = [p for p in self.schemes if p not in (W8A8, FLOATS)]
        return tuple(pair for pair in fewer if sums[pair] < FASTER * sums[W8A8])

    def verdict(self) -> str:
        """Whether fewer bits are faster here, in a sentence."""
        sums = dict(zip(self.schemes, self.seconds.sum(0), strict=True))
        if self.faster:
            gains = (f"{name_of(p)} {sums[p] / sums[W8A8]:.2f}x" for p in self.faster)
            return f"faster than W8A8 on this device: {', '.join(gains)} of its time"
        if W8A8 not in sums:
            return "W8A8 is not among the schemes: nothing to compare with"
        against = f"; W8A8 takes {sums[W8A8] / sums[FLOATS]:.2f}x float's" if FLOATS in sums else ""
        return (
            "no scheme of fewer bits is faster than W8A8 on this device: its time is no reason to "
            f"take fewer bits, memory is{against}"
        )

    def table(self) -> str:
        """A line for each distinct operation and scheme."""
        rows, seen = [], set()
        for u, operation in enumerate(self.operations):
            if operation in seen:
                continue
            seen.add(operation)
            count = self.operations.count(operation)
            base = self.seconds[u, self.schemes.index(W8A8)] if W8A8 in self.schemes else None
            for s, pair in enumerate(self.schemes):
                us = 1e6 * self.seconds[u, s]
                ratio = "-" if base is None else f"{self.seconds[u, s] / base:.2f}"
                rows.append([operation.name, str(count), name_of(pair), f"{us:.0f}", ratio,
                             self.kernels[u][s]])  # fmt: skip
        head = ["operation", "times", "scheme", "us", "of W8A8", "kernel"]
        return "\n".join([*ruled(head, rows), "", self.verdict()])

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "float_seconds": self.float_seconds,
            "operations": [
                {**asdict(operation), "times": {
                    name_of(pair): {"seconds": self.seconds[u, s], "kernel": self.kernels[u][s]}
                    for s, pair in enumerate(self.schemes)
                }}
                for u, operation in enumerate(self.operations)
                if operation not in self.operations[:u]
            ],
            "verdict": self.verdict(),
        }  # fmt: skip


@torch.no_grad()
def measure(
    model: nn.Module, space: Space, batch: Batch, *, backend: str, path: Path | None = None,
    report: Report = lambda *_: None,
) -> Latencies:  # fmt: skip
    """Times every distinct operation that the table does not have yet, and the float model.

    Args:
        batch: what the model will be called with.
        path: a file of tables, read and written.
    """
    device = next(model.parameters()).device
    table = Table.read(path, device)
    operations = _operations(model, space, batch)
    distinct = dict(zip(operations, range(len(operations)), strict=True))
    for done, (operation, u) in enumerate(distinct.items()):
        report("timing operations", done, len(distinct))
        _fill(table, model, space, u, operation, backend)
        if path is not None:
            table.write(path)
    found = [
        [table.times[_key(op, space, u, s, backend)] for s in range(len(space.schemes))]
        for u, op in enumerate(operations)
    ]
    seconds = np.array([[timing.seconds for timing in row] for row in found])
    whole = race({"float": lambda: model(**batch)}, ROUNDS, limit=LIMIT)["float"]
    floats = [table.times[_float_key(operation)].seconds for operation in operations]
    kernels = tuple(tuple(timing.kernel for timing in row) for row in found)
    rest = max(whole - sum(floats), 0.0)
    return Latencies(tuple(operations), space.schemes, seconds, kernels, whole, rest, table.device)


def facts(device: torch.device) -> dict[str, Any]:
    """What timings depend on."""
    found = {**hardware(), "transformers": transformers.__version__}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _tables(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for table in found:
            assert isinstance(table["device"], dict)
            [Timing(**value) for value in table["times"].values()]
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError) as error:
        raise CheckpointError(
            f"latencies={str(path)!r} holds no table of operations ({error}): delete it, or name "
            "another file"
        ) from None
    return list(found)


def _operations(model: nn.Module, space: Space, batch: Batch) -> list[Operation]:
    """What each unit computes when the model reads a batch."""
    tokens: dict[str, int] = {}
    with ExitStack() as hooks:
        for unit in space.units:

            def count(_: nn.Module, args: tuple[Tensor, ...], name: str = unit.name) -> None:
                tokens[name] = args[0].numel() // args[0].shape[-1]

            module = model.get_submodule(unit.linears[0])
            hooks.callback(module.register_forward_pre_hook(count).remove)
        model(**batch)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [_operation(unit, tokens[unit.name], dtype) for unit in space.units]


def _operation(unit: Unit, tokens: int, dtype: str) -> Operation:
    anatomy, activation = unit.block.anatomy, None
    if anatomy is not None and unit.group.name == "up" and not anatomy.mlp.gated:
        activation = anatomy.mlp.activation
    return Operation(
        tokens, unit.shapes[0][1], tuple(N for N, _ in unit.shapes), activation,
        anatomy is not None and anatomy.mlp.activation is not None, unit.group.norm is not None,
        dtype,
    )  # fmt: skip


def _key(operation: Operation, space: Space, u: int, s: int, backend: str) -> str:
    """The operation, and everything of the scheme that changes what runs."""
    choices = [space.assignments[s].inside[name] for name in space.units[u].linears]
    if choices[0].scheme.w is None:
        return _float_key(operation)
    made = [f"{c.scheme} {c.recipe.method}" for c in dict.fromkeys(choices)]
    return f"{operation} {backend} {made}"


def _fill(
    table: Table, model: nn.Module, space: Space, u: int, operation: Operation, backend: str
) -> None:
    """Times an operation at the schemes that are not in the table, beside each other.

    Schemes that run the same are timed once: what differs between them is noise.
    """
    site = _noise(model, space.units[u], operation)
    x = site.sequences[0][0][0].repeat(-(-operation.tokens // ROWS), 1)[: operation.tokens]
    x = x.to(getattr(torch, operation.dtype))
    floats = _runs([], list(site.linears.values()), x, operation)
    found = {_float_key(operation): floats}
    for s, assignment in enumerate(space.assignments):
        key = _key(operation, space, u, s, backend)
        if key not in table.times and key not in found:
            layers = [layer for _, layer in rounded_to_nearest(site, assignment, backend)]
            found[key] = _runs(layers, list(site.linears.values()), x, operation)
    missing = {key: runs for key, runs in found.items() if key not in table.times}
    distinct = {runs.like: runs.call for runs in missing.values()}
    seconds = race(distinct, ROUNDS, limit=LIMIT) if distinct else {}
    table.times |= {key: Timing(seconds[r.like], r.kernel) for key, r in missing.items()}


def _float_key(operation: Operation) -> str:
    return f"{operation} float"


def _noise(model: nn.Module, unit: Unit, operation: Operation) -> Site:
    """The unit's own linears, reading normal noise."""
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in unit.linears}
    weight = next(iter(linears.values())).weight
    rows = torch.randn(ROWS, operation.inputs, generator=torch.Generator().manual_seed(0))
    rows = rows.to(weight.device)
    mask = torch.ones(1, ROWS, dtype=torch.bool, device=weight.device)
    ends = rows.amin(0, keepdim=True), rows.amax(0, keepdim=True)
    return Site(unit.block, unit.group, linears, [(rows[None], mask)], rows, *ends)


@dataclass(frozen=True)
class _Runs:
    """One operation, ready to run.

    Attributes:
        kernel: its product's name.
        like: what tells it from others that run something else.
    """

    call: Callable[[], Any]
    kernel: str
    like: str


def _runs(
    layers: Sequence[QuantLinear], linears: Sequence[nn.Module], x: Tensor, operation: Operation
) -> _Runs:
    """One operation as it runs; without layers in floating point."""
    after = ACTIVATIONS.get(operation.activation or "", lambda y: y)
    if not layers:
        kernel = f"torch linear {operation.dtype}"
        return _Runs(lambda: [after(linear(x)) for linear in linears], kernel, kernel)
    reader, kernel = layers[0].reader, layers[0].kernel
    like = f"{kernel} {_reading(reader)} {layers[0].weight_scale.shape[1]}"
    if not operation.joined or layers[0].scheme.a is None:
        return _Runs(lambda: [after(layer(x)) for layer in layers], kernel, like)
    if len(layers) == 1:
        product = layers[0].product
    else:
        parts = Operands.joined([layer.operands() for layer in layers])
        product = product_of(parts, reader.backend)
    if operation.activation is not None:
        product = product.activated(operation.activation)
    return _Runs(lambda: product(*reader(x), x.dtype), product.name, like)


def _reading(reader: Reader) -> str:
    """What a reader does, whatever the numbers that it does it with."""
    static = None if reader.codes is None else (reader.codes.static, reader.codes.clip != 1)
    maps = reader.before is not None, reader.rotation, reader.after is not None
    return f"{static} {maps} {reader.fp8}"
