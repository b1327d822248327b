"""sentence-transformers: its models hold one of transformers, which is what is quantized.

Nothing here imports the package: an object of its classes is there only where it was imported.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

INNER = ("model", "auto_model")  # what the first module calls the transformers model, by release
PAIRS = 32  # that a CrossEncoder tokenizes at once


@dataclass(frozen=True)
class Unwrapped:
    """What `quantize` and `evaluate` work on: a model, and data and tokenizer that suit it."""

    model: Any
    data: Any
    tokenizer: Any


def is_wrapper(model: object) -> bool:
    """Whether it is a SentenceTransformer or a CrossEncoder."""
    package = sys.modules.get("sentence_transformers")
    names = ("SentenceTransformer", "CrossEncoder")
    classes = tuple(filter(None, (getattr(package, name, None) for name in names)))
    return isinstance(model, classes)


def transformers_model(model: Any) -> Any:
    """The transformers model inside such an object, None for any other."""
    if not is_wrapper(model):
        return None
    holder, name = _place(model)
    return getattr(holder, name)


def unwrap(model: Any, data: Any = None, tokenizer: Any = None) -> Unwrapped:
    """The model inside, its own tokenizer and length, and a CrossEncoder's pairs tokenized.

    What is not of sentence-transformers comes back as it is.
    """
    inner = transformers_model(model)
    if inner is None:
        return Unwrapped(model, data, tokenizer)
    if tokenizer is None:
        tokenizer = OwnLength(model.tokenizer, model.max_seq_length)
    if _are_pairs(data):
        data = [
            dict(tokenizer(
                [a for a, _ in part], [b for _, b in part], padding=True, truncation=True,
                return_tensors="pt",
            ))
            for part in (data[i : i + PAIRS] for i in range(0, len(data), PAIRS))
        ]  # fmt: skip
    return Unwrapped(inner, data, tokenizer)


def rewrap(model: Any, inner: Any, *, inplace: bool = False) -> Any:
    """The same object around another transformers model, which is returned alone where there was
    nothing around the first one."""
    if not is_wrapper(model):
        return inner
    if not inplace:
        return copy.deepcopy(model, {id(transformers_model(model)): inner})
    holder, name = _place(model)
    setattr(holder, name, inner)
    return model


def save_around(model: Any, folder: Path) -> None:
    """Saves everything of the object but the transformers model: tokenizer, pooling, prompts."""
    rewrap(model, _Nothing()).save(str(folder), create_model_card=False)


class OwnLength:
    """A tokenizer that cuts where its sentence-transformers model does."""

    def __init__(self, tokenizer: Any, length: int | None) -> None:
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, *texts: Any, **options: Any) -> Any:
        if self._length:
            options["max_length"] = self._length
        return self._tokenizer(*texts, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tokenizer"], name)


class _Nothing(nn.Module):
    """Stands for a model that is not to be saved."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        pass


def _place(model: Any) -> tuple[Any, str]:
    """The module that holds the transformers model, and under which name."""
    first = model[0]
    name = next((name for name in INNER if name in first._modules), INNER[0])
    return first, name


def _are_pairs(data: Any) -> bool:
    """Whether data is a list of pairs of texts: what a CrossEncoder reads."""
    if not isinstance(data, (list, tuple)) or not data:
        return False
    return all(
        isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(t, str) for t in item)
        for item in data
    )
