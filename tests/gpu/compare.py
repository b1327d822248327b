"""A kernel beside its reference: into poisoned memory, and twice on a GPU."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ULP = 2.0**-24  # half the spacing of float32 at 1: the error of one rounding


@contextmanager
def poisoned() -> Any:
    """`torch.empty` returns garbage that no op writes by chance."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(77) if out.numel() else out

    torch.empty = poison  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def both(op: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Any]:
    """What the kernel gives into poisoned memory, and the reference."""
    with poisoned():
        got = op(*args, **options, backend="triton")
        if torch.cuda.is_available():
            same(got, op(*args, **options, backend="triton"))
    return got, op(*args, **options, backend="reference")


def same(first: Any, second: Any) -> None:
    """Two runs of a kernel differ in no bit."""
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (first, second)), strict=True)
    for a, b in pairs:
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (
            "two runs of the same call differ"
        )


def near(got: Tensor, want: Tensor, tolerance: Tensor) -> None:
    """Nowhere further apart than `tolerance`."""
    worst = ((got.double() - want.double()).abs() - tolerance).max()
    assert worst <= 0, f"{worst:.3g} beyond the bound"


def answers() -> bool:
    """Whether the device still does anything: after some errors it refuses all."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:  # whatever it says
        return False
    return True
