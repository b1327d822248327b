"""The activation functions that ops fuse."""

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}, expected one of {ACTIVATIONS}")


def activate(y: Tensor, activation: str | None) -> Tensor:
    """gelu is x Phi(x) with the error function, gelu_tanh its tanh approximation.

    silu is x sigmoid(x), quick_gelu x sigmoid(1.702 x).
    """
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        return y * (y * 1.702).sigmoid()
    if activation == "silu":
        return F.silu(y)
    return F.relu(y) if activation == "relu" else y
