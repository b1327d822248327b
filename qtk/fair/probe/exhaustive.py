"""All valid rows: nothing is estimated."""

import torch
from torch import Tensor

from qtk.fair.answer import Answer
from qtk.fair.domain import Attribute, Domain


def draw(
    answer: Answer, rows: Tensor, domain: Domain, protected: Attribute, n: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """[M, T], whatever n is; M is the size of the domain without the protected attribute."""
    return domain.without(protected).all()
