"""APQ-ViT's range, Ding et al. 2023, https://arxiv.org/abs/2303.14341: Bottom-elimination
Blockwise Calibration.

    score(lo, hi) = sum_i (g_i e_i)^2,   e_i = O_i - O_hat_i, 0 among the smallest |e| of its share

O is the output of the whole block (or of the site's own linears) and g its gradient; see
`qtk.observe.probe`. The bottom share of errors, which every candidate makes, is dropped for each
candidate by itself: one threshold for all would favour those whose errors are large. Candidates go
through the block in one batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qtk.numerics import fake_quantize, scale_and_zero_point
from qtk.ranges import Range
from qtk.scheme import Format

TOGETHER = [0.87**k for k in range(16)]  # shares of the full range, both ends at once
APART = [0.65, 0.75, 0.87, 1.0, 1.15, 1.35]  # then one end after the other
BATCH = 8  # candidates in one pass through the block

NEEDS_PROBE = True  # `find` takes a fourth argument


class Probe(Protocol):
    """See `qtk.observe.probe.Probe`; `inputs` are the transformed [B, T, K] of its parts."""

    inputs: list[Tensor]

    def effect(self, index: int, errors: Tensor, granularity: str) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Settings:
    """Of the search.

    Attributes:
        bottom_ratio: share of the smallest errors that is dropped; 0 is the plain Hessian.
        granularity: whose output is compared, "layer" or "block".
    """

    bottom_ratio: float = 0.1
    granularity: str = "block"


_settings = Settings()


@contextmanager
def using(settings: Settings) -> Iterator[None]:
    """Searches with other settings inside a `with` block: for ablations."""
    global _settings
    before, _settings = _settings, settings
    try:
        yield
    finally:
        _settings = before


def find(batches: list[Tensor], fmt: Format, importance: Tensor, probe: Probe) -> Range:
    """argmin of the score over (lo, hi)."""
    full_lo = torch.stack([x.min() for x in batches]).min()
    full_hi = torch.stack([x.max() for x in batches]).max()

    def best(candidates: list[Range]) -> Range:
        scores = [
            score
            for start in range(0, len(candidates), BATCH)
            for score in _scores(candidates[start : start + BATCH], fmt, probe)
        ]
        return candidates[min(range(len(scores)), key=scores.__getitem__)]

    low, high = best([(full_lo * c, full_hi * c) for c in TOGETHER])
    low, high = best([(low, torch.minimum(high * c, full_hi)) for c in APART])
    return best([(torch.maximum(low * c, full_lo), high) for c in APART])


def _scores(candidates: list[Range], fmt: Format, probe: Probe) -> list[float]:
    grids = [scale_and_zero_point(lo, hi, fmt) for lo, hi in candidates]
    totals = torch.zeros(len(grids), dtype=torch.float64)
    for index, x in enumerate(probe.inputs):
        errors = torch.stack([fake_quantize(x, *grid, fmt) - x for grid in grids])
        difference, gradient = probe.effect(index, errors, _settings.granularity)
        kept = eliminated(difference, _settings.bottom_ratio)
        totals += (kept * gradient).double().square().sum(1).cpu()
    return totals.tolist()


def eliminated(difference: Tensor, bottom_ratio: float) -> Tensor:
    """[C, n] with the smallest magnitudes of every row, `bottom_ratio` of them, set to 0."""
    dropped = int(difference.shape[1] * bottom_ratio)
    if not dropped:
        return difference
    size = difference.abs()
    threshold = size.kthvalue(dropped, dim=1, keepdim=True).values
    return difference.masked_fill(size <= threshold, 0.0)
