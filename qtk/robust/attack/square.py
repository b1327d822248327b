"""Square attack in the linf ball (Andriushchenko et al. 2020, arXiv 1912.00049): no gradients.

It starts from vertical stripes at the budget, then tries squares whose channels are set to plus or
minus the budget, at random places and ever smaller, and keeps what lowers the margin
z_y - max_{i != y} z_i.
"""

import torch
from torch import Generator, Tensor, nn

INPUT, NORM, GRADIENTS = "pixels", "linf", False
SHARE = 0.8  # of the pixels that the first squares cover
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # after so many of 10,000 queries
QUERIES = 10  # a step of a gradient attack is allowed so many


@torch.no_grad()
def perturb(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator, steps: int
) -> Tensor:
    """After `steps` * QUERIES queries of the model."""
    B, C, H, W = x.shape
    stripes = _signs((B, C, 1, W), generator).to(x)
    best = (x + budget * stripes).clamp(0, 1)
    low = margin(model(best), y)
    queries = steps * QUERIES
    for query in range(queries):
        left = (low > 0).nonzero()[:, 0]
        if not len(left):
            break
        side = side_at(query, queries, min(H, W))
        tried = _with_squares(best[left], x[left], budget, side, generator)
        found = margin(model(tried), y[left])
        better = found < low[left]
        best[left[better]], low[left[better]] = tried[better], found[better]
    return best


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """[B]: by how much the true class wins; negative where it does not."""
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -float("inf")).amax(1)


def side_at(query: int, queries: int, size: int) -> int:
    """The side of the squares, in pixels; the paper's schedule, stretched to these queries."""
    passed = sum(query * 10_000 / queries > limit for limit in HALVED)
    return max(1, min(size - 1, round((SHARE / 2**passed) ** 0.5 * size)))


def _with_squares(
    best: Tensor, x: Tensor, budget: float, side: int, generator: Generator
) -> Tensor:
    """A square of each image anew."""
    B, C, H, W = x.shape
    top, left = (
        torch.randint(0, n - side + 1, (B, 1), generator=generator).to(x.device) for n in (H, W)
    )
    rows, columns = (torch.arange(n, device=x.device)[None] for n in (H, W))
    inside_rows = (rows >= top) & (rows < top + side)
    inside_columns = (columns >= left) & (columns < left + side)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    signs = _signs((B, C, 1, 1), generator).to(x)
    return torch.where(inside, (x + budget * signs).clamp(0, 1), best)


def _signs(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
