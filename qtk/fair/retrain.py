"""A classifier taught again with the discriminatory rows that were found, before it is quantized.

LIMI (ISSTA 2023, github.com/xiaoyisong/Latent_Imitator): found rows, as many as 30 % of the
training rows, are added, labelled by a majority of models that do not see the protected attribute.
Here these are models of the same class with different seeds, in whose rows the attribute always has
its first value. What correlates with the attribute they still see.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.fair.answer import Answer, check_head
from qtk.fair.classifier import train
from qtk.fair.domain import Attribute

SHARE = 0.3
VOTERS = 3


def retrain(
    model: nn.Module, rows: Tensor, labels: Tensor, found: Tensor,
    protected: Attribute | Sequence[Attribute], *, share: float = SHARE, voters: int = VOTERS,
    epochs: int = 5, lr: float = 1e-3, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A new model of the class and config of `model`, trained from the beginning.

    Args:
        rows: [N, T] token ids that it is trained on, with their labels [N].
        found: [M, T] discriminatory rows, such as a probe gives those of which `Answer.unfair` is
            true. They are drawn with replacement, and with any value of the attribute.
        protected: what the voters do not see.
        share: rows added, as a share of N.
        voters: an odd number.

    Raises:
        CalibrationError: nothing was found, or an even number of voters.
        ModelError: no classifier head.
    """
    check_head(model)
    if not len(found) or voters % 2 == 0:
        raise CalibrationError(
            f"{len(found)} rows found and {voters} voters: retraining needs a row and an odd number"
        )
    attributes = [protected] if isinstance(protected, Attribute) else list(protected)
    generator = torch.Generator().manual_seed(seed)
    extra = found[torch.randint(len(found), (round(share * len(rows)),), generator=generator)]
    for attribute in attributes:
        values = torch.tensor(attribute.values)
        chosen = torch.randint(len(values), (len(extra),), generator=generator)
        extra[:, attribute.position] = values[chosen]
    votes = torch.zeros(len(extra), model.config.num_labels)  # type: ignore[union-attr, arg-type]
    for voter in range(voters):
        blind = train(_new(model, seed + 1000 + voter), hidden(rows, attributes), labels,
                      epochs=epochs, lr=lr, seed=seed + 1000 + voter)  # fmt: skip
        decided = Answer(blind).decisions(hidden(extra, attributes))
        votes[torch.arange(len(extra)), decided] += 1
    all_rows, all_labels = torch.cat([rows, extra]), torch.cat([labels, votes.argmax(1)])
    return train(_new(model, seed), all_rows, all_labels, epochs=epochs, lr=lr, seed=seed)


def hidden(rows: Tensor, attributes: Sequence[Attribute]) -> Tensor:
    """[N, T] with each attribute at its first value."""
    rows = rows.clone()
    for attribute in attributes:
        rows[:, attribute.position] = attribute.values[0]
    return rows


def _new(model: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = type(model)(model.config)
    return fresh.to(next(model.parameters()).device)
