"""Every batch's extremes, averaged over the batches: one odd batch cannot widen the grid alone.

A token's grid ends at the token's own extremes, so that there is nothing to average for those.
"""

import torch

from qtk.ranges import Question, Range


def find(question: Question) -> Range:
    return Range(
        torch.stack([x.min() for x in question.batches]).mean(),
        torch.stack([x.max() for x in question.batches]).mean(),
    )
