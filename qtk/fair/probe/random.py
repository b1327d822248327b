"""Valid rows, each as likely as any other: what IF_r is estimated on."""

import torch
from torch import Tensor

from qtk.fair.answer import Answer
from qtk.fair.domain import Attribute, Domain


def draw(
    answer: Answer, rows: Tensor, domain: Domain, protected: Attribute, n: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """n draws with replacement, of which the different ones stay: [M, T], M <= n."""
    return protected.unique(domain.draw(n, generator))
