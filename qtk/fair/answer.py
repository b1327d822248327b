"""A classifier asked about rows of tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError, ModelError
from qtk.fair.domain import Attribute, Domain
from qtk.fidelity.compare import logits_of


class Answer:
    """What one model says to rows; asked about the whole domain once, it looks up the rest.

    Args:
        model: a classifier of transformers, float or quantized.
        favourable: the class whose share group metrics compare.
        batch_size: rows of one forward pass.
    """

    def __init__(self, model: nn.Module, favourable: int = 1, batch_size: int = 1024) -> None:
        self.model, self.favourable, self.batch_size = model, favourable, batch_size
        self.domain: Domain | None = None
        self.known = torch.empty(0)

    def logits(self, rows: Tensor) -> Tensor:
        """[N, T] int64 -> [N, C] float32 on the CPU."""
        if self.domain is not None:
            return self.known[self.domain.index(rows)]
        return self.ask({"input_ids": rows})

    @torch.no_grad()
    def ask(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [N, C] of a batch of any model, some rows at a time.

        Raises:
            ModelError: a model that gives no row two logits or more.
        """
        device = next(self.model.parameters()).device
        training, found = self.model.training, []
        self.model.eval()
        try:
            for start in range(0, len(next(iter(batch.values()))), self.batch_size):
                part = {k: v[start : start + self.batch_size].to(device) for k, v in batch.items()}
                logits = logits_of(self.model(**part, return_dict=True))
                if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
                    raise ModelError(no_head(self.model))
                found.append(logits.cpu())
        finally:
            self.model.train(training)
        return torch.cat(found)

    def enumerate(self, domain: Domain) -> None:
        """Asks about all rows of the domain, in their order."""
        self.known, self.domain = self.logits(domain.all()), domain

    def decisions(self, rows: Tensor) -> Tensor:
        """[N, T] -> [N] int64; where two logits are equal, the class with the lower number.

        Of two classes it is the second one's probability above one half.
        """
        return decide(self.logits(rows))

    def unfair(self, rows: Tensor, attribute: Attribute) -> Tensor:
        """[N, T] -> [N] bool: some other value of the attribute changes the decision.

        Then this is so for the row with any value: it belongs to all but the attribute.
        """
        everyone = attribute.everyone(rows)
        decisions = self.decisions(everyone.flatten(0, 1)).view(everyone.shape[:2])
        return (decisions != decisions[:, :1]).any(1)


def decide(logits: Tensor) -> Tensor:
    """[N, C] -> [N], the first of the largest."""
    return (logits == logits.amax(1, keepdim=True)).to(torch.uint8).argmax(1)


def ties(logits: Tensor) -> int:
    """Rows whose two largest logits are equal."""
    two = logits.topk(2, dim=1).values
    return int((two[:, 0] == two[:, 1]).sum())


def check_head(model: nn.Module) -> None:
    """Raises ModelError for a model without a head of two classes or more."""
    config: Any = getattr(model, "config", None)
    named = type(model).__name__.endswith("ForSequenceClassification")
    if config is None or not named or getattr(config, "num_labels", 0) < 2:
        raise ModelError(no_head(model))


def no_head(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no classifier head of two classes or more: fairness needs a "
        "...ForSequenceClassification with num_labels >= 2"
    )


def check_labels(labels: Any, samples: int) -> Tensor | None:
    """Labels [N] int64, or None.

    Raises:
        CalibrationError: not one for each row, or negative.
    """
    if labels is None:
        return None
    found = torch.as_tensor(labels).cpu()
    if found.shape != (samples,) or found.is_floating_point() or bool((found < 0).any()):
        raise CalibrationError(
            f"labels have shape {list(found.shape)} and dtype {found.dtype}; give {samples} class "
            "numbers, one a row"
        )
    return found.long()
