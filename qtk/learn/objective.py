"""How far outputs are from the float model's, as a number with gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.numerics import EPS


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of [T, H] over the variance that its channels have."""
    got, wanted = got.float(), wanted.float()
    return (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp(min=EPS)


def output_error(got: Any, wanted: Any, mask: Tensor | None) -> Tensor:
    """How far a model's outputs are from the float model's: KL of logits, or hidden states' error.

    Args:
        got, wanted: outputs of transformers models of one class.
        mask: [B, T], 0 at padding, or None.
    """
    errors = []
    for name, value in wanted.items():
        mine = got[name]
        if not isinstance(value, Tensor) or name == "loss":
            continue
        per_token = mask is not None and value.shape[:2] == mask.shape
        if per_token and value.dim() == 3:
            assert mask is not None
            mine, value = mine[mask.bool()], value[mask.bool()]
        if name.endswith("logits") and value.shape[-1] > 1:
            log_q, log_p = (F.log_softmax(x.float().flatten(0, -2), -1) for x in (mine, value))
            errors.append(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))
        elif name.endswith("logits") or name == "last_hidden_state":
            errors.append(relative_error(mine.flatten(0, -2), value.flatten(0, -2)))
    return torch.stack(errors).sum()
