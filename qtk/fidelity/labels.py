"""What the samples are said to be, as the numbers that a model's logits stand for."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.fidelity.tally import IGNORED
from qtk.observe.files import classes

logger = logging.getLogger("qtk")


def class_numbers(model: nn.Module, data: Any) -> dict[str, int]:
    """The number of each class by its name in lower case, or by the name of its folder in `data`.

    A folder is matched by the model's own name for the class, by any of its synonyms ("tench, Tinca
    tinca"), or by its number. Where none of these fits and there are as many folders as classes,
    they are numbered in order, as torchvision's ImageFolder does.
    """
    named = getattr(getattr(model, "config", None), "label2id", None) or {}
    known = {name.strip(): i for text, i in named.items() for name in text.lower().split(",")}
    known |= {text.lower(): i for text, i in named.items()}
    if not isinstance(data, (str, Path)) or not Path(data).is_dir():
        return known
    folders = [name.lower() for name in classes(Path(data))]
    numbers = known | {str(i): i for i in named.values()}
    if all(name in numbers for name in folders):
        return {name: numbers[name] for name in folders}
    if len(folders) == len(named) and not any(name in known for name in folders):
        return {name: i for i, name in enumerate(folders)}
    logger.warning(
        "no accuracy: the folders of %s (%s) are not the model's classes (%s)",
        data, ", ".join(folders[:3]), ", ".join(list(named)[:3]),
    )  # fmt: skip
    return dict.fromkeys(folders, IGNORED)


def as_tensor(labels: Any, numbers: dict[str, int]) -> Tensor | None:
    """Labels as integers, `IGNORED` where there is none; None for scores, which are no classes.

    Args:
        labels: a tensor, a list of numbers and names, or None.
        numbers: of the classes by name, in lower case.

    Raises:
        CalibrationError: a name that is no class.
    """
    if labels is None or isinstance(labels, Tensor):
        return labels
    assert isinstance(labels, Sequence)
    if any(isinstance(label, float) for label in labels):
        return None
    found = []
    for label in labels:
        if isinstance(label, str) and label.lower() not in numbers:
            raise CalibrationError(
                f"{label!r} is none of the model's classes ({', '.join(list(numbers)[:5])}); give "
                "the class's number"
            )
        number = numbers[label.lower()] if isinstance(label, str) else label
        found.append(IGNORED if number is None else int(number))
    return None if all(number == IGNORED for number in found) else torch.tensor(found)


def check_labels(labels: Tensor | None, logits: Tensor) -> Tensor | None:
    """Labels where the logits [..., classes] are, one each.

    Raises:
        CalibrationError: another number of labels, or one that no logit stands for.
    """
    if labels is None or labels.is_floating_point():
        return None
    if labels.dim() == logits.dim() and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if labels.shape != logits.shape[:-1]:
        raise CalibrationError(
            f"labels have shape {list(labels.shape)}; for logits {list(logits.shape)} it must be "
            f"{list(logits.shape[:-1])}"
        )
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
    if len(wrong):
        raise CalibrationError(
            f"label {int(wrong[0])}, but the model has {logits.shape[-1]} classes"
        )
    return labels.to(logits.device)
