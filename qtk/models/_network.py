"""Any network of convolutions and linears, without a file of names: its blocks are its children.

Families of convolutions (ResNet, MobileNet) name their blocks, and are the same otherwise. A list
of modules counts as its elements. What order they run in, and whether one reads what the one before
it gives, only a run can tell (`qtk.observe.trace`).
"""

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from qtk.errors import ModelError
from qtk.models import Block, Group

KINDS = (nn.Conv2d, nn.Linear)
LISTS = (nn.Sequential, nn.ModuleList)


def blocks(model: nn.Module, wanted: Sequence[str] | None = None) -> Iterator[Block]:
    """The blocks, in the order in which they were registered; every layer is a group of its own.

    Args:
        wanted: patterns of the names of the blocks; by default every child that has a layer.

    Raises:
        ModelError: the model is one layer, has none, or none in a module that is wanted.
    """
    cls = type(model).__name__
    if is_layer(model):
        raise ModelError(f"a {cls} is a single layer: put it into an nn.Sequential")
    names = layers_of(model)
    if not names:
        raise ModelError(f"a {cls} has no Conv2d and no Linear, so there is nothing to quantize")
    inside = {block: _inside(block, names) for block in _named(model, wanted)}
    if wanted is not None and not any(inside.values()):
        raise ModelError(
            f"blocks={list(wanted)!r}: no such module of {cls} has a Conv2d or Linear, such as "
            f"{names[0]!r}"
        )
    for block, found in inside.items():
        if found:
            groups = (Group(n.removeprefix(block).lstrip(".") or "layer", (n,)) for n in found)
            yield Block(block, tuple(groups), follows=False)


def named(model: nn.Module, *, patterns: Sequence[str], base: str) -> Iterator[Block]:
    """The blocks of a family of convolutions; its classifier lies outside, as every head does.

    Args:
        patterns: names inside the base model, which is `model` or its child `base`.
    """
    prefix = f"{base}." if hasattr(model, base) else ""
    return blocks(model, [prefix + pattern for pattern in patterns])


def layers_of(model: nn.Module) -> list[str]:
    """Full names of all convolutions and linears, in floating point or in integers."""
    found: list[str] = []
    for name, module in model.named_modules():
        if is_layer(module) and not (found and name.startswith(f"{found[-1]}.")):
            found.append(name)
    return found


def is_layer(module: nn.Module) -> bool:
    """Whether it is such a layer itself; a subclass may compute something else."""
    return getattr(type(module), "REPLACES", type(module)) in KINDS


def _named(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return [*_children(model, "")]
    named = [n for n, _ in model.named_modules() if n]
    matched = [n for n in named if any(fnmatch.fnmatch(n, pattern) for pattern in wanted)]
    return [n for n in matched if not any(n.startswith(f"{other}.") for other in matched)]


def _children(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, LISTS):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _inside(block: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name == block or name.startswith(f"{block}.")]
