"""One long text in windows, for a language model's perplexity as papers report it.

A window is as long as the model has positions and begins `stride` tokens after the one before. It
predicts the tokens that no earlier window has; those before them are context. With a stride of a
whole window, as in GPTQ's tables, each token sees only its own window.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError, SchemeError
from qtk.observe.batches import Labelled
from qtk.observe.check import check
from qtk.observe.tokens import find_tokenizer, positions

ROWS = 8  # windows that are run at once


def windows(
    model: nn.Module, data: Any, tokenizer: Any, stride: int, length: int | None = None
) -> Iterator[Labelled]:
    """The windows of one text.

    Args:
        data: the path of a text file, strings, which are joined by blank lines, or ids [T].
        stride: tokens that each window but the first predicts.
        length: of a window; None for as many tokens as the model has positions.

    Raises:
        SchemeError: a stride or length that makes no sense.
        CalibrationError: data that is no text, or of fewer than two tokens.
    """
    length = _length(model, stride, length)
    ids = _ids(model, data, tokenizer)
    if len(ids) < 2:
        raise CalibrationError("the text has fewer than two tokens: nothing is predicted")
    rows: list[tuple[int, int, int]] = []  # begin, end, first token that counts
    for begin in range(0, len(ids), stride):
        done = rows[-1][1] if rows else 0
        end = min(begin + length, len(ids))
        rows.append((begin, end, done))
        if end == len(ids):
            break
    for index, some in enumerate(_alike(rows)):
        batch = {"input_ids": torch.stack([ids[begin:end] for begin, end, _ in some])}
        judged = torch.stack([torch.arange(b, e) >= done for b, e, done in some])
        names: list[int | str] = [f"tokens {begin} to {end - 1}" for begin, end, _ in some]
        yield Labelled(check(model, batch, index), None, names, judged)


def _alike(rows: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """At most ROWS windows of one length at a time."""
    some: list[tuple[int, int, int]] = []
    for row in rows:
        if some and (len(some) == ROWS or row[1] - row[0] != some[0][1] - some[0][0]):
            yield some
            some = []
        some.append(row)
    yield some


def _length(model: nn.Module, stride: object, length: object) -> int:
    limit = positions(model)
    found = limit if length is None else length
    for name, value in (("stride", stride), ("window", found)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SchemeError(f"{name}={value!r}: give a number of tokens")
    assert isinstance(found, int) and isinstance(stride, int)
    if found < 2 or stride > found or (limit and found > limit):
        raise SchemeError(
            f"stride={stride} with windows of {found} tokens: a window has 2 to "
            f"{limit or 'any number of'} tokens, and the stride is no longer than it"
        )
    return found


def _ids(model: nn.Module, data: Any, tokenizer: Any) -> Tensor:
    """[T] int64, the whole text."""
    if isinstance(data, Tensor) and data.squeeze().dim() == 1:
        return data.squeeze().long()
    if isinstance(data, (str, os.PathLike)):
        text = _read(Path(data))
    elif isinstance(data, (list, tuple)) and all(isinstance(item, str) for item in data):
        text = "\n\n".join(data)
    else:
        raise CalibrationError(
            f"stride reads one text: give a text file, a list of strings or a tensor of ids, not a "
            f"{type(data).__name__} of other things"
        )
    ids = find_tokenizer(model, tokenizer)(text, return_tensors="pt", verbose=False)["input_ids"]
    return ids[0].long()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CalibrationError(f"{path} is not a UTF-8 text file") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
