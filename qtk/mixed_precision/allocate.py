"""Which unit takes which scheme: an integer program, solved exactly.

    minimise    sum_u sum_s x_us objective_us
    subject to  sum_s x_us = 1               for every unit u
                sum_u sum_s x_us cost_us <= limit     for every budget
                x_us in {0, 1}

after HAWQ-V3 (Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", 2021,
https://arxiv.org/abs/2011.10680, section 3.4). A unit is what the kernels want of one scheme, so
that q, k and v share theirs by construction.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from qtk.mixed_precision.space import Chosen, Matrix

SLACK = 1e-9  # of a limit: sums of floats in another order


def allocate(objective: Matrix, limits: Sequence[tuple[Matrix, float]]) -> Chosen | None:
    """The cheapest assignment within all limits; None where there is none.

    Args:
        objective: [U, S], what each choice costs.
        limits: pairs of a cost [U, S] and what its sum may be at most.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # a second of `import qtk`

    U, S = objective.shape
    one_each = LinearConstraint(np.kron(np.eye(U), np.ones(S)), 1, 1)
    rows = [one_each]
    for cost, limit in limits:
        unit = max(abs(limit), np.finfo(float).tiny)  # so that the solver's tolerance is relative
        rows.append(LinearConstraint(cost.ravel() / unit, -np.inf, limit / unit + SLACK))
    scale = max(float(np.abs(objective).max()), np.finfo(float).tiny)
    with _stdout_to_stderr():
        found = milp(
            objective.ravel() / scale, integrality=np.ones(U * S), bounds=Bounds(0, 1),
            constraints=rows, options={"mip_rel_gap": 0.0},
        )  # fmt: skip
    if found.x is None:
        return None
    return tuple(int(s) for s in found.x.reshape(U, S).argmax(1))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS prints some steps to stdout whatever it is told, and stdout may be read as JSON."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)  # what C has buffered would otherwise come after
        os.dup2(kept, 1)
        os.close(kept)


def total(cost: Matrix, chosen: Chosen) -> float:
    """The sum over units of what they chose."""
    return float(cost[np.arange(len(chosen)), list(chosen)].sum())
