"""What a launch needs beside tensors, worked out once for the signature of a call.

A signature is shapes, strides, dtypes and options: one hash of a tuple stands for all checks,
tiles, grids and compile-time parameters of a call whose like was seen before. Errors are not kept.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from math import prod
from types import NoneType
from typing import Any, Protocol, Self, get_args

import torch
from torch import Tensor

SIGNATURES = 4096  # that each op remembers: lengths of sequences are many
_caches: list[Any] = []


@dataclass(frozen=True, slots=True)
class Plan:
    """A launch.

    Attributes:
        copy: the rows of the activations are not evenly spaced: they are copied first.
        results: shape and dtype of what the launcher allocates.
        grid: programs.
        numbers: the kernel's run-time numbers, in its order, after the pointers.
        options: compile-time parameters, warps and stages.
        pack: the codes are packed by a pass of its own.
    """

    copy: bool
    results: Sequence[tuple[tuple[int, ...], torch.dtype]]
    grid: tuple[int, ...]
    numbers: tuple[int | float, ...]
    options: dict[str, Any] = field(hash=False)
    pack: bool = field(default=False, kw_only=True)

    def empty(self, device: torch.device) -> list[Tensor]:
        """Uninitialized results."""
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results]


def planned(work: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what `work` returns for the arguments that it was given."""
    kept = lru_cache(SIGNATURES)(work)
    _caches.append(kept)
    return kept


def forget() -> None:
    """Drops every plan: what they were made from (tiles, tables) has changed."""
    for cache in _caches:
        cache.cache_clear()


def shape_of(x: Tensor | None) -> torch.Size | None:
    return None if x is None else x.shape


def row_step(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """Elements from row to row of [..., K], None where no one number says it."""
    if stride[-1] != 1 and shape[-1] > 1:
        return None
    step, rows = None, 1
    for size, n in zip(reversed(shape[:-1]), reversed(stride[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = n
        elif n != step * rows:
            return None
        rows *= size
    return shape[-1] if step is None else step


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def broadcast_strides(
    shape: Sequence[int], stride: Sequence[int], to: Sequence[int], name: str
) -> tuple[int, ...]:
    """Strides of a tensor as if it were expanded to `to`; raises where it cannot be."""
    missing = len(to) - len(shape)
    if missing < 0 or any(n not in (1, m) for n, m in zip(shape, to[missing:], strict=True)):
        raise ValueError(f"{name} must broadcast against {list(to)}, got {list(shape)}")
    steps = (0 if n == 1 else s for n, s in zip(shape, stride, strict=True))
    return (0,) * missing + tuple(steps)


_OPS = torch.library.Library("qtk", "FRAGMENT")


class Numbers(Protocol):
    """A value that an operator takes as a list of numbers, because a schema has no type for it."""

    @property
    def numbers(self) -> list[float]: ...

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Self: ...


def opaque(shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a launcher one node of a compiled graph, `torch.ops.qtk.<name>`.

    The compiler sees neither the plan nor the kernel; an eager call goes past the registration.
    Not by `torch.library.custom_op`, which takes 15 microseconds of a call instead of 5.

    Args:
        shapes: takes the launcher's arguments and gives results that are only allocated.
    """

    def wrap(launch: Callable[..., Any]) -> Callable[..., Any]:
        name = launch.__name__.removeprefix("_").removeprefix("launch_")
        plain, values = _plain(launch)

        def restored(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                pairs = zip(args, values, strict=True)
                return function(*(a if a is None or v is None else v.of(a) for a, v in pairs))

            return run

        _OPS.define(name + torch.library.infer_schema(plain, mutates_args=()))
        _OPS.impl(name, restored(launch), "CompositeExplicitAutograd")
        torch.library.register_fake(f"qtk::{name}", restored(shapes), lib=_OPS)
        op = getattr(torch.ops.qtk, name).default

        @wraps(launch)
        def call(*args: Any) -> Any:
            if not torch.compiler.is_compiling():
                return launch(*args)
            pairs = zip(args, values, strict=True)
            return op(*(a if a is None or v is None else a.numbers for a, v in pairs))

        return call

    return wrap


def _plain(launch: Callable[..., Any]) -> tuple[Callable[..., Any], list[type[Numbers] | None]]:
    """A prototype with lists in the place of `Numbers`, and where those stood."""
    signature = inspect.signature(launch)
    values: list[type[Numbers] | None] = []
    parameters = []
    for parameter in signature.parameters.values():
        kinds = get_args(parameter.annotation) or (parameter.annotation,)
        value = next((kind for kind in kinds if hasattr(kind, "numbers")), None)
        values.append(value)
        if value is not None:
            plain = Sequence[float] | None if NoneType in kinds else Sequence[float]
            parameter = parameter.replace(annotation=plain)
        parameters.append(parameter)

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return prototype, values
