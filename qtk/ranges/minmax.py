"""The whole range: no value of the calibration data, or of a token, is clipped."""

import torch

from qtk.ranges import Question, Range

TOKENS = True


def find(question: Question) -> Range:
    if question.per_token:
        return Range(clip=1.0)
    return Range(
        torch.stack([x.min() for x in question.batches]).min(),
        torch.stack([x.max() for x in question.batches]).max(),
    )
