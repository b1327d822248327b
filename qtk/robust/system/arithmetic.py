"""What is left in floating point, in 16 bits."""

import copy

import torch
from torch import nn

STAGE = "model"


def float32(model: nn.Module) -> nn.Module:
    return model


def float16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.float16)


def bfloat16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


VARIANTS = {"float32": float32, "float16": float16, "bfloat16": bfloat16}
