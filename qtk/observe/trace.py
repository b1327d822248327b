"""What only a run tells of a network: the order of its layers, and which norms read them alone.

A BatchNorm in eval mode is a scale and a shift of every channel. Where it reads what a convolution
or linear gives, and nobody else reads that, both go into the layer's weight and bias:
(W x + b - mean) g / sd + beta.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qtk.observe.guard import reading
from qtk.observe.site import Batch

ROWS = 2  # images or sentences that are run
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ASKS = ("__get__", "size", "dim", "numel", "is_contiguous", "stride")  # of a tensor, not its values


@dataclass(frozen=True)
class Trace:
    """What was seen.

    Attributes:
        calls: how often each layer ran, in the order of their first calls.
        norms: the BatchNorms that can be folded, each with the layer that it reads.
    """

    calls: Counter[str]
    norms: dict[str, str]


@dataclass
class _Uses(TorchFunctionMode):
    """Counts the operations that read each of the tensors that are watched."""

    watched: list[Tensor] = field(default_factory=list)  # held, so that no id is given away again
    reads: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        if getattr(func, "__name__", "") not in ASKS:
            known = {id(x) for x in self.watched}
            self.reads.update(i for i in _ids((args, kwargs)) if i in known)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def trace(model: nn.Module, names: Sequence[str], batch: Batch) -> Trace:
    """Runs a few rows of a batch through a model in eval mode.

    Args:
        names: of the layers.

    Raises:
        CalibrationError: the model cannot read the batch.
    """
    modules = dict(model.named_modules())
    calls: Counter[str] = Counter()
    given: dict[int, str] = {}  # the layer whose output has this id
    outputs: dict[str, int] = {}
    read: dict[str, list[str | None]] = {n: [] for n, m in modules.items() if type(m) in NORMS}
    handles, uses = [], _Uses()

    def gives(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            calls[name] += 1
            given[id(out)], outputs[name] = name, id(out)
            uses.watched.append(out)

        return hook

    def reads(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            read[name] += [given.get(id(x)) for x in args]

        return hook

    for name in names:
        handles.append(modules[name].register_forward_hook(gives(name)))
    for name in read:
        handles.append(modules[name].register_forward_pre_hook(reads(name)))
    few = {k: v[:ROWS] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
    try:
        with reading("calibration batch 0"), uses:
            out = model(**few)
    finally:
        for handle in handles:
            handle.remove()
    uses.reads.update(_ids(out))  # who called the model reads it too
    norms = {}
    for norm, layers in read.items():
        layer = layers[0] if len(layers) == 1 else None
        if layer is not None and calls[layer] == 1 and uses.reads[outputs[layer]] == 1:
            norms[norm] = layer
    return Trace(calls, norms)


@torch.no_grad()
def fold(model: nn.Module, norms: dict[str, str]) -> tuple[str, ...]:
    """Moves BatchNorms into the layers that they read, in place, and leaves identities.

    Returns:
        Their names; one without running statistics stays.
    """
    folded = []
    for name, layer in norms.items():
        norm: Any = model.get_submodule(name)
        target: Any = model.get_submodule(layer)
        if norm.running_mean is None or norm.running_var is None:
            continue
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight.double()
        shift = -norm.running_mean.double() * factor
        shift = shift if norm.bias is None else shift + norm.bias.double()
        weight = target.weight
        bias = shift if target.bias is None else target.bias.double() * factor + shift
        rows = factor.view(-1, *[1] * (weight.dim() - 1))
        target.weight = nn.Parameter((weight.double() * rows).to(weight.dtype), False)
        target.bias = nn.Parameter(bias.to(weight.dtype), False)
        model.set_submodule(name, nn.Identity())
        folded.append(name)
    return tuple(folded)


def _ids(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [id(value)]
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (list, tuple, type({}.values()))):
        return [i for part in value for i in _ids(part)]
    return []
