"""Token-Wise Clipping, Wei et al. 2022, https://arxiv.org/abs/2209.13325, section 4.2 (coarse).

Every token has a largest and a smallest value; the grid ends at a quantile of those. Few tokens
hold the outliers, so dropping a share of the tokens moves the ends far at little cost. The paper
searches one share for the whole model on its logits; here every site searches its own on the
squared error weighted by importance, because sites are calibrated one after the other. Where each
token has a grid of its own, there is nothing to drop.
"""

import torch
from torch import Tensor

from qtk.numerics import fake_quantize, scale_and_zero_point
from qtk.ranges import Question, Range

SPAN = {8: 0.1, 7: 0.2, 6: 0.3, 5: 0.6, 4: 0.9}  # largest share of tokens dropped, by bits


def find(question: Question, *, steps: int = 30) -> Range:
    """`steps` shares are tried."""
    fmt, x = question.fmt, torch.cat(question.batches)
    top, bottom = x.amax(1).sort().values, x.amin(1).sort(descending=True).values  # [M]

    def ends(dropped: float) -> tuple[Tensor, Tensor]:
        last = max(int(len(x) * (1 - dropped)) - 1, 0)
        return bottom[last], top[last]

    def error(dropped: float) -> float:
        scale, zero_point = scale_and_zero_point(*ends(dropped), fmt)
        squares = (fake_quantize(x, scale, zero_point, fmt) - x).square().sum(0)
        return float(squares @ question.importance)

    shares = torch.linspace(0, SPAN[fmt.bits], steps).tolist()
    return Range(*ends(min(shares, key=error)))
