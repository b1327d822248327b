"""Rows decoded from random latents: what the latent probe is held against."""

import torch
from torch import Tensor

from qtk.fair.answer import Answer
from qtk.fair.decoder import Decoder
from qtk.fair.domain import Attribute, Domain

NEEDS_DECODER = True


def draw(
    answer: Answer, rows: Tensor, domain: Domain, protected: Attribute, n: int,
    generator: torch.Generator, *, decoder: Decoder,
) -> Tensor:  # fmt: skip
    """n latents, of whose rows the different ones stay: [M, T], M <= n."""
    return protected.unique(decoder.decode(torch.randn(n, decoder.size, generator=generator)))
