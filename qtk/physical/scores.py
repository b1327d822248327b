"""How natural an assessor says that images look, and where it looks to say so."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import ModelError
from qtk.fidelity.compare import class_logits
from qtk.physical.ratings import LEVELS, normalized

WANTS = "naturalness is read off a classifier of the ratings 1 to 5"


def score(model: nn.Module, images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B] in [1, 5]; differentiable.

    Raises:
        ModelError: the model has not five classes.
    """
    return expected(_logits(model(images * 2 - 1), model))


def expected(logits: Tensor) -> Tensor:
    """[B, 5] -> [B], the mean rating."""
    return logits.softmax(1) @ torch.arange(1, LEVELS + 1).to(logits)


def attention(model: nn.Module, images: Tensor) -> Tensor:
    """Where it looks: [B, 3, H, W] in [0, 1] -> [B, H, W] in [0, 1]."""
    out = model(images * 2 - 1, output_attentions=True)
    return rollout(out.attentions, images.shape[-2:])


def rollout(attentions: tuple[Tensor, ...], size: tuple[int, ...]) -> Tensor:
    """Of each block [B, heads, T, T], the first token before the others -> [B, H, W] in [0, 1]."""
    joint = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for weights in attentions:
        joint = (weights.mean(1) + torch.eye(joint.shape[-1]).to(joint)) / 2 @ joint
    read = joint[:, 0, 1:]
    side = math.isqrt(read.shape[1])
    maps = read.view(-1, 1, side, read.shape[1] // side)
    large = F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return normalized(large)


def _logits(out: Any, model: nn.Module) -> Tensor:
    logits = class_logits(model, out, WANTS)
    if logits.shape[1] != LEVELS:
        raise ModelError(f"{type(model).__name__} has {logits.shape[1]} classes: {WANTS}")
    return logits
