"""Float weights to codes; one file a paper.

A rounder is a function `find(problem) -> Rounded`, with settings as keywords. Inside, it works with
levels, which are codes less their zero point: w_hat = level * scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qtk import discover
from qtk.errors import CalibrationError, SchemeError
from qtk.grids import Steps
from qtk.numerics import to_fp8
from qtk.round._steps import best_steps as best_steps
from qtk.scheme import Format

Report = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Problem:
    """One linear to be rounded.

    Attributes:
        weight: [N, K] float32, after the transform.
        fmt: the grid.
        inputs: [T, K] float32, the transformed and quantized rows that the linear will read;
            None without data.
        wanted: [T, N] float32, what the float model computes for those rows, without the bias;
            None without data.
        name: of the linear, for messages.
        curvature: gives [N, N] float32, what errors of the outputs cost the whole network's
            answers, to second order; None where nobody can tell. The first call takes long.
        report: shows how far a long fit is, (steps done, steps in all).
    """

    weight: Tensor
    fmt: Format
    inputs: Tensor | None = None
    wanted: Tensor | None = None
    name: str = "the layer"
    curvature: Callable[[], Tensor] | None = None
    report: Report = _silent


class Rounded(NamedTuple):
    """What became of a weight.

    Attributes:
        codes: [N, K] holding integers in [qmin, qmax].
        steps: the scale and zero point of each row or group.
    """

    codes: Tensor
    steps: Steps


Grids = Callable[[Problem], Steps]


class Rounder(Protocol):
    """What a file in this folder is, and a module or object of a user's.

    Optional member:
        NEEDS_DATA: whether `problem.inputs` must be there; where it is not, the weight is rounded
            to nearest instead. False if not said.
        NEEDS_CALIB: whether it is refused where nobody gave calibration data; False if not said.
        ROWS_APART: whether a row of the weight is rounded without regard to the others, so that
            several processes may share the rows out. False if not said.
    """

    def find(self, problem: Problem) -> Rounded: ...


@dataclass(frozen=True)
class CheckedRounder:
    """A rounder whose answers are checked."""

    name: str
    rounder: Callable[[Problem], Rounded]
    needs_data: bool
    rows_apart: bool = False
    needs_calib: bool = False

    def runs(self, has_data: bool) -> str:
        """The name of what `find` really does."""
        return self.name if has_data or not self.needs_data else "nearest"

    def find(self, problem: Problem) -> Rounded:
        """The rounder's answer.

        Raises:
            SchemeError: it is none, codes that are no integers of the grid, or steps that do not
                fit.
        """
        if problem.inputs is None and self.needs_data:
            return to_nearest(problem.weight, problem.fmt)
        answer = self.rounder(problem)
        fault = _fault(answer, problem)
        if fault:
            raise SchemeError(f"rounding={self.name!r} gave {fault} for {problem.name}")
        return Rounded(*answer)


def rounder_of(given: object) -> CheckedRounder:
    """A rounder by name, or a user's own."""
    part = discover.part("round", given)
    said = (bool(part.member(n, False)) for n in ("NEEDS_DATA", "ROWS_APART", "NEEDS_CALIB"))
    return CheckedRounder(part.name, part.find, *said)


def to_nearest(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Rounded:
    """Rounded to nearest, on the grids of `best_steps`. Not called as its file: importing that
    would put the module in the function's place."""
    if fmt.kind == "e4m3":
        codes, scale = to_fp8(weight)
        return Rounded(codes.view(torch.int8).float(), Steps(fmt, scale))
    steps = best_steps(weight, fmt, importance)
    return Rounded(steps.codes(steps.grid(weight.shape[1]).nearest(weight)), steps)


def refuse_overflow(problem: Problem, *found: Tensor) -> None:
    """Raises CalibrationError where sums over the calibration data are no longer finite."""
    if problem.inputs is not None and not all(torch.isfinite(x).all() for x in found):
        raise CalibrationError(
            f"{problem.name}: what it reads or computes on the calibration data overflows, up to "
            f"{float(problem.inputs.abs().max()):.1e}; look for huge weights or biases before it"
        )


def _fault(answer: object, problem: Problem) -> str | None:
    """What is wrong with a rounder's answer."""
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], Steps):
        return f"a {type(answer).__name__} where it must be codes and Steps"
    codes, steps = answer
    fmt, (N, K) = problem.fmt, problem.weight.shape
    if not isinstance(codes, Tensor) or codes.shape != (N, K):
        return f"codes of shape {list(getattr(codes, 'shape', []))} and not {[N, K]}"
    if not torch.equal(codes, codes.round()):
        return "codes that are no integers"
    if codes.numel() and (codes.min() < fmt.qmin or codes.max() > fmt.qmax):
        lo, hi = int(codes.min()), int(codes.max())
        return f"codes from {lo} to {hi}, outside {fmt.qmin} to {fmt.qmax},"
    if steps.fmt != fmt:
        return f"steps of another grid, {steps.fmt},"
    G = 1 if fmt.group_size is None else -(-K // fmt.group_size)
    if (
        steps.scale.shape != (N, G)
        or not torch.isfinite(steps.scale).all()
        or not steps.scale.all()
    ):
        return f"scales that are not {[N, G]} finite numbers other than 0"
    if (steps.zero_point is None) != fmt.symmetric:
        return f"{'a' if fmt.symmetric else 'no'} zero point"
    zero = steps.zero_point
    if zero is not None and (
        zero.shape != (N, G) or zero.min() < fmt.qmin or zero.max() > fmt.qmax
        or not torch.equal(zero, zero.round())
    ):  # fmt: skip
        return f"zero points that are not {[N, G]} integers from {fmt.qmin} to {fmt.qmax}"
    return None
