"""Attacks, a file each: what makes a model wrong inside a budget.

A part has `perturb(model, x, y, budget, generator, steps) -> x'` and three constants:

    INPUT      "pixels" [B, C, H, W] in [0, 1], "embeddings" [B, T, H], or "text"
    NORM       what the budget bounds: "linf", "l2", "l1", "token" (l2 of a token's embedding as a
               share of the mean embedding's), "side" (of a patch, as a share of the image's height)
               or "rate" (share of the words that change)
    GRADIENTS  whether it differentiates the model

`model` maps x to logits [B, classes] and holds its own normalisation. A part is deterministic under
its generator and returns a point inside the budget. "text" parts have instead
`disturb(text, budget, random) -> text`; a part with UNIVERSAL = True learns one perturbation on
some images and shows it on others: `learn` and `apply` in the place of `perturb`.
"""

from typing import Protocol

from torch import Generator, Tensor, nn


class Attack(Protocol):
    """What a file of this folder has, where its input is pixels or embeddings."""

    INPUT: str
    NORM: str
    GRADIENTS: bool

    def perturb(
        self, model: nn.Module, x: Tensor, y: Tensor, budget: float, generator: Generator,
        steps: int,
    ) -> Tensor:  # fmt: skip
        """x inside the budget, such that the model answers something else than y [B]."""
        ...
