"""APQ-ViT's range, Ding et al. 2023, https://arxiv.org/abs/2303.14341: Bottom-elimination
Blockwise Calibration.

    score(range) = sum_i (g_i e_i)^2,   e_i = O_i - O_hat_i, 0 among the smallest |e| of its share

O is the output of the whole block (or of the site's own linears) and g its gradient; see
`qtk.observe.probe`. The bottom share of errors, which every candidate makes, is dropped for each
candidate by itself: one threshold for all would favour those whose errors are large. Candidates go
through the block in one batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from qtk.numerics import fake_quantize, fake_quantize_token, scale_and_zero_point
from qtk.ranges import Probe, Question, Range

TOGETHER = [0.87**k for k in range(16)]  # shares of the full range, both ends at once
APART = [0.65, 0.75, 0.87, 1.0, 1.15, 1.35]  # then one end after the other
CLIPS = [1.0 - 0.04 * k for k in range(14)]  # shares of a token's maximum, for dynamic grids
BATCH = 8  # candidates in one pass through the block

NEEDS_PROBE = True
TOKENS = True

C = TypeVar("C")
Ends = tuple[Tensor, Tensor]
Score = Callable[[Sequence[Callable[[Tensor], Tensor]]], list[float]]


def find(question: Question, *, bottom_ratio: float = 0.1, granularity: str = "block") -> Range:
    """argmin of the score.

    Args:
        bottom_ratio: share of the smallest errors that is dropped; 0 is the plain Hessian.
        granularity: whose output is compared, "layer" or "block".
    """
    assert question.probe is not None
    score = partial(_scores, question.probe, bottom_ratio, granularity)
    fmt = question.fmt
    if question.per_token:

        def clipped(clip: float) -> Callable[[Tensor], Tensor]:
            return lambda x: fake_quantize_token(x, fmt.bits, clip)

        return Range(clip=_best(CLIPS, clipped, score))

    def on_grid(ends: Ends) -> Callable[[Tensor], Tensor]:
        scale, zero_point = scale_and_zero_point(*ends, fmt)
        return lambda x: fake_quantize(x, scale, zero_point, fmt)

    lo = torch.stack([x.min() for x in question.batches]).min()
    hi = torch.stack([x.max() for x in question.batches]).max()
    low, high = _best([(lo * c, hi * c) for c in TOGETHER], on_grid, score)
    low, high = _best([(low, torch.minimum(high * c, hi)) for c in APART], on_grid, score)
    return Range(*_best([(torch.maximum(low * c, lo), high) for c in APART], on_grid, score))


def _best(
    candidates: Sequence[C], grid: Callable[[C], Callable[[Tensor], Tensor]], score: Score
) -> C:
    """The first candidate with the smallest score; BATCH of them are scored together."""
    scores = [
        found
        for start in range(0, len(candidates), BATCH)
        for found in score([grid(c) for c in candidates[start : start + BATCH]])
    ]
    return candidates[min(range(len(scores)), key=scores.__getitem__)]


def _scores(
    probe: Probe, bottom_ratio: float, granularity: str,
    grids: Sequence[Callable[[Tensor], Tensor]],
) -> list[float]:  # fmt: skip
    totals = torch.zeros(len(grids), dtype=torch.float64)
    for index, x in enumerate(probe.inputs):
        errors = torch.stack([grid(x) - x for grid in grids])
        difference, gradient = probe.effect(index, errors, granularity)
        kept = eliminated(difference, bottom_ratio)
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
