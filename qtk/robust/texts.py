"""Sentences, and a classifier of them that reads embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError, ModelError
from qtk.fidelity.labels import as_tensor
from qtk.observe.tokens import find_tokenizer


@dataclass(frozen=True)
class Texts:
    """Sentences and their classes.

    Attributes:
        labels: [N] int64.
    """

    sentences: tuple[str, ...]
    labels: Tensor
    tokenizer: Any


class Sentences(nn.Module):
    """A classifier of tokens' embeddings [B, T, H] under one mask [B, T]."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        super().__init__()
        self._held = (model,)
        self.rest = {k: v for k, v in batch.items() if k != "input_ids"}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._held[0](inputs_embeds=x, **self.rest).logits
        return logits.float()


def read(
    model: nn.Module, data: Any, tokenizer: Any = None, samples: int | None = None, seed: int = 0
) -> Texts:
    """Sentences and labels: a list of (text, class).

    Raises:
        CalibrationError: another form, no sentences, or a class that the model has not.
        ModelError: the model is no classifier of text.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ModelError(
            f"no text head: suite='text' needs a model such as BertForSequenceClassification, not "
            f"a {type(model).__name__}"
        )
    pairs = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else []
    if not pairs or not all(
        isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise CalibrationError("suite='text' takes a list of (text, class), and at least one")
    if samples is not None and samples < len(pairs):
        pairs = [pairs[i] for i in sorted(Random(seed).sample(range(len(pairs)), samples))]
    config: Any = model.config
    numbers = {name.lower(): i for name, i in (config.label2id or {}).items()}
    labels = as_tensor([label for _, label in pairs], numbers)
    if labels is None or int(labels.min()) < 0 or int(labels.max()) >= config.num_labels:
        raise CalibrationError(f"classes of the texts must be 0 to {config.num_labels - 1}")
    return Texts(tuple(text for text, _ in pairs), labels, find_tokenizer(model, tokenizer))


@torch.no_grad()
def embedded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[B, T, H]: the words' embeddings, before positions are added."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    found: Tensor = table(batch["input_ids"])
    return found
