"""Texts to padded token ids, with the tokenizer that belongs to the model."""

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from qtk.errors import CalibrationError
from qtk.observe.beside import beside
from qtk.observe.files import MAX_LINE

Batch = dict[str, Any]

MAX_LENGTH = 256  # tokens
FAR = 0.1  # share of the vocabulary that a tokenizer's length may differ by: padding, added tokens
SLACK = 128  # tokens that it may differ by in any case
MOSTLY = 0.5  # share of unknown tokens that no text in the tokenizer's language has


def find_tokenizer(model: nn.Module, tokenizer: Any) -> Any:
    """The tokenizer given (one, a folder or a hub name), or the one beside the model.

    Raises:
        CalibrationError: there is none, or it cannot be the model's.
    """
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = beside(model, "AutoTokenizer", tokenizer)
    if not callable(tokenizer) or not hasattr(tokenizer, "pad_token"):
        raise CalibrationError(
            f"a {type(tokenizer).__name__} is not a tokenizer; pass tokenizer=, a tokenizer or its "
            "folder"
        )
    _check_size(model, tokenizer)
    return tokenizer


def encode(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Batch:
    """One padded batch, cut to what the model has positions for; [B, 1, T] for multiple choice.

    Raises:
        CalibrationError: no token is left, or most are unknown to the tokenizer.
    """
    length = min(MAX_LENGTH, positions(model) or MAX_LENGTH)
    own, padded = tokenizer.pad_token, len(texts) > 1
    if own is None and padded and tokenizer.eos_token is None:
        raise CalibrationError("the tokenizer has no pad token; set tokenizer.pad_token")
    try:
        if own is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked: any token serves
        batch = dict(tokenizer(
            [text[:MAX_LINE] for text in texts], padding=padded, truncation=True,
            max_length=length, return_tensors="pt",
        ))  # fmt: skip
    finally:
        if own is None:
            tokenizer.pad_token = None
    if reads_choices(model):
        batch = {name: value[:, None] for name, value in batch.items()}
    return batch


class Unknown:
    """Counts the tokens that a tokenizer does not know."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.id = tokenizer, getattr(tokenizer, "unk_token_id", None)
        self.special = set(getattr(tokenizer, "all_special_ids", ())) - {self.id}
        self.unknown = self.total = 0

    def count(self, batch: Batch) -> None:
        if self.id is not None:
            ids = batch["input_ids"].flatten().tolist()
            self.unknown += ids.count(self.id)
            self.total += sum(i not in self.special for i in ids)

    def check(self) -> None:
        """Raises CalibrationError when most tokens so far are unknown."""
        if self.unknown > MOSTLY * self.total:
            raise CalibrationError(
                f"{100 * self.unknown / self.total:.0f} % of the tokens are "
                f"{self.tokenizer.unk_token}, unknown to the tokenizer: it belongs to another "
                "model, or to texts in another language; pass the right one as tokenizer="
            )


def positions(model: nn.Module) -> int | None:
    """The longest sequence that the model has positions for."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    for name, table in model.named_modules():
        if limit and name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            padding = table.padding_idx  # RoBERTa and its kin count from the row after this one
            return limit if padding is None else limit - padding - 1
    return limit


def reads_choices(model: nn.Module) -> bool:
    """Whether the model reads [B, choices, T]."""
    return type(model).__name__.endswith("ForMultipleChoice")


def _check_size(model: nn.Module, tokenizer: Any) -> None:
    """Raises CalibrationError for an empty tokenizer, or one of another vocabulary."""
    config: Any = model.config
    vocabulary = getattr(config, "vocab_size", None)
    if not vocabulary or not hasattr(tokenizer, "__len__"):
        return
    length = len(tokenizer)
    if length <= len(getattr(tokenizer, "all_special_tokens", ())):
        raise CalibrationError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} is empty: transformers "
            "makes such a one where a folder has no tokenizer files; copy them there "
            "(tokenizer.json, tokenizer_config.json), or pass tokenizer="
        )
    if abs(length - vocabulary) > FAR * vocabulary + SLACK:
        raise CalibrationError(
            f"the tokenizer has {length} tokens and the model {vocabulary}: it belongs to another "
            "model; pass the right one as tokenizer=, or batches of token ids"
        )
